"""Every model family: direction of attention, packed against padded, padding on either side."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS, ENCODERS, FAMILIES, backbone
from tokenizers import Tokenizer

from embkit.errors import UsageError
from embkit.model import Encoder, attention, check_export
from embkit.model.convert import is_causal, keep_layers, make_bidirectional, sees_later_tokens

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
ROUNDING = 2e-6  # of unit embeddings in fp32
LENGTHS = (5, 12, 1, 9, 9, 2, 17, 9)


def encoder_of(family: str, tokenizer: Tokenizer, **settings: Any) -> Encoder:
    changes = settings.pop("changes", {})
    given = {"dims": (32, 8), "max_length": {"query": 20, "passage": 20}, **settings}
    return Encoder(backbone(family, **changes), tokenizer, **given).eval()


def batch(lengths: tuple[int, ...] = LENGTHS, *, left: bool = False) -> tuple[torch.Tensor, ...]:
    """Ids and mask [B, L], and the same packed: ids [T] and cu_seqlens. Ids 5 and up, padding 1."""
    draw = np.random.default_rng(3)
    rows = [torch.from_numpy(draw.integers(5, 60, n)) for n in lengths]
    ids = torch.full((len(rows), max(lengths)), 1)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(ids.shape[1] - len(row), None) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return ids, mask, torch.cat(rows), bounds


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.detach(), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str, tokenizer: Tokenizer) -> None:
    """Embeddings and gradients of every parameter, causal and bidirectional, windows included."""
    ids, mask, flat, bounds = batch()
    weights = torch.randn(len(LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    for bidirectional in (False, True) if family in DECODERS else (False,):
        for pooling in ("mean", "cls", "last"):
            encoder = encoder_of(family, tokenizer, pooling=pooling, bidirectional=bidirectional)
            assert encoder.can_pack
            padded, packed = encoder(ids, mask), encoder.packed(flat, bounds)
            assert (unit(padded) - unit(packed)).abs().max() < ROUNDING, pooling
            if pooling != "mean":
                continue
            grads = []
            for out in (padded, packed):
                encoder.zero_grad()
                (torch.nn.functional.normalize(out, dim=1) * weights).sum().backward()
                grads.append([p.grad.clone() for p in encoder.parameters()])
            for one, two in zip(*grads, strict=True):
                assert (one - two).norm() <= 2e-5 * one.norm() + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_pack_do_not_see_each_other(family: str, tokenizer: Tokenizer) -> None:
    encoder = encoder_of(family, tokenizer, bidirectional=family in DECODERS)
    _, _, flat, bounds = batch()
    whole = encoder.packed(flat, bounds)
    changed = flat.clone()
    changed[bounds[3] : bounds[4]] = 60
    other = encoder.packed(changed, bounds)
    moved = (whole - other).abs().amax(1) > 0
    assert moved.tolist() == [i == 3 for i in range(len(LENGTHS))]
    for i in (0, 6):
        alone = encoder.packed(flat[bounds[i] : bounds[i + 1]], torch.tensor([0, LENGTHS[i]]))
        assert (unit(alone) - unit(whole[i : i + 1])).abs().max() < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_one_switch_decides_what_tokens_see(family: str) -> None:
    """With it a token's state depends on every later one, without it on none; earlier ones count
    always. Both with and without padding in the batch: the two take different masks."""
    model = backbone(family, sliding_window=40) if family in DECODERS else backbone(family)
    plain = copy.deepcopy(model)
    assert is_causal(model) == (family in DECODERS)
    ids, mask, _, _ = batch((9, 9))
    for switched in (False, True):
        if switched:
            make_bidirectional(model)
            make_bidirectional(model)  # a second time changes nothing
        later = switched or family in ENCODERS
        assert is_causal(model) != later and sees_later_tokens(model) == later
        for padding in (0, 2):
            kept = mask.clone()
            kept[1, 9 - padding :] = 0
            last = 8 - padding
            edited = ids.clone()
            edited[1, last] = (ids[1, last] + 7) % 50 + 5
            with torch.no_grad():
                before, after = (
                    model(input_ids=i, attention_mask=kept).last_hidden_state[1, : last + 1]
                    for i in (ids, edited)
                )
                if not switched:
                    hf = plain(input_ids=ids, attention_mask=kept).last_hidden_state[1, : last + 1]
                    assert torch.equal(before, hf)  # off is the model as it was
            moved = (before - after).abs().amax(1) > 0
            assert moved.tolist() == [later] * last + [True], (switched, padding)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("bert", "xlm-roberta")])
def test_padding_may_be_on_the_left(family: str, tokenizer: Tokenizer) -> None:
    for pooling in ("mean", "last", "cls"):
        encoder = encoder_of(family, tokenizer, pooling=pooling, bidirectional=family in DECODERS)
        ids, mask, _, _ = batch()
        right = encoder(ids, mask)
        ids, mask, _, _ = batch(left=True)
        assert (unit(right) - unit(encoder(ids, mask))).abs().max() < ROUNDING


def test_padding_on_the_left_of_a_position_table(tokenizer: Tokenizer) -> None:
    for family in ("bert", "xlm-roberta"):
        encoder = encoder_of(family, tokenizer, pooling="last")
        ids, mask, _, _ = batch()
        right = encoder(ids, mask)
        ids, mask, _, _ = batch(left=True)
        assert (unit(right) - unit(encoder(ids, mask))).abs().max() < ROUNDING


@pytest.mark.parametrize("family", ["modernbert", "mistral", "gemma3", "qwen2-window"])
def test_windows_are_those_of_the_family(family: str) -> None:
    """The window read from the model's mask rule against what its first layer lets through."""
    for bidirectional in (False, True) if family in DECODERS else (False,):
        model = backbone(family, layers=1)
        if bidirectional:
            make_bidirectional(model)
        size, at = 17, 8
        with torch.no_grad():
            ids = torch.full((1, size), 9)
            mask = torch.ones_like(ids)
            base = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, at]
            seen = []
            for place in range(size):
                edited = ids.clone()
                edited[0, place] = 30
                other = model(input_ids=edited, attention_mask=mask).last_hidden_state[0, at]
                seen.append(bool((base != other).any()))
        left, right = sum(seen[:at]), sum(seen[at + 1 :])
        assert 0 < left < at and (right > 0) == (bidirectional or family == "modernbert")
        found: list[attention.Window] = []
        attention.use(model)
        real = attention.window

        def spy(*arguments: Any) -> attention.Window:
            found.append(real(*arguments))  # noqa: B023
            return found[-1]  # noqa: B023

        attention.window = spy
        try:
            with torch.no_grad(), attention.packed(size):
                model(
                    input_ids=ids, attention_mask=mask.bool(), max_length_q=size,
                    position_ids=torch.arange(size)[None],
                    cu_seq_lens_q=torch.tensor([0, size], dtype=torch.int32),
                )  # fmt: skip
        finally:
            attention.window = real
        assert (left, right) in [tuple(w) for w in found], (found, bidirectional)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_capped_scores_are_those_of_the_eager_model(
    bidirectional: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Gemma 2 with a low cap: states and gradients, padded and packed, and the export's."""
    changes = {"attn_logit_softcapping": 2.0}
    encoder = encoder_of("gemma2", tokenizer, changes=changes, bidirectional=bidirectional)
    plain = backbone("gemma2", **changes)
    plain.set_attn_implementation("eager")
    if bidirectional:
        make_bidirectional(plain)
    for left in (False, True):
        ids, mask, flat, bounds = batch(left=left)
        real = mask.bool()
        models = (encoder.backbone, plain)
        states = [m(input_ids=ids, attention_mask=mask).last_hidden_state[real] for m in models]
        assert (states[0] - states[1]).abs().max() < 1e-5 * states[1].abs().max()
    states = [
        m(input_ids=ids[:1], attention_mask=mask[:1]).last_hidden_state[real[:1]] for m in models
    ]
    assert (states[0] - states[1]).abs().max() < 1e-5 * states[1].abs().max()
    for one in states:
        one.square().sum().backward()
    for got, want in zip(*(m.parameters() for m in models), strict=True):
        assert (got.grad - want.grad).norm() <= 1e-4 * want.grad.norm() + 1e-6
    ids, mask, flat, bounds = batch()
    packed = unit(encoder.packed(flat, bounds))
    assert (packed - unit(encoder(ids, mask))).abs().max() < ROUNDING
    assert encoder.can_pack and not encoder.packs_fast
    free = encoder_of("gemma2", tokenizer, bidirectional=bidirectional)
    assert (packed - unit(free(ids, mask))).abs().max() > 1e-2, "the cap is seen"
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12"]
    out = encoder.export(tmp_path / "model")
    assert np.array_equal(Encoder.from_pretrained(out).encode(texts), encoder.encode(texts))
    difference = check_export(encoder, out, texts)
    assert difference is None or difference <= 2e-6


def test_a_mask_that_is_no_window_is_refused() -> None:
    def chunks(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q // 4 == k // 4) & (k <= q)

    def holes(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q - k) % 2 == 0

    for rule in (chunks, holes):
        with pytest.raises(UsageError, match="not one window"):
            attention.window(rule, 9)


def test_packed_input_that_cannot_be(tokenizer: Tokenizer) -> None:
    import transformers as hf

    config = hf.MPNetConfig(
        vocab_size=66, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    other = Encoder(hf.MPNetModel(config, add_pooling_layer=False), tokenizer, dims=(32,)).eval()
    ids, mask, flat, bounds = batch()
    assert not other.can_pack and other(ids, mask).shape == (8, 32)
    with pytest.raises(UsageError, match="MPNetModel takes no packed input"):
        other.packed(flat, bounds)
    with pytest.raises(UsageError, match="attention_mask"):
        other(ids)


def test_empty_rows_are_zero(tokenizer: Tokenizer) -> None:
    for pooling in ("mean", "cls", "last"):
        encoder = encoder_of("llama", tokenizer, pooling=pooling)
        _, _, flat, _ = batch((4, 3))
        out = encoder.packed(flat, torch.tensor([0, 0, 4, 4, 7, 7], dtype=torch.int32))
        norms = out.norm(dim=1)
        assert (norms[[0, 2, 4]] == 0).all() and (norms[[1, 3]] > 0).all()


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_recomputation_and_dropout_in_packed_blocks(family: str, tokenizer: Tokenizer) -> None:
    """Gradient checkpointing runs the blocks again after the forward's masks are gone."""
    from embkit.model import Tuning

    _, _, flat, bounds = batch()
    grads = []
    for again in (False, True):
        tuning = Tuning(gradient_checkpointing=again)
        changes = {"attention_probs_dropout_prob": 0.2} if family == "bert" else {}
        encoder = encoder_of(family, tokenizer, tuning=tuning, changes=changes).train()
        torch.manual_seed(5)
        encoder.packed(flat, bounds).square().sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", FAMILIES if FULL else ("bert", "modernbert", "qwen3", "gemma3"))
def test_keep_layers_is_the_lower_part(family: str) -> None:
    """The bottom blocks of a deeper model, with its final norm, give its lower states."""
    model = backbone(family, layers=3)
    ids, mask, _, _ = batch()
    with torch.no_grad():
        deep = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        keep_layers(model, 2)
        cut = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    norm = getattr(model, "norm", None) or getattr(model, "final_norm", None) or torch.nn.Identity()
    with torch.no_grad():
        assert torch.equal(cut.last_hidden_state, norm(deep.hidden_states[2]))
    assert model.config.num_hidden_layers == 2
    for wrong in (0, 3):
        with pytest.raises(UsageError, match="2 blocks"):
            keep_layers(model, wrong)


def test_switching_fails_loudly_where_it_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, make_encoder: Callable[..., Encoder]
) -> None:
    from embkit.model import convert

    monkeypatch.setattr(convert, "sees_later_tokens", lambda _: False)
    with pytest.raises(UsageError, match="keeps LlamaModel causal"):
        make_bidirectional(backbone("llama"))
