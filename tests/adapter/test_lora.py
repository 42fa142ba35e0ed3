"""Fold and the plain LoRA form: W0 + b a - P Q is W0 - tail + s B diag(d) A, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter.making import ALL_LINEAR, LAYER, make_adapter
from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
from kasa_runtime.adapter.kasa import TruncationRule, compute_tail, merged_weight
from kasa_runtime.adapter.lora import (
    Adapter,
    AdapterWeights,
    ModuleWeights,
    fold,
    is_finite,
    plain_lora,
)
from kasa_runtime.errors import AdapterInvalid


def one_layer(weights: ModuleWeights, t: int = 0, **config: object) -> Adapter:
    r = weights.a.shape[0]
    return Adapter(
        AdapterConfig(r, config.pop("alpha", 2.0 * r), ("q_proj",), **config),
        AdapterMeta(TruncationRule.MIN_DIM),
        {LAYER: weights},
        {LAYER: t},
    )


def weights(out_f: int, in_f: int, r: int, seed: int, diag: bool = True) -> ModuleWeights:
    draw = torch.Generator().manual_seed(seed)
    return ModuleWeights(
        torch.randn(r, in_f, generator=draw),
        torch.randn(out_f, r, generator=draw),
        torch.randn(r, generator=draw) if diag else None,
    )


def reference(w0: torch.Tensor, w: ModuleWeights, scaling: float, t: int) -> torch.Tensor:
    """W0 - tail + s B diag(d) A, in float64, straight from the definition."""
    u, s, vh = torch.linalg.svd(w0.double(), full_matrices=False)
    cut = len(s) - t
    d = torch.ones(w.a.shape[0]) if w.diag is None else w.diag
    update = w.b.double() @ torch.diag(d.double()) @ w.a.double()
    return (u[:, :cut] * s[:cut]) @ vh[:cut] + scaling * update


class TestFold:
    def test_an_alpha_that_overflows_float32_is_refused(self):
        adapter = one_layer(weights(6, 5, 2, seed=0), alpha=1e39)
        with pytest.raises(AdapterInvalid, match="lora_alpha"):
            fold(adapter, "a@1")

    @given(st.integers(2, 20), st.integers(2, 20), st.data())
    def test_all_three_forms_are_the_same_weight(self, out_f, in_f, data):
        k = min(out_f, in_f)
        r = data.draw(st.integers(1, k), label="r")
        t = data.draw(st.integers(0, k - 1), label="t")
        use_rslora = data.draw(st.booleans(), label="use_rslora")
        alpha = data.draw(st.floats(-32, 32), label="alpha")
        seed = data.draw(st.integers(0, 1000), label="seed")
        w = weights(out_f, in_f, r, seed, diag=data.draw(st.booleans(), label="diag"))
        w0 = torch.randn(out_f, in_f, generator=torch.Generator().manual_seed(seed + 1))

        adapter = one_layer(w, t, alpha=alpha, use_rslora=use_rslora)
        delta = fold(adapter, "x@1").modules[LAYER]
        tail = compute_tail(w0, k - 1)
        merged = merged_weight(w0, delta.a, delta.b, tail.last(t))
        a, b = plain_lora(delta, tail)

        want = reference(w0, w, alpha / (r**0.5 if use_rslora else r), t)
        scale = float(want.norm()) + 1
        assert float((merged.double() - want).norm()) < 1e-5 * scale
        assert float(((w0 + b @ a).double() - want).norm()) < 1e-5 * scale
        assert a.shape == (r + t, in_f) and b.shape == (out_f, r + t)

    @given(st.integers(2, 14), st.integers(2, 14), st.data())
    def test_forms_agree_where_the_tail_is_not_unique(self, out_f, in_f, data):
        """Equal and zero singular values, zero rows and zero learnable values: whatever tail is
        cut, merging it, subtracting it and folding it into a plain LoRA are the same."""
        k = min(out_f, in_f)
        r, t = data.draw(st.integers(1, k), label="r"), data.draw(st.integers(0, k - 1), label="t")
        seed = data.draw(st.integers(0, 1000), label="seed")
        rank = data.draw(st.integers(0, k), label="rank of the base")
        draw = torch.Generator().manual_seed(seed)
        u, _ = torch.linalg.qr(torch.randn(out_f, k, generator=draw))
        v, _ = torch.linalg.qr(torch.randn(in_f, k, generator=draw))
        w0 = u[:, :rank] @ v[:, :rank].T  # `rank` ones, the rest zeros
        w = weights(out_f, in_f, r, seed)
        w.diag[data.draw(st.integers(0, r - 1), label="zero")] = 0
        w.b[data.draw(st.integers(0, out_f - 1), label="row")] = 0

        delta = fold(one_layer(w, t), "x@1").modules[LAYER]
        tail = compute_tail(w0, k - 1)
        a, b = plain_lora(delta, tail)
        cut = tail.last(t)
        want = (w0 - cut.p @ cut.q).double() + 2 * (w.b * w.diag).double() @ w.a.double()
        scale = float(want.norm()) + 1
        merged = merged_weight(w0, delta.a, delta.b, cut)
        assert float((merged.double() - want).norm()) < 1e-5 * scale
        assert float(((w0 + b @ a).double() - want).norm()) < 1e-5 * scale
        left = torch.linalg.svdvals((w0 - cut.p @ cut.q).double())
        assert int((left > 1e-3).sum()) == min(rank, k - t)

    def test_diagonal_may_be_negative_or_zero(self):
        w = ModuleWeights(torch.eye(2, 3), torch.eye(4, 2), torch.tensor([-3.0, 0.0]))
        delta = fold(one_layer(w, alpha=2.0), "x@1").modules[LAYER]
        want = torch.zeros(4, 3)
        want[0, 0] = -3.0
        assert torch.equal(delta.b @ delta.a, want)

    def test_folds_the_diagonal_into_b_and_keeps_a(self):
        w = weights(8, 6, 3, seed=1)
        delta = fold(one_layer(w, alpha=6.0), "x@1").modules[LAYER]
        assert delta.a is w.a
        torch.testing.assert_close(delta.b, 2.0 * w.b @ torch.diag(w.diag))

    def test_leaves_the_adapter_as_it_was(self):
        w = weights(8, 6, 3, seed=1)
        before = w.b.clone()
        fold(one_layer(w), "x@1")
        assert torch.equal(w.b, before)

    def test_ignoring_the_tail_would_show(self):
        """The wrong conversion that method and peers warn of: d folded, tail forgotten."""
        w, w0 = weights(16, 16, 2, seed=1), torch.randn(16, 16)
        delta = fold(one_layer(w, 4), "x@1").modules[LAYER]
        tail = compute_tail(w0, 4)
        a, b = plain_lora(delta, tail)
        assert (b @ a - delta.b @ delta.a).abs().max() > 1e-2

    def test_patterns_give_each_layer_its_rank_and_scaling(self, base):
        adapter = make_adapter(
            base,
            ALL_LINEAR,
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
            alpha_pattern={"q_proj": 3.0, "layers.2.mlp.up_proj": 1.0},
        )
        folded = fold(adapter, "x@1")
        for name, delta in folded.modules.items():
            r = 2 if name.endswith("q_proj") else 6 if "1.mlp.up_proj" in name else 4
            alpha = 3 if name.endswith("q_proj") else 1 if "2.mlp.up_proj" in name else 8
            stored = adapter.modules[name]
            assert delta.rank == delta.t == r
            torch.testing.assert_close(delta.b, alpha / r * stored.b * stored.diag)
        assert folded.max_rank == folded.max_tail == 6

    def test_plain_lora_has_no_tail(self, base):
        folded = fold(make_adapter(base, ALL_LINEAR, kasa=False), "x@1")
        assert folded.max_tail == 0 and folded.max_rank == 4
        a, b = plain_lora(folded.modules[LAYER], compute_tail(base.weight(LAYER), 8))
        assert torch.equal(a, folded.modules[LAYER].a)
        assert torch.equal(b, folded.modules[LAYER].b)

    def test_uses_only_the_columns_of_its_own_truncation(self, base):
        delta = fold(make_adapter(base, r=2), "x@1").modules[LAYER]
        long, short = (compute_tail(base.weight(LAYER), t) for t in (9, 2))
        products = [b @ a for a, b in (plain_lora(delta, long), plain_lora(delta, short))]
        torch.testing.assert_close(*products, atol=1e-5, rtol=1e-5)

    def test_refuses_a_tail_that_is_too_short(self, base):
        delta = fold(make_adapter(base), "x@1").modules[LAYER]
        with pytest.raises(ValueError, match="want a tail of rank 4"):
            plain_lora(delta, compute_tail(base.weight(LAYER), 3))


class TestAdapterWeights:
    def test_size_is_that_of_a_lora_of_rank_r(self, base):
        folded = fold(make_adapter(base, r=4), "x@1")
        assert folded.size_bytes == 4 * (64 + 64) * 4
        assert folded.key == "x@1"

    def test_without_layers_has_no_rank(self):
        empty = AdapterWeights("x@1", {})
        assert (empty.max_rank, empty.max_tail, empty.size_bytes) == (0, 0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    x = torch.full((5, 7), 3e38)
    assert is_finite(x)
    x[3, 2] = value
    assert not is_finite(x)
    assert is_finite(x[:0])
