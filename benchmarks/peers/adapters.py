"""Random adapters of rank 8 on all linear layers of the blocks; only their cost matters here."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.peers.cases import adapter_name
from kasa_runtime.types import AdapterMethod

RANK = 8


def adapters_dir(
    cache: Path, model_dir: Path, fingerprint: str, method: AdapterMethod, count: int
) -> Path:
    """A directory with `count` of them; made when it is not there yet."""
    directory = cache / "adapters" / f"{method}-{count}-{fingerprint[:12]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            made = Path(scratch) / "adapters"
            _make(made, model_dir, method, count)
            made.rename(directory)
    return directory


def _make(root: Path, model_dir: Path, method: AdapterMethod, count: int) -> None:
    import torch

    from kasa_runtime.adapter import checkpoint
    from kasa_runtime.adapter.base import BaseModel
    from kasa_runtime.adapter.config import AdapterConfig, AdapterMeta
    from kasa_runtime.adapter.kasa import TruncationRule
    from kasa_runtime.adapter.lora import Adapter, ModuleWeights

    root.mkdir()
    base = BaseModel(model_dir)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    kasa = method is AdapterMethod.KASA
    rule = TruncationRule.MIN_DIM if kasa else TruncationRule.NONE
    config = AdapterConfig(RANK, 2 * RANK, "all-linear", method)
    meta = AdapterMeta(rule, base_fingerprint=base.fingerprint)
    for i in range(count):
        modules = {
            name: ModuleWeights(
                normal(RANK, shape.in_features),
                normal(shape.out_features, RANK),
                normal(RANK) if kasa else None,
            )
            for name, shape in base.modules.items()
            if not name.endswith("lm_head")
        }
        checkpoint.write(root / adapter_name(i), Adapter(config, meta, modules))
