"""The maths against closed forms: tails against a full float64 SVD, truncation rules, merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kasa_runtime.adapter.kasa import (
    Tail,
    TruncationRule,
    compute_tail,
    merge_into,
    merged_weight,
    scaling,
    truncation_count,
)

SHAPES = [(24, 24), (16, 40), (40, 16)]
MIN_DIM, IN_FEATURES, NONE = TruncationRule.MIN_DIM, TruncationRule.IN_FEATURES, TruncationRule.NONE


def gaussian(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=draw)


def with_spectrum(out_features: int, in_features: int, values: list[float]) -> Tensor:
    """A float64 weight with these singular values and random singular vectors."""
    k = min(out_features, in_features)
    assert len(values) == k
    u, _ = torch.linalg.qr(gaussian(out_features, k, seed=1).double())
    v, _ = torch.linalg.qr(gaussian(in_features, k, seed=2).double())
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


@st.composite
def degenerate_weights(draw: st.DrawFn) -> tuple[Tensor, list[float]]:
    """A weight of any shape, and its singular values, descending: many of them equal or zero."""
    out_features, in_features = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    k = min(out_features, in_features)
    level = st.sampled_from([0.0, 0.0, 1e-3, 0.5, 1.0, 1.0, 3.0])
    values = sorted(draw(st.lists(level, min_size=k, max_size=k)), reverse=True)
    return with_spectrum(out_features, in_features, values), values


def assert_orthonormal_on_the_smaller_side(tail: Tail) -> None:
    unit = tail.p.T if tail.p.shape[0] <= tail.q.shape[1] else tail.q
    torch.testing.assert_close(unit @ unit.T, torch.eye(tail.rank), atol=1e-5, rtol=0)


def svd_tail(weight: Tensor, t: int) -> Tensor:
    """The reference: P Q by a full float64 SVD."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    cut = len(s) - t
    return (u[:, cut:] * s[cut:]) @ vh[cut:]


def product(tail: Tail) -> Tensor:
    return tail.p.double() @ tail.q.double()


@pytest.fixture
def count_svds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for every full SVD that compute_tail falls back to."""
    calls: list[int] = []
    svd = scipy.linalg.svd

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return svd(*args, **kwargs)

    monkeypatch.setattr(scipy.linalg, "svd", counted)
    return calls


class TestComputeTail:
    @pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
    @pytest.mark.parametrize("t", [1, 5, 15])
    def test_is_the_tail_of_a_full_svd(self, shape, t):
        weight = gaussian(*shape)
        tail = compute_tail(weight, t)
        want = svd_tail(weight, t)
        assert tail.p.shape == (shape[0], t) and tail.q.shape == (t, shape[1])
        assert (product(tail) - want).norm() <= 1e-6 * want.norm()

    @pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
    def test_gives_the_singular_values_largest_first(self, shape):
        weight = gaussian(*shape)
        want = torch.linalg.svdvals(weight.double())[-6:]
        torch.testing.assert_close(compute_tail(weight, 6).singular_values, want, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
    def test_smaller_side_is_orthonormal_and_the_other_carries_the_values(self, shape):
        tail = compute_tail(gaussian(*shape), 5)
        wide = shape[0] <= shape[1]
        unit, carrier = (tail.p.T, tail.q) if wide else (tail.q, tail.p.T)
        torch.testing.assert_close(unit @ unit.T, torch.eye(5), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            carrier.norm(dim=1).double(), tail.singular_values, rtol=1e-6, atol=0
        )

    @pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
    @pytest.mark.parametrize("t", [1, 3, 7])
    def test_smaller_rank_is_the_last_columns_of_a_larger_one(self, shape, t):
        weight = gaussian(*shape)
        nested, direct = compute_tail(weight, 8).last(t), compute_tail(weight, t)
        torch.testing.assert_close(product(nested), product(direct), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(nested.singular_values, direct.singular_values)
        assert nested.gap == pytest.approx(direct.gap, abs=1e-9)

    def test_does_not_depend_on_the_signs_of_the_vectors(self):
        weight = gaussian(16, 40)
        torch.testing.assert_close(
            product(compute_tail(-weight, 4)), -product(compute_tail(weight, 4))
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_takes_any_floating_dtype(self, dtype):
        weight = gaussian(16, 40).to(dtype)
        tail = compute_tail(weight, 4)
        assert tail.p.dtype == tail.q.dtype == torch.float32
        torch.testing.assert_close(product(tail), svd_tail(weight, 4), atol=1e-6, rtol=1e-5)

    def test_takes_a_view_and_leaves_it_as_it_was(self):
        weight = gaussian(40, 16)
        before = weight.clone()
        tail = compute_tail(weight.T, 4)
        torch.testing.assert_close(product(tail), svd_tail(before.T, 4), atol=1e-6, rtol=1e-5)
        assert torch.equal(weight, before)

    def test_rank_zero_is_empty(self):
        tail = compute_tail(gaussian(16, 40), 0)
        assert tail.p.shape == (16, 0) and tail.q.shape == (0, 40) and tail.gap == 1.0
        assert torch.equal(product(tail), torch.zeros(16, 40, dtype=torch.float64))

    @pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
    def test_refuses_to_cut_everything(self, shape):
        k = min(shape)
        compute_tail(gaussian(*shape), k - 1)
        for t in (k, k + 1, -1):
            with pytest.raises(ValueError, match=rf"from 0 to {k - 1} .*got {t}"):
                compute_tail(gaussian(*shape), t)

    @pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
    def test_ties_inside_the_tail_are_harmless(self, shape):
        weight = with_spectrum(*shape, [9, 8, 7, 6, 5, 2, 2, 2])
        torch.testing.assert_close(
            product(compute_tail(weight, 3)), svd_tail(weight, 3), atol=1e-6, rtol=1e-6
        )

    def test_tie_at_the_cut_still_leaves_a_best_approximation(self):
        weight = with_spectrum(8, 20, [9, 8, 7, 6, 2, 2, 2, 2])
        rest = torch.linalg.svdvals(weight - product(compute_tail(weight, 2)))
        want = torch.tensor([9, 8, 7, 6, 2, 2, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(rest, want, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
    def test_zero_singular_values_give_a_zero_tail(self, shape):
        weight = with_spectrum(*shape, [9, 8, 7, 6, 5, 0, 0, 0])
        tail = compute_tail(weight, 3)
        assert product(tail).abs().max() < 1e-6
        assert torch.isfinite(tail.p).all() and torch.isfinite(tail.q).all()

    def test_of_a_zero_weight_is_zero(self):
        tail = compute_tail(torch.zeros(8, 20), 3)
        assert product(tail).abs().max() == 0 and tail.gap == 1.0

    @pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
    def test_wide_spectrum_falls_back_to_a_full_svd(self, shape, count_svds):
        values = list(np.geomspace(1, 1e-9, 8))
        weight = with_spectrum(*shape, values)
        tail = compute_tail(weight, 4)
        assert count_svds
        torch.testing.assert_close(
            tail.singular_values, torch.tensor(values[-4:]), rtol=1e-5, atol=1e-16
        )
        want = svd_tail(weight, 4)
        assert (product(tail) - want).norm() <= 1e-5 * want.norm()

    def test_ordinary_spectrum_needs_no_full_svd(self, count_svds):
        compute_tail(with_spectrum(8, 20, list(np.geomspace(1, 1e-4, 8))), 4)
        assert not count_svds

    def test_survives_a_spectrum_at_the_edge_of_the_gram_matrix(self):
        """Just above NARROW_SPECTRUM no SVD is made; what is lost stays under float32 rounding."""
        values = list(np.geomspace(1, 4e-7, 8))
        weight = with_spectrum(8, 20, values)
        for t in (1, 2, 4):
            error = (product(compute_tail(weight, t)) - svd_tail(weight, t)).norm()
            assert error <= 1e-7 * weight.norm()

    def test_gap_tells_how_well_the_cut_is_defined(self):
        weight = with_spectrum(8, 20, [9, 8, 7, 6, 5, 4, 2, 1])
        assert compute_tail(weight, 2).gap == pytest.approx(0.5)
        assert compute_tail(weight, 1).gap == pytest.approx(0.5)
        assert compute_tail(weight, 4).last(3).gap == pytest.approx(0.2)
        tied = with_spectrum(8, 20, [9, 8, 7, 6, 5, 2, 2, 1])
        assert compute_tail(tied, 2).gap < 1e-9
        assert compute_tail(tied, 4).last(2).gap < 1e-9

    @given(st.integers(1, 24), st.integers(1, 24), st.data())
    def test_leaves_the_best_approximation_of_the_remaining_rank(self, out_f, in_f, data):
        """Eckart-Young: W - P Q is off by sqrt(sum of the tail's s^2), and its rank is k - t."""
        k = min(out_f, in_f)
        t = data.draw(st.integers(0, k - 1), label="t")
        weight = gaussian(out_f, in_f, seed=data.draw(st.integers(0, 1000), label="seed"))
        s = torch.linalg.svdvals(weight.double())
        tail = compute_tail(weight, t)
        assert float(product(tail).norm()) == pytest.approx(
            float(s[k - t :].square().sum().sqrt()), rel=1e-4, abs=1e-5
        )
        rest = torch.linalg.svdvals(weight.double() - product(tail))
        torch.testing.assert_close(rest[: k - t], s[: k - t], rtol=1e-4, atol=1e-5)
        assert rest[k - t :].max() < 1e-5 if t else True

    @given(st.integers(2, 24), st.integers(2, 24), st.data())
    def test_every_nested_rank_is_its_own_tail(self, out_f, in_f, data):
        t = data.draw(st.integers(1, min(out_f, in_f) - 1), label="t")
        weight = gaussian(out_f, in_f, seed=data.draw(st.integers(0, 1000), label="seed"))
        longest = compute_tail(weight, t)
        for shorter in range(t + 1):
            want = svd_tail(weight, shorter)
            torch.testing.assert_close(product(longest.last(shorter)), want, rtol=0, atol=2e-5)

    @given(degenerate_weights(), st.data())
    def test_ties_and_zeros_leave_a_best_approximation_at_every_nested_rank(self, drawn, data):
        """Where the cut is between equal values the tail is one of many, and as good as any."""
        weight, values = drawn
        k = len(values)
        longest = compute_tail(weight, data.draw(st.integers(0, k - 1), label="t"))
        for t in range(longest.rank + 1):
            tail = longest.last(t)
            rest = torch.linalg.svdvals(weight - product(tail))
            want = torch.tensor(values[: k - t] + [0.0] * t, dtype=torch.float64)
            torch.testing.assert_close(rest, want, atol=2e-5, rtol=0)
            assert_orthonormal_on_the_smaller_side(tail)

    @given(degenerate_weights(), st.data())
    def test_a_tail_of_a_tail_is_the_shorter_tail(self, drawn, data):
        weight, values = drawn
        t = data.draw(st.integers(0, len(values) - 1), label="t")
        middle = data.draw(st.integers(0, t), label="middle")
        short = data.draw(st.integers(0, middle), label="short")
        tail = compute_tail(weight, t)
        direct, by_steps = tail.last(short), tail.last(middle).last(short)
        assert torch.equal(direct.p, by_steps.p) and torch.equal(direct.q, by_steps.q)
        assert torch.equal(direct.singular_values, by_steps.singular_values)
        assert direct.gap == by_steps.gap


class TestLast:
    def test_is_a_view_and_costs_no_memory(self):
        tail = compute_tail(gaussian(16, 40), 8)
        short = tail.last(3)
        assert short.q.untyped_storage().data_ptr() == tail.q.untyped_storage().data_ptr()
        assert tail.last(8) is tail

    def test_rank_zero_has_no_gap_to_mind(self):
        short = compute_tail(gaussian(16, 40), 8).last(0)
        assert short.rank == 0 and short.gap == 1.0

    @pytest.mark.parametrize("t", [9, -1])
    def test_refuses_a_rank_that_it_has_not(self, t):
        with pytest.raises(ValueError, match=f"rank {t}, this one has 8"):
            compute_tail(gaussian(16, 40), 8).last(t)


class TestTruncationCount:
    @pytest.mark.parametrize(
        ("rule", "t", "out_features", "in_features", "want"),
        [
            (MIN_DIM, 8, 576, 576, 8),
            (MIN_DIM, 8, 192, 576, 8),
            (MIN_DIM, 8, 1536, 576, 8),
            (MIN_DIM, 0, 576, 576, 0),
            (IN_FEATURES, 8, 576, 576, 8),  # square: both rules agree
            (IN_FEATURES, 8, 1536, 576, 8),  # in <= out: both cut t
            (IN_FEATURES, 8, 192, 576, 0),  # in - t >= out: the authors' code cuts nothing
            (IN_FEATURES, 8, 568, 576, 0),  # in - t == out
            (IN_FEATURES, 8, 569, 576, 1),  # out < in < out + t: t - (in - out)
            (IN_FEATURES, 8, 573, 576, 5),
            (IN_FEATURES, 8, 575, 576, 7),
            (IN_FEATURES, 0, 576, 576, 0),
            (NONE, 8, 576, 576, 0),
            (NONE, 9999, 576, 576, 0),
        ],
    )
    def test_cuts_what_the_training_cut(self, rule, t, out_features, in_features, want):
        assert truncation_count(rule, t, out_features, in_features) == want

    @pytest.mark.parametrize("rule", [MIN_DIM, IN_FEATURES])
    @pytest.mark.parametrize("t", [-1, 192, 577])
    def test_refuses_a_rank_outside_the_weight(self, rule, t):
        with pytest.raises(ValueError, match=rf"from 0 to 191 for a \(192, 576\) weight, got {t}"):
            truncation_count(rule, t, 192, 576)

    @given(st.integers(1, 64), st.integers(1, 64), st.data())
    def test_in_features_keeps_as_many_as_slicing_the_svd_does(self, out_f, in_f, data):
        """The authors' code: `u[:, :in - r]`, on a list of min(out, in) components."""
        t = data.draw(st.integers(0, min(out_f, in_f) - 1), label="t")
        kept = len(range(min(out_f, in_f))[: in_f - t])
        assert truncation_count(IN_FEATURES, t, out_f, in_f) == min(out_f, in_f) - kept


class TestScaling:
    def test_is_alpha_over_r(self):
        assert scaling(16, 8) == 2.0

    def test_is_alpha_over_the_root_of_r_with_rslora(self):
        assert scaling(16, 4, use_rslora=True) == 8.0
        assert scaling(8, 2, use_rslora=True) == pytest.approx(8 / math.sqrt(2))


class TestMergedWeight:
    def parts(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tail]:
        weight = gaussian(16, 40).to(dtype)
        a, b = gaussian(3, 40, seed=3), gaussian(16, 3, seed=4)
        return weight, a, b, compute_tail(weight, 5)

    def test_is_the_weight_less_its_tail_plus_the_update(self):
        weight, a, b, tail = self.parts()
        want = weight.double() - svd_tail(weight, 5) + b.double() @ a.double()
        torch.testing.assert_close(
            merged_weight(weight, a, b, tail).double(), want, atol=1e-5, rtol=1e-5
        )

    def test_without_a_tail_is_plain_lora(self):
        weight, a, b, tail = self.parts()
        torch.testing.assert_close(merged_weight(weight, a, b, tail.last(0)), weight + b @ a)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_leaves_the_pristine_weight_bit_for_bit(self, dtype):
        weight, a, b, tail = self.parts(dtype)
        before = weight.clone()
        for t in (0, 5):
            merged_weight(weight, a, b, tail.last(t))
        assert torch.equal(weight, before)

    def test_rounds_once(self):
        weight, a, b, tail = self.parts(torch.bfloat16)
        exact = merged_weight(weight.float(), a, b, tail)
        merged = merged_weight(weight, a, b, tail)
        assert merged.dtype == torch.bfloat16
        assert torch.equal(merged, exact.to(torch.bfloat16))

    def test_takes_factors_of_another_dtype(self):
        weight, a, b, tail = self.parts()
        a, b = a.bfloat16(), b.bfloat16()
        torch.testing.assert_close(
            merged_weight(weight, a, b, tail.last(0)), weight + b.float() @ a.float()
        )


@pytest.mark.parametrize("t", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_place_is_merging(t: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=draw) for shape in ((9, 7), (2, 7), (9, 2)))
    tail = compute_tail(weight, 4).last(t)
    weight = weight.to(dtype)
    want = merged_weight(weight, a, b, tail)
    merge_into(weight, a, b, tail)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight, want)
