"""Tails on disk: computed once per base model and layer, read back ever after.

`${KASA_HOME}/tails/<base fingerprint>/<tensor>.safetensors` holds one layer's factors at some rank;
every smaller rank is its last columns. It has the name of the layer's tensor in the base's files,
so that an encoder and the classifier that is made of it share their tails. A file appears by
rename, so any number of processes may compute and read at once.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.kasa import Tail, compute_tail
from kasa_runtime.home import kasa_home

logger = logging.getLogger(__name__)

MIN_STORED_RANK = 32
"""Computing more columns is nearly free, and spares the next adapter with a larger rank the
decomposition."""

UNSTABLE_GAP = 1e-5
"""Below this relative gap at the cut the dropped subspace differs between machines (method: nearly
equal values)."""


class TailCache:
    """The tails of one base model. Thread-safe in that a race at worst computes a tail twice."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.directory = kasa_home() / "tails" / base.tails_key
        self._memory: dict[str, Tail] = {}  # the largest that was needed
        self._cuts: dict[tuple[str, int], Tail] = {}  # what was asked for, views of those

    @classmethod
    def for_model(cls, model_dir: Path) -> TailCache:
        return cls(BaseModel(model_dir))

    def modules(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every layer that can have a tail."""
        return {n: (s.out_features, s.in_features) for n, s in self.base.modules.items()}

    def cached_rank(self, module: str) -> int:
        """The rank that is on disk for a layer, 0 if none is."""
        tail = self._memory.get(module) or self._read(module)
        return tail.rank if tail else 0

    def get(self, module: str, t: int) -> Tail:
        """The tail of rank `t` of a layer; computed and stored if need be. Raises ValueError if t
        >= min(out, in)."""
        cut = self._cuts.get((module, t))
        if cut is None:
            cut = self._cuts[module, t] = self._cut(module, t)
        return cut

    def _cut(self, module: str, t: int) -> Tail:
        if t == 0:  # a plain LoRA's layer: no weight is read, nothing decomposed
            out_features, in_features = self.modules()[module]
            nothing = torch.zeros(0, dtype=torch.float64)
            return Tail(torch.zeros(out_features, 0), torch.zeros(0, in_features), nothing, 1.0)
        tail = self._memory.get(module)
        if tail is None or tail.rank < t:
            tail = self._read(module)
        if tail is None or tail.rank < t:
            tail = self._compute(module, t)
        self._memory[module] = tail
        wanted = tail.last(t)
        if wanted.gap < UNSTABLE_GAP:
            logger.warning(
                "%s: the singular values on both sides of truncation rank %d are nearly equal "
                "(relative gap %.1e), so this tail may differ on another machine",
                module,
                t,
                wanted.gap,
            )
        return wanted

    def _compute(self, module: str, t: int) -> Tail:
        weight = self.base.weight(module)
        stored_rank = max(MIN_STORED_RANK, 1 << (t - 1).bit_length())
        tail = compute_tail(weight, max(t, min(stored_rank, min(weight.shape) - 1)))
        self._write(module, tail)
        return tail

    def _read(self, module: str) -> Tail | None:
        path = self._path(module)
        try:
            with safe_open(path, framework="pt") as handle:
                p, q, s = (handle.get_tensor(name) for name in ("p", "q", "singular_values"))
                gap = float((handle.metadata() or {})["gap"])
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("%s: unreadable (%s), computing this tail again", path, error)
            return None
        return Tail(p, q, s, gap)

    def _write(self, module: str, tail: Tail) -> None:
        """Best effort: a full or read-only disk costs the next start time, not this one
        correctness."""
        path = self._path(module)
        staged = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        tensors = {"p": tail.p, "q": tail.q, "singular_values": tail.singular_values}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, staged, {"gap": repr(tail.gap)}
            )
            staged.replace(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s: cannot store this tail (%s)", path, error)
            with suppress(OSError):
                staged.unlink()

    def _path(self, module: str) -> Path:
        name = self.base.tensor_key(module).removesuffix(".weight")
        return self.directory / f"{name}.safetensors"
