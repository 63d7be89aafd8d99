"""Golden files: today's writers repeat them byte for byte, every reader reads them, the next
version is refused by name, and the permutation is what docs/formats.md says it is."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from embkit import _rust
from embkit.errors import CorruptError, FormatError

HERE = Path(__file__).parent
FORMATS = HERE.parents[1] / "docs" / "formats.md"
CONTAINERS = sorted(HERE.glob("*-v1.safetensors"))
MANIFESTS = sorted(HERE.glob("*-v1.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path_factory.mktemp("golden")
    module.main(out)
    return out


def test_the_script_writes_exactly_the_committed_files(made: Path) -> None:
    committed = {p.name for p in [*CONTAINERS, *MANIFESTS]}
    assert {p.name for p in made.iterdir()} == committed
    assert len(committed) == 14


@pytest.mark.parametrize("golden", [*CONTAINERS, *MANIFESTS], ids=lambda p: p.name)
def test_todays_writer_repeats_the_bytes(made: Path, golden: Path) -> None:
    assert (made / golden.name).read_bytes() == golden.read_bytes()


@pytest.mark.parametrize("golden", CONTAINERS, ids=lambda p: p.name)
def test_any_safetensors_reader_reads_the_same(golden: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    ours, metadata = _rust.open_tensors(golden, "open")
    theirs = load_file(golden)
    assert set(theirs) - {"pad"} == {*ours, "crc"}
    for name, (dtype, array) in ours.items():
        want = theirs[name]
        assert tuple(want.shape) == array.shape
        if dtype in ("BF16", "F16"):
            want = want.view(torch.uint16)
        assert want.numpy().tobytes() == array.tobytes(), name
        assert not array.flags.writeable
    assert metadata["version"] == "1"
    assert metadata["format"].startswith("embkit.")


@pytest.mark.parametrize("golden", CONTAINERS, ids=lambda p: p.name)
def test_checksums_are_what_the_specification_says(golden: Path) -> None:
    """The container read by the words of docs/formats.md alone."""
    data = golden.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    assert start % 4096 == 0
    header = json.loads(data[8:start])
    prefix = b'{"__metadata__":{"header_crc32c":"'
    assert data[8 : 8 + len(prefix)] == prefix
    at = 8 + len(prefix)
    blank = data[:at] + b"00000000" + data[at + 8 : start]
    assert data[at : at + 8].decode() == f"{_rust.crc32c(blank):08x}"
    crc = header["crc"]
    assert crc["data_offsets"][1] == len(data) - start
    body = data[start : start + crc["data_offsets"][0]]
    blocks = [_rust.crc32c(body[i : i + 65536]) for i in range(0, len(body), 65536)]
    assert np.frombuffer(data[start + len(body) :], "<u4").tolist() == blocks
    sizes = {"U8": 1, "U16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "F64": 8}
    order, end = [], 0
    for name, t in sorted(
        ((k, v) for k, v in header.items() if k != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    ):
        size = sizes[t["dtype"]]
        assert t["data_offsets"][0] == end
        assert end % size == 0
        end = t["data_offsets"][1]
        assert end - t["data_offsets"][0] == size * int(np.prod(t["shape"], dtype=np.int64))
        if name not in ("crc", "pad"):
            order.append((-size, name))
    assert order == sorted(order)
    assert _rust.file_info(golden) == {
        "length": len(data),
        "header_crc": _rust.crc32c(data[:start]),
        "crc_crc": _rust.crc32c(data[start + len(body) :]),
    }


@pytest.mark.parametrize("golden", CONTAINERS, ids=lambda p: p.name)
def test_a_newer_version_names_the_embkit_it_needs(golden: Path, tmp_path: Path) -> None:
    data = bytearray(golden.read_bytes())
    for old, new in ((b'"version":"1"', b'"version":"2"'), (b'"0.1.0"', b'"7.8.9"')):
        assert data.count(old) == 1
        data[data.index(old) : data.index(old) + len(old)] = new
    at, start = 42, 8 + int.from_bytes(data[:8], "little")
    data[at : at + 8] = b"00000000"
    data[at : at + 8] = f"{_rust.crc32c(bytes(data[:start])):08x}".encode()
    (tmp_path / "newer.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=re.escape("needs embkit 7.8.9")):
        _rust.open_tensors(tmp_path / "newer.safetensors")


@pytest.mark.parametrize("golden", MANIFESTS, ids=lambda p: p.name)
def test_manifests_are_pythons_canonical_json(golden: Path, tmp_path: Path) -> None:
    text = golden.read_text(encoding="utf-8")
    content = json.loads(_rust.read_manifest(golden))
    dumps = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    assert json.dumps(content, **dumps) + "\n" == text
    crc = content.pop("crc32c")
    assert crc == f"{_rust.crc32c(json.dumps(content, **dumps).encode()):08x}"
    _rust.write_manifest(tmp_path / "m", json.dumps({**content, "version": 2, "embkit": "7.8.9"}))
    with pytest.raises(FormatError, match=re.escape("needs embkit 7.8.9")):
        _rust.read_manifest(tmp_path / "m")
    (tmp_path / "m").write_text(text.replace("1", "2", 1), encoding="utf-8")
    with pytest.raises(CorruptError):
        _rust.read_manifest(tmp_path / "m")


def test_the_permutation_of_the_documentation_is_ours() -> None:
    source = re.search(
        r"```python\n(import numpy as np\n\ndef permute.*?)```",
        FORMATS.read_text("utf-8"),
        re.DOTALL,
    )
    assert source, "docs/formats.md lost its permute()"
    names: dict = {"np": np}
    exec(source.group(1), names)
    for n in (1, 2, 3, 5, 23, 1000, 2**33 + 7, 2**64 - 1):
        count = min(n, 500)
        for key in (0, 42, 2**64 - 1):
            start = (n - count) // 2
            want = names["permute"](n, key, start, count)
            assert want.dtype == np.uint64
            np.testing.assert_array_equal(_rust.permute(n, key, start, count), want)
    assert sorted(_rust.permute(1000, 9, 0, 1000).tolist()) == list(range(1000))


def test_every_format_is_documented() -> None:
    text = FORMATS.read_text("utf-8")
    for golden in CONTAINERS:
        tensors, metadata = _rust.open_tensors(golden)
        assert f"`{metadata['format']}`" in text
        if not golden.name.startswith("checkpoint"):
            for name, (dtype, _) in tensors.items():
                assert re.search(rf"`{name}` \|[^|\n]*{dtype}", text), (golden.name, name, dtype)
    for golden in MANIFESTS:
        assert f"`{json.loads(golden.read_text('utf-8'))['format']}`" in text
