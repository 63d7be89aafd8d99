"""What is trained: frozen parts, adapters, projections, and the soft mask's opening."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import backbone
from tokenizers import Tokenizer

from embkit import recipe
from embkit.errors import UsageError
from embkit.model import Encoder, Tuning, check_export
from embkit.model.attention import soft_mask
from embkit.model.projection import new_projection, seeded

from .test_families import batch, encoder_of, unit

LORA = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not LORA, reason="peft is not installed")


def one_step(encoder: Encoder, *, rate: float = 0.05) -> set[str]:
    """Train a little; names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    _, _, flat, bounds = batch()
    moving = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=rate)
    for _ in range(2):  # adapters start at zero: the second step moves their first factor too
        out = torch.nn.functional.normalize(encoder.packed(flat, bounds), dim=1)
        (out @ out.T).tanh().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        (("backbone",), lambda n: n.startswith("backbone.")),
        (("embeddings",), lambda n: "embed" in n),
        (("layers:1",), lambda n: ".0." in n and n.startswith("backbone.")),
        (("embeddings", "layers:2"), lambda n: "embed" in n or ".0." in n or ".1." in n),
        (("projection",), lambda n: n.startswith("projection")),
        (("*norm*",), lambda n: "norm" in n),
    ],
)
def test_frozen_parts_stay(freeze: tuple[str, ...], still: Any, tokenizer: Tokenizer) -> None:
    for family in ("bert", "qwen3"):
        part = tuple("*LayerNorm*" if family == "bert" and f == "*norm*" else f for f in freeze)
        encoder = encoder_of(
            family, tokenizer, dims=(40,), projection=new_projection(32, 40),
            tuning=Tuning(freeze=part),
        ).train()  # fmt: skip
        named = dict(encoder.named_parameters())
        kept = {n for n in named if still(n if family == "qwen3" else n.replace("LayerN", "n"))}
        assert kept and {n for n, p in named.items() if not p.requires_grad} == kept
        moved = one_step(encoder)
        assert not moved & kept and len(moved) >= 0.8 * (len(named) - len(kept)), part


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        ({"freeze": ("bakbone",)}, "no part and matches no parameter"),
        ({"freeze": ("layers:3",)}, "2 blocks"),
        ({"freeze": ("layers:0",)}, "2 blocks"),
        ({"freeze": ("projection",)}, "matches no parameter"),
        ({"freeze": ("backbone",)}, "nothing is left to train"),
    ],
)
def test_wrong_parts(tuning: dict[str, Any], says: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=says):
        encoder_of("bert", tokenizer, tuning=Tuning(**tuning))


def test_what_is_trained_travels_with_the_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tuning = Tuning(freeze=("embeddings", "layers:1"), gradient_checkpointing=True)
    encoder = encoder_of("bert", tokenizer, tuning=tuning)
    back = Encoder.from_pretrained(encoder.export(tmp_path / "m"))
    assert back.tuning == tuning and back.digest() == encoder.digest()
    names = [n for n, p in back.named_parameters() if not p.requires_grad]
    assert names == [n for n, p in encoder.named_parameters() if not p.requires_grad] != []
    assert encoder_of("bert", tokenizer).digest() != encoder.digest()
    assert Encoder.from_pretrained(tmp_path / "m", tuning=Tuning()).tuning == Tuning()


def test_two_layers_between_pooling_and_embedding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    model = recipe.Model(
        hidden=32, layers=1, heads=2, intermediate=48, dims=(24, 8), projection_hidden=96
    )
    encoder = Encoder.from_config(model, tokenizer).eval()
    shapes = [tuple(p.shape) for n, p in encoder.named_parameters() if n.startswith("projection")]
    assert shapes == [(96, 32), (24, 96)]  # EmbeddingGemma: 768 -> 3072 -> 768, no bias between
    flat = encoder.encode(texts, normalize=False)
    one = encoder.projection[1].weight @ encoder.projection[0].weight
    encoder.projection = torch.nn.Linear(32, 24, bias=False)
    encoder.projection.weight.data.copy_(one)
    assert np.abs(encoder.encode(texts, normalize=False) - flat).max() < 1e-5
    encoder = Encoder.from_config(model, tokenizer).eval()
    out = encoder.export(tmp_path / "m")
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"1_Pooling", "2_Dense", "3_Dense"}
    back = Encoder.from_pretrained(out)
    assert back.digest() == encoder.digest()
    assert np.array_equal(back.encode(texts), encoder.encode(texts))
    difference = check_export(encoder, out, texts)
    assert difference is None or difference <= 2e-6
    # A new head on a loaded model comes from the seed alone.
    heads = [
        Encoder.from_pretrained(out, new_head=True, projection_hidden=64, seed=s) for s in (1, 1, 2)
    ]
    assert heads[0].projection[0].weight.shape == (64, 32)
    assert heads[0].digest() == heads[1].digest() != heads[2].digest()


def test_initial_rows_have_about_unit_norm() -> None:
    with seeded(0):
        for layer in new_projection(768, 768, between=3072):
            assert (layer.weight.norm(dim=1) - 1).abs().max() < 0.2 and layer.bias is None


# ---------------------------------------------------------------- soft mask


def naive_soft_mask(lengths: list[int], size: int, alpha: float, left: bool) -> torch.Tensor:
    """M by its formula, i and j from 1 within the text; 0 at padding."""
    out = torch.zeros(len(lengths), size, size, dtype=torch.float64)
    for b, length in enumerate(lengths):
        first = size - length if left else 0
        for i in range(1, length + 1):
            for j in range(1, length + 1):
                value = 1.0 if j <= i else min(alpha * length / i, 1.0)
                out[b, first + i - 1, first + j - 1] = value
    return out


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.37, 1.0])
def test_soft_mask_is_the_formula(alpha: float, left: bool) -> None:
    lengths, size = [1, 4, 7], 7
    _, real, _, _ = batch(tuple(lengths), left=left)
    allowed = (real != 0)[:, None, None, :].expand(-1, 1, size, -1)
    got = soft_mask(allowed, real, alpha, torch.float32)
    want = naive_soft_mask(lengths, size, alpha, left)
    rows = real != 0
    assert torch.allclose(got[:, 0].exp().double()[rows], want[rows], rtol=1e-6, atol=0)
    if alpha == 1.0:
        assert (got[:, 0][rows] == want[rows].log().clamp(min=torch.finfo(got.dtype).min)).all()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2-window"])
def test_opening_goes_from_causal_to_bidirectional(family: str, tokenizer: Tokenizer) -> None:
    wide = {"changes": {"sliding_window": 40}}  # the two-sided window is not the one-sided one
    ids, mask, _, _ = batch()
    causal = encoder_of(family, tokenizer, **wide)
    done = encoder_of(family, tokenizer, bidirectional=True, **wide)
    soft = encoder_of(family, tokenizer, bidirectional=True, soft_mask_steps=4, **wide)
    ends = unit(causal(ids, mask)), unit(done(ids, mask))
    assert soft.opening == 0 and (unit(soft(ids, mask)) - ends[0]).abs().max() < 2e-6
    seen = []
    for step in range(6):
        soft.begin_step(step)
        assert soft.opening == min((step + 1) / 4, 1) and soft.can_pack == (step >= 3)
        seen.append(unit(soft(ids, mask)))
    assert torch.equal(seen[3], ends[1]) and torch.equal(seen[5], ends[1])
    distance = [float((s - ends[1]).norm()) for s in (ends[0], *seen[:4])]
    assert distance == sorted(distance, reverse=True) and len(set(distance)) == 5
    soft.begin_step(1)  # a function of the step: going back gives the same bits
    assert torch.equal(unit(soft(ids, mask)), seen[1])
    with pytest.raises(UsageError, match="soft mask is open"):
        soft.packed(ids[0], torch.tensor([0, 5]))


def test_soft_mask_gives_gradients_in_recomputed_blocks(tokenizer: Tokenizer) -> None:
    ids, mask, _, _ = batch()
    grads = []
    for again in (False, True):
        encoder = encoder_of(
            "llama", tokenizer, bidirectional=True, soft_mask_steps=4,
            tuning=Tuning(gradient_checkpointing=again),
        ).train()  # fmt: skip
        encoder.begin_step(0)
        encoder(ids, mask).square().sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads[0])


def test_an_unfinished_opening_reloads_exactly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["w1 w2 w3 w4", "w5 w6"]
    encoder = encoder_of("llama", tokenizer, bidirectional=True, soft_mask_steps=10)
    for step in (None, 3, 9):
        if step is not None:
            encoder.begin_step(step)
        out = encoder.export(tmp_path / f"m{step}")
        back = Encoder.from_pretrained(out)
        assert back.opening == encoder.opening and back.digest() == encoder.digest()
        assert np.array_equal(back.encode(texts), encoder.encode(texts))
        assert ("Unfinished" in (out / "README.md").read_text()) == (step != 9)
    assert back.soft_mask_steps == 0 and back.bidirectional  # a next stage starts open
    encoder = encoder_of("llama", tokenizer, bidirectional=True, soft_mask_steps=10)
    encoder.check_steps(10)
    with pytest.raises(UsageError, match="opens over 10 steps, and 9 are trained"):
        encoder.check_steps(9)
    back.check_steps(1)
    with pytest.raises(UsageError, match="bidirectional = true"):
        encoder_of("llama", tokenizer, soft_mask_steps=3)


# ---------------------------------------------------------------- LoRA


@needs_peft
@pytest.mark.parametrize("family", ["bert", "modernbert", "gemma3"])
def test_adapters_train_alone_and_merge(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
    tuning = Tuning(lora=3, seed=4, freeze=("projection",))
    plain = encoder_of(family, tokenizer, dims=(40,), projection=new_projection(32, 40))
    encoder = Encoder(
        copy.deepcopy(plain.backbone), tokenizer, dims=(40,), tuning=tuning,
        projection=copy.deepcopy(plain.projection), max_length=plain.max_length,
    ).eval()  # fmt: skip
    assert np.array_equal(encoder.encode(texts), plain.encode(texts))  # an adapter starts at zero
    moved = one_step(encoder.train())
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert moved == trained and all(".lora_" in n for n in moved)
    assert len(moved) == 2 * sum(isinstance(m, torch.nn.Linear) for m in _linears(plain))
    encoder.eval()
    before = encoder.encode(texts)
    assert np.abs(before - plain.encode(texts)).max() > 1e-3
    out = encoder.export(tmp_path / "m")
    difference = check_export(encoder, out, texts)
    assert difference is None or difference <= 2e-6
    back = Encoder.from_pretrained(out)
    assert back.digest() == encoder.digest() and back.tuning == tuning
    assert np.abs(back.encode(texts) - before).max() <= 2e-6
    encoder.finish()  # the same encoder as the export's: a next stage starts from the same bits
    assert encoder.digest() == back.digest()
    state, other = encoder.state_dict(), back.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    assert [p.requires_grad for p in encoder.parameters()] == [
        p.requires_grad for p in back.parameters()
    ]
    again = Encoder.from_pretrained(back.export(tmp_path / "n"))
    assert again.digest() == back.digest()


@needs_peft
def test_adapters_where_asked(tokenizer: Tokenizer) -> None:
    tuning = Tuning(lora=2, lora_targets=("q_proj", "v_proj"), lora_alpha=5.0)
    encoder = encoder_of("llama", tokenizer, tuning=tuning)
    names = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert len(names) == 8 and all("q_proj" in n or "v_proj" in n for n in names)
    scale = encoder.backbone.layers[0].self_attn.q_proj.scaling["default"]
    assert scale == 2.5
    with pytest.raises(UsageError, match=r"'q_porj'; did you mean 'q_proj'"):
        encoder_of("llama", tokenizer, tuning=Tuning(lora=2, lora_targets=("q_porj",)))


def test_without_peft_lora_says_what_to_install(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of None fails
    with pytest.raises(UsageError, match=r"embkit\[lora\]"):
        encoder_of("bert", tokenizer, tuning=Tuning(lora=2))


def _linears(encoder: Encoder) -> Any:
    from embkit.model.convert import blocks

    return blocks(encoder.backbone).modules()


# ---------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bidirectional": True}, "there is no model.path"),
        ({"keep_layers": 2}, "there is no model.path"),
        ({"new_head": True}, "there is no model.path"),
        ({"path": "m", "keep_layers": -1}, "keep_layers = -1 is negative"),
        ({"path": "m", "soft_mask_steps": 9}, "set bidirectional = true"),
        ({"lora": -2}, "lora = -2 is negative"),
        ({"lora_dropout": 1.0}, "is no share"),
        ({"include_prompt": False, "pooling": "cls"}, "only pooling"),
        ({"freezes": ["backbone"]}, "did you mean 'freeze'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.from_table({"model": settings})
    assert says in str(caught.value)


def test_a_recipe_makes_what_it_says(
    tokenizer: Tokenizer, tmp_path: Path, make_encoder: Callable[..., Encoder]
) -> None:
    from embkit.pipeline import start_encoder

    encoder_of("llama", tokenizer).export(tmp_path / "base")
    table = {
        "path": str(tmp_path / "base"), "dims": [48, 16], "new_head": True, "keep_layers": 1,
        "projection_hidden": 64, "bidirectional": True, "soft_mask_steps": 5, "pooling": "last",
        "freeze": ["embeddings"], "gradient_checkpointing": True, "seed": 3,
    }  # fmt: skip
    made = start_encoder(recipe.from_table({"model": table}), None)
    assert made.bidirectional and made.opening == 0 and made.pooling == "last"
    assert made.dims == (48, 16) and made.backbone.config.num_hidden_layers == 1
    assert made.projection[0].weight.shape == (64, 32)
    assert made.tuning == Tuning(freeze=("embeddings",), gradient_checkpointing=True, seed=3)
    # A stage that starts from a trained model keeps what was made of it, and trains as the recipe.
    trained = made.export(tmp_path / "trained")
    made.begin_step(4)
    trained = made.export(tmp_path / "trained")
    next_stage = start_encoder(recipe.from_table({"model": table}), None, model=str(trained))
    assert next_stage.digest() == made.digest() and next_stage.opening == 1


def test_families_export_exactly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Bidirectional exports are what plain sentence-transformers computes from config.json."""
    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12", ""]
    for family in ("xlm-roberta", "modernbert", "llama", "mistral", "gemma3"):
        two_way = family in ("llama", "mistral", "gemma3")
        for pooling in ("mean", "last"):
            encoder = encoder_of(family, tokenizer, pooling=pooling, bidirectional=two_way)
            out = encoder.export(tmp_path / family / pooling)
            back = Encoder.from_pretrained(out)
            assert back.digest() == encoder.digest() and back.bidirectional
            assert np.array_equal(back.encode(texts), encoder.encode(texts)), family
            difference = check_export(encoder, out, texts)
            assert difference is None or difference <= 2e-6, (family, pooling)
            assert ("## Attention" in (out / "README.md").read_text()) == two_way
    causal = encoder_of("llama", tokenizer)
    assert np.abs(causal.encode(texts) - encoder_of("llama", tokenizer, bidirectional=True).encode(
        texts)).max() > 1e-3  # fmt: skip
    assert not Encoder.from_pretrained(causal.export(tmp_path / "causal")).bidirectional
    assert backbone("llama").config._attn_implementation == "sdpa"  # registered, not imposed
