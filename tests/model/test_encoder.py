"""Encoder: pooling and projection against plain loops, order, padding, widths, prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embkit.errors import UsageError
from embkit.model import Encoder
from embkit.model.encoder import micro_batches
from embkit.model.tokens import TextTokenizer, load_tokenizer

TOLERANCE = 2e-6


def naive(encoder: Encoder, text: str, length: int, skip: int = 0) -> np.ndarray:
    """One text without padding: backbone, a loop over tokens, the projection as a product."""
    flat, _ = encoder.tokenizer.ids([text], max_length=length)
    ids = torch.from_numpy(flat)[None]
    with torch.no_grad():
        states = encoder.backbone(input_ids=ids).last_hidden_state[0].double()
        if encoder.pooling == "cls":
            pooled = states[0]
        elif encoder.pooling == "last":
            pooled = states[-1]
        else:
            pooled = torch.zeros(states.shape[1], dtype=torch.float64)
            for state in states[skip:]:
                pooled += state / (len(states) - skip)
        if encoder.projection is not None:
            pooled = encoder.projection.weight.double() @ pooled
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("projection", [True, False])
def test_encode_equals_loop(
    make_encoder: Callable[..., Encoder], texts: list[str], pooling: str, projection: bool
) -> None:
    dims = (48, 16) if projection else (32, 16)
    encoder = make_encoder(pooling=pooling, projection=projection, dims=dims)
    got = encoder.encode(texts)
    want = np.stack([naive(encoder, t, 20) for t in texts])
    assert got.shape == (8, dims[0]) and got.dtype == np.float32
    assert np.abs(got - want).max() < TOLERANCE
    assert np.abs(got[0] - got[4]).max() < TOLERANCE and np.abs(got[0] - got[6]).max() > 0.01


def test_order_and_batching_do_not_matter(
    make_encoder: Callable[..., Encoder], texts: list[str]
) -> None:
    encoder = make_encoder()
    whole = encoder.encode(texts)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 1, 4, 0, 5, 2, 6, 7]):
        part = encoder.encode([texts[i] for i in order], token_budget=30)
        assert np.abs(part - whole[order]).max() < TOLERANCE
    seen: list[int] = []
    encoder.encode(texts, token_budget=25, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 8
    assert encoder.encode([]).shape == (0, 48)


def test_widths_are_cut_before_normalising(
    make_encoder: Callable[..., Encoder], texts: list[str]
) -> None:
    encoder = make_encoder()
    raw = encoder.encode(texts, normalize=False)
    for dim in (1, 8, 16, 31, 48):
        want = raw[:, :dim] / np.linalg.norm(raw[:, :dim], axis=1, keepdims=True)
        assert np.abs(encoder.encode(texts, dim=dim) - want).max() < TOLERANCE
    assert encoder.dims == (48, 16, 8) and encoder.width == 48


def test_roles_use_their_prompt_and_length(make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder(prompts={"query": "w50 : ", "passage": "w51 : "})
    long = " ".join(f"w{i}" for i in range(30))
    for role, prompt, length in (("query", "w50 : ", 8), ("passage", "w51 : ", 20)):
        want = naive(encoder, prompt + long, length)
        assert np.abs(encoder.encode([long], role=role)[0] - want).max() < TOLERANCE
    assert np.abs(encoder.encode([long])[0] - naive(encoder, long, 20)).max() < TOLERANCE


def test_prompt_can_be_left_out_of_the_mean(make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder(prompts={"query": "w50 :", "passage": ""})
    encoder.include_prompt = False
    assert encoder.tokenizer.prompt_length("w50 :") == 3  # [CLS] w50 :
    got = encoder.encode(["w1 w2", "w3"], role="query")
    want = np.stack([naive(encoder, f"w50 : {t}", 8, skip=3) for t in ("w1 w2", "w3")])
    assert np.abs(encoder.encode([" w1 w2", " w3"], role="query") - want).max() < TOLERANCE
    encoder.include_prompt = True
    assert np.abs(encoder.encode(["w1 w2", "w3"], role="query") - got).max() > 1e-3


def test_initialisation_comes_from_its_seed_alone(make_encoder: Callable[..., Encoder]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_encoder(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert make_encoder(seed=3).digest() == first.digest()
    assert make_encoder(seed=4).digest() != first.digest()


def test_digest_covers_weights_and_settings(make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder()
    other = copy.deepcopy(encoder)
    assert other.digest() == encoder.digest() and other.tokenizer is encoder.tokenizer
    with torch.no_grad():
        other.projection.weight[0, 0] += 1e-6
    assert other.digest() != encoder.digest()
    other = copy.deepcopy(encoder)
    other.pooling = "cls"
    assert other.digest() != encoder.digest()


def test_fingerprint_ignores_truncation_and_padding(tokenizer: object) -> None:
    plain = TextTokenizer(tokenizer)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding()
    again = TextTokenizer(tokenizer)
    assert again.fingerprint == plain.fingerprint and again.vocab_size == 66
    _, offsets = again.ids(["w1 " * 30, "w1"], max_length=12)
    assert offsets.tolist() == [0, 12, 15]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"role": "document"}, "document"),
        ({"dim": 0}, "0"),
        ({"dim": 49}, "49"),
    ],
)
def test_bad_arguments(
    make_encoder: Callable[..., Encoder], arguments: dict[str, object], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        make_encoder().encode(["w1"], **arguments)


def test_bad_settings(make_encoder: Callable[..., Encoder], tmp_path: object) -> None:
    with pytest.raises(UsageError, match="list of texts"):
        make_encoder().encode("w1")
    with pytest.raises(UsageError, match="width 32"):
        make_encoder(projection=False, dims=(64, 8))
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="No such tokenizer"):
        load_tokenizer(tmp_path / "absent.json")


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 120))
def test_micro_batches_take_each_row_once(lengths: list[int], budget: int) -> None:
    array = np.array(lengths, np.int64)
    cuts = list(micro_batches(array, budget))
    taken = np.concatenate([np.zeros(0, np.int64), *cuts])
    assert sorted(taken.tolist()) == list(range(len(lengths)))
    assert all(len(c) for c in cuts)
    falling = array[taken]
    assert (np.diff(falling) <= 0).all()
    for cut in cuts:
        assert len(cut) == 1 or len(cut) * max(int(array[cut].max()), 1) <= budget
