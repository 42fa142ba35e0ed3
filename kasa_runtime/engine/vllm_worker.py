"""What this engine does inside vLLM's worker processes, called by `collective_rpc`.

vLLM mixes `KasaWorker` into its own worker class. Every worker hands whole weights to vLLM's
loaders, which shard, pack and quantise them as they did at the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kasa_runtime.adapter.checkpoint import PREFIX, WEIGHTS_FILE

LoadedAdapter = Sequence[Any]
"""(name, id, directory), as it crosses to another process."""


class KasaWorker:
    """Mixed into vLLM's Worker; all methods run between two of its steps."""

    def kasa_adaptable(self: Any, modules: Sequence[str]) -> list[str]:
        """Those of `modules`, by transformers' paths, that this worker applies a LoRA to."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        manager = self.model_runner.lora_manager._adapter_manager
        packed = manager.packed_modules
        adapted = set(manager.modules) - packed.keys()
        adapted.update(part for parts in packed.values() for part in parts)
        mapper = getattr(self.get_model(), "hf_to_vllm_mapper", None)
        renaming = mapper.get_rename_mapper() if mapper is not None else None

        def its_name(module: str) -> str:
            name, _ = parse_fine_tuned_lora_name(f"{PREFIX}{module}.lora_A.weight", renaming)
            return str(name)

        return [module for module in modules if its_name(module) in adapted]

    def kasa_switch(
        self: Any, merged: str, keys: Mapping[str, str], adapters: Sequence[LoadedAdapter]
    ) -> None:
        """Load all weights again, with the plain LoRA in the directory `merged` merged into them
        ("": none), then `adapters`, in the place of all that are loaded. `keys`: the tensors of the
        checkpoint that it changes, with their layers."""
        from vllm.model_executor.model_loader import get_model_loader

        loader = get_model_loader(self.load_config)
        weights = loader.get_all_weights(self.model_config, self.get_model())
        if merged:
            weights = with_merged(weights, Path(merged), keys)
        self.reload_weights(weights_iterator=weights)
        self.kasa_load(adapters)

    def kasa_load(self: Any, adapters: Sequence[LoadedAdapter]) -> None:
        """Load these plain LoRAs, each in the place of what has its id, and keep them."""
        from vllm.lora.request import LoRARequest

        for name, number, directory in adapters:
            self.add_lora(LoRARequest(name, number, directory, load_inplace=True))
            self.pin_lora(number)


def with_merged(
    weights: Iterable[tuple[str, Tensor]], directory: Path, keys: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint; W + B A in float32, not rounded, for the tensors in `keys`."""
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as factors:
        for key, weight in weights:
            if key in keys:
                prefix = f"{PREFIX}{keys[key]}"
                a = factors.get_tensor(f"{prefix}.lora_A.weight")
                b = factors.get_tensor(f"{prefix}.lora_B.weight")
                # (out, rank) @ (rank, in)
                weight = torch.addmm(weight.to(torch.float32), b, a)
            yield key, weight
