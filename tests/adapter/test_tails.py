"""Tails on disk: what is stored is read back, and what cannot be read is computed again."""

from __future__ import annotations

import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llama

from adapter.making import LAYER
from kasa_runtime.adapter import tails as tails_module
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.kasa import Tail, compute_tail
from kasa_runtime.adapter.tails import MIN_STORED_RANK, TailCache

K_PROJ = "model.layers.1.self_attn.k_proj"  # (32, 64)

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks at which tails are computed."""
    ranks: list[int] = []

    def counted(weight: torch.Tensor, t: int) -> Tail:
        ranks.append(t)
        return compute_tail(weight, t)

    monkeypatch.setattr(tails_module, "compute_tail", counted)
    return ranks


def product(tail: Tail) -> torch.Tensor:
    return tail.p @ tail.q


def stored_file(cache: TailCache, module: str = LAYER) -> Path:
    return cache.directory / f"{module}.safetensors"


@pytest.mark.parametrize("module", [LAYER, K_PROJ, "model.layers.2.mlp.down_proj", "lm_head"])
def test_is_the_tail_of_the_layers_own_weight(base, tails, module):
    want = compute_tail(base.weight(module), 5)
    torch.testing.assert_close(product(tails.get(module, 5)), product(want), atol=1e-6, rtol=1e-4)


def test_knows_every_linear_layer(base, tails):
    assert tails.modules()[K_PROJ] == (32, 64)
    assert len(tails.modules()) == 3 * 7 + 1
    assert tails.modules().keys() == base.modules.keys()


def test_for_model_is_the_cache_of_its_fingerprint(base, tails):
    assert TailCache.for_model(base.directory).directory == tails.directory


def test_is_computed_once_and_read_back_by_the_next_process(base, tails, computed):
    first = tails.get(LAYER, 5)
    again = TailCache(base).get(LAYER, 5)
    assert len(computed) == 1
    assert torch.equal(first.p, again.p) and torch.equal(first.q, again.q)
    assert torch.equal(first.singular_values, again.singular_values)
    assert first.gap == again.gap


def test_serves_every_smaller_rank_from_one_file(base, tails, computed):
    tails.get(LAYER, 16)
    fresh = TailCache(base)
    for t in (0, 1, 16, MIN_STORED_RANK):
        want = compute_tail(base.weight(LAYER), t)
        got = fresh.get(LAYER, t)
        assert got.rank == t
        torch.testing.assert_close(product(got), product(want), atol=1e-6, rtol=1e-4)
    assert len(computed) == 1


def test_larger_rank_is_computed_again_and_replaces_the_file(base, tails, computed):
    tails.get(LAYER, 5)
    assert tails.cached_rank(LAYER) == MIN_STORED_RANK
    larger = tails.get(LAYER, MIN_STORED_RANK + 1)
    assert larger.rank == MIN_STORED_RANK + 1
    assert len(computed) == 2
    assert TailCache(base).cached_rank(LAYER) == computed[-1] > MIN_STORED_RANK
    TailCache(base).get(LAYER, MIN_STORED_RANK + 1)
    assert len(computed) == 2


def test_a_cache_that_holds_less_reads_what_another_process_stored(base, tails, computed):
    tails.get(LAYER, 5)
    TailCache(base).get(LAYER, 60)
    assert tails.get(LAYER, 60).rank == 60
    assert len(computed) == 2


def test_stores_at_most_what_the_layer_has(tails):
    assert tails.get(K_PROJ, 3).rank == 3
    assert tails.cached_rank(K_PROJ) == 31


@pytest.mark.parametrize("t", [32, 33, 64])
def test_refuses_to_cut_everything(tails, t):
    with pytest.raises(ValueError, match=f"got {t}"):
        tails.get(K_PROJ, t)
    assert tails.get(K_PROJ, 31).rank == 31


def test_nothing_is_cached_before_the_first_use(tails):
    assert tails.cached_rank(LAYER) == 0


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_torn_file_is_computed_again_and_repaired(base, tails, computed, caplog, keep):
    want = tails.get(LAYER, 5)
    data = stored_file(tails).read_bytes()
    stored_file(tails).write_bytes(data[:keep])
    got = TailCache(base).get(LAYER, 5)
    assert torch.equal(got.p, want.p) and len(computed) == 2
    assert "unreadable" in caplog.text
    assert stored_file(tails).read_bytes() == data


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (("p", "q"), {"gap": "0.5"}),
        (("p", "q", "singular_values"), {"gap": "wide"}),
        (("p", "q", "singular_values"), {}),
        (("p", "q", "singular_values"), None),
    ],
)
def test_file_that_lacks_something_is_computed_again(base, tails, computed, tensors, metadata):
    tails.get(LAYER, 5)
    stored = load_file(stored_file(tails))
    save_file({name: stored[name] for name in tensors}, stored_file(tails), metadata)
    assert TailCache(base).get(LAYER, 5).rank == 5
    assert len(computed) == 2


def test_directory_that_cannot_be_written_costs_only_the_next_start(base, own_home, caplog):
    own_home.mkdir()
    (own_home / "tails").write_text("a file where the directory should be")
    tails = TailCache(base)
    want = compute_tail(base.weight(LAYER), 5)
    torch.testing.assert_close(product(tails.get(LAYER, 5)), product(want), atol=1e-6, rtol=1e-4)
    assert "cannot store" in caplog.text
    assert tails.get(LAYER, 3).rank == 3


def test_full_disk_leaves_no_torn_file(tails, monkeypatch, caplog):
    def fail(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tails_module, "save_file", fail)
    assert tails.get(LAYER, 5).rank == 5
    assert "No space left" in caplog.text
    assert list(tails.directory.iterdir()) == []


def test_two_bases_do_not_mix(base, tails, tmp_path):
    other = TailCache(BaseModel(save_tiny_llama(tmp_path / "other", seed=1)))
    mine, theirs = tails.get(LAYER, 5), other.get(LAYER, 5)
    assert tails.directory != other.directory
    assert (product(mine) - product(theirs)).abs().max() > 1e-3
    assert torch.equal(TailCache(base).get(LAYER, 5).p, mine.p)


def test_a_copy_of_the_base_shares_its_tails(base, tails, computed, tmp_path):
    tails.get(LAYER, 5)
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    TailCache(BaseModel(copy)).get(LAYER, 5)
    assert len(computed) == 1


def test_threads_may_race(base, tails, monkeypatch, caplog):
    all_have_saved = threading.Barrier(4, timeout=10)

    def save_and_wait(*args: object) -> None:
        save_file(*args)
        all_have_saved.wait()

    monkeypatch.setattr(tails_module, "save_file", save_and_wait)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: tails.get(LAYER, 7), range(4)))
    assert all(torch.equal(tail.q, got[0].q) for tail in got)
    assert TailCache(base).get(LAYER, 7).rank == 7
    assert [path.name for path in tails.directory.iterdir()] == [f"{LAYER}.safetensors"]
    assert not caplog.records


class TestGapWarning:
    def tied_model(self, directory: Path) -> BaseModel:
        """The sixth and fifth smallest singular values of LAYER are equal."""
        save_tiny_llama(directory)
        tensors = load_file(directory / "model.safetensors")
        u, s, vh = torch.linalg.svd(tensors[f"{LAYER}.weight"].double())
        s[-6] = s[-5]
        tensors[f"{LAYER}.weight"] = ((u * s) @ vh).float()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return BaseModel(directory)

    def test_warns_where_the_cut_is_between_equal_values(self, tmp_path, caplog):
        tails = TailCache(self.tied_model(tmp_path / "tied"))
        with caplog.at_level(logging.WARNING):
            tails.get(LAYER, 5)
        assert LAYER in caplog.text and "rank 5" in caplog.text

    @pytest.mark.parametrize("t", [4, 6])
    def test_is_silent_where_the_tie_is_inside_or_outside(self, tmp_path, caplog, t):
        tails = TailCache(self.tied_model(tmp_path / "tied"))
        tails.get(LAYER, t)
        assert not caplog.records
