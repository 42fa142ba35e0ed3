"""The torch executor: transformers' own model, its attention and its linear layers swapped. CPU and
CUDA; the reference.

No model definition lives here. The attention function is handed in through transformers' attention
interface, and every linear layer is replaced by an `AdaptedLinear`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from kasa_runtime.adapter.kasa import Tail, merge_into
from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.background import set_torch_threads
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.adapted_linear import (
    AdaptedLinear,
    Deltas,
    Factors,
    LinearGroup,
    StepMasks,
    group_layers,
    pack_weight,
    stack,
)
from kasa_runtime.engine.native.decoder import DecoderInfo, load_decoder
from kasa_runtime.engine.native.executor import (
    NO_SLOT,
    Commit,
    Executor,
    PackedBatch,
    TailSource,
)
from kasa_runtime.engine.native.paged_attention import (
    NAME,
    AttentionPlan,
    KvCache,
    Plan,
    paged_attention,
)
from kasa_runtime.engine.native.probe import PROBE_TOKENS, probe, require_split_prompts
from kasa_runtime.errors import ConfigError, KasaError, ModelError

if TYPE_CHECKING:
    from kasa_runtime.engine.native.cuda.decode import DecodeSteps

logger = logging.getLogger(__name__)


class TorchExecutor(Executor):
    """One model on one device. Constructed on the step thread. Raises ModelError, ConfigError."""

    name = "torch"

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        self._device = _device(config)
        if self._device.type == "cpu":
            set_torch_threads(config.num_threads)
        else:
            torch.cuda.set_device(self._device)
        AttentionInterface.register(NAME, paged_attention)
        self._model = load_decoder(
            model_dir, dtype=_dtype(config, self._device), device=self._device, attention=NAME
        )
        self._num_parameters = self._model.num_parameters()
        has_triton = _has_triton(self._device)
        self._captures = has_triton and config.cuda_graphs
        self._deltas = _triton_deltas(config, self._device) if has_triton else StepMasks()
        self._layers = _adapt_layers(self._model)
        self._adapters: dict[int, AdapterWeights] = {}  # by slot
        self._tails: dict[str, Tail] = {}  # per layer, the largest that a resident adapter needs
        self._decode: DecodeSteps | None = None
        try:
            self._describe(config)
            self._cache = self._allocate_cache(config)
            self._groups = self._group_layers()
            self._require_split_prompts()
        except KasaError:
            raise
        except Exception as error:  # the architecture's own code, which raises what it likes
            raise ModelError(
                f"{type(self._model).__name__} does not run on this engine: {error}"
            ) from error
        if self._captures:
            self._capture_decode_steps(config)

    @torch.inference_mode()
    def run(self, batch: PackedBatch) -> Tensor:
        if self._decode is not None and self._decode.takes(batch):
            return self._decode.run(batch)
        self._deltas.begin(
            [s.slot for s in batch.sequences],
            [s.num_tokens for s in batch.sequences],
            batch.logit_rows,
        )
        return self._forward(
            batch.token_ids.to(self._device),
            batch.positions.to(self._device),
            AttentionPlan.make(batch, self._cache),
            logit_rows=batch.logit_rows.to(self._device),
        )

    @torch.inference_mode()
    def _forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        plan: Plan,
        *,
        logit_rows: Tensor | None = None,
    ) -> Tensor:
        """token ids and positions (num_tokens,) -> logits of these rows, or of all, float32."""
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if logit_rows is None else logit_rows,
            plan=plan,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    @property
    def layers(self) -> Set[str]:
        return self._layers.keys()

    def prepare_slots(
        self, contents: Mapping[int, AdapterWeights | None], tails: TailSource
    ) -> Commit:
        """Stacks the factors of the groups of layers that change anew, for all residents."""
        adapters = {s: a for s, a in {**self._adapters, **contents}.items() if a is not None}
        before = [self._adapters.get(slot) for slot in contents]
        changed = {name for a in (*contents.values(), *before) if a for name in a.modules}
        affected = [names for names in self._groups if not changed.isdisjoint(names)]
        held = [self._layers[names[0]].group.factors for names in self._groups]
        interned = {f.layouts: f.layouts for f in held if f is not None}
        kept: dict[str, Tail | None] = {}
        changes: list[tuple[LinearGroup, Factors | None]] = []
        for names in affected:
            parts = []
            for name in names:
                deltas = {s: a.modules[name] for s, a in adapters.items() if name in a.modules}
                t = max((d.t for d in deltas.values()), default=0)
                kept[name] = self._tail(name, t, tails)
                parts.append((deltas, kept[name]))
            group = self._layers[names[0]].group
            changes.append((group, stack(parts, group.like, interned)))
        commit_factors = self._deltas.prepare(changes)

        def commit() -> None:
            commit_factors()
            self._adapters = adapters
            for name, tail in kept.items():
                self._tails.pop(name, None)
                if tail is not None:
                    self._tails[name] = tail

        return commit

    def prepare_merge(self, slot: int, tails: TailSource) -> Commit:
        modules = self._adapters[slot].modules
        merged: dict[int, Tensor] = {}  # by group
        for i, names in enumerate(self._groups):
            if modules.keys().isdisjoint(names):
                continue
            group = self._layers[names[0]].group
            whole = group.dense(pristine=True)
            for name, weight in zip(names, whole.split(group.sizes), strict=True):
                if (delta := modules.get(name)) is not None:
                    merge_into(weight, delta.a, delta.b, tails.get(name, delta.t))
            merged[i] = pack_weight(whole)

        def commit() -> None:
            for i, names in enumerate(self._groups):
                group = self._layers[names[0]].group
                if i in merged:
                    group.set_merged(merged.pop(i))
                else:
                    group.set_pristine()
            self._deltas.set_merged(slot)

        return commit

    def prepare_unmerge(self) -> Commit:
        def commit() -> None:
            for layer in self._layers.values():
                layer.group.set_pristine()
            self._deltas.set_merged(NO_SLOT)

        return commit

    def close(self) -> None:
        del self._model, self._layers, self._cache, self._deltas, self._decode
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def weights(self) -> dict[str, Tensor]:
        """Dense copies of the weights that are served now, by layer. For tests and checks."""
        found: dict[str, Tensor] = {}
        for names in self._groups:
            group = self._layers[names[0]].group
            found |= zip(names, group.dense(pristine=False).split(group.sizes), strict=True)
        return found

    def _tail(self, name: str, t: int, tails: TailSource) -> Tail | None:
        if t == 0:
            return None
        held = self._tails.get(name)
        if held is not None and held.rank >= t:
            return held.last(t)
        return tails.get(name, t)

    def _describe(self, config: EngineConfig) -> None:
        info = DecoderInfo.of(self._model)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.block_size = config.block_size
        if self._captures:
            from kasa_runtime.engine.native.cuda.attention import BLOCK_SIZE

            self.block_size = -(-config.block_size // BLOCK_SIZE) * BLOCK_SIZE
        self.vocab_size = info.vocab_size
        self.context_length = info.context_length(config)
        self.num_layers = info.num_layers
        self.num_parameters = self._num_parameters
        self.eos_ids = info.eos_ids

    def _allocate_cache(self, config: EngineConfig) -> KvCache:
        """All of the KV cache at once: memory that is touched first at start-up is not touched
        first in a step."""
        text = self._model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token_bytes = 2 * self.num_layers * heads * head_dim * self._model.dtype.itemsize
        self.num_blocks = config.num_cache_blocks(self.block_size, token_bytes, self.context_length)
        shape = ((self.num_blocks + 1) * self.block_size, heads, head_dim)

        def zeros() -> list[Tensor]:
            dtype, device = self._model.dtype, self._device
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(self.num_layers)]

        return KvCache(zeros(), zeros(), self.block_size)

    def _require_split_prompts(self, num_last: int = PROBE_TOKENS // 2) -> None:
        exact = self._model.dtype in (torch.float32, torch.float64)
        name = type(self._model).__name__
        require_split_prompts(self, name, 0.01 if exact else 0.25, num_last)

    def _capture_decode_steps(self, config: EngineConfig) -> None:
        """Without them if need be: some architectures cannot be captured, some machines lack what
        torch compiles with."""
        from kasa_runtime.engine.native.cuda.decode import capture_decode_steps

        try:
            self._decode = capture_decode_steps(
                self._forward, self._cache, self._deltas, config.max_num_seqs
            )
            self._require_split_prompts(num_last=1)
        except Exception as error:  # of torch's compiler, CUDA, or the architecture's own code
            logger.warning("decode steps run without CUDA graphs: %s", error)
            self._decode = None

    def _group_layers(self) -> list[tuple[str, ...]]:
        """Find the layers that share their input, by watching one token pass through the model, and
        make one matrix of each such group. Returns the groups' layers, all layers being in one."""
        calls: list[tuple[str, Tensor]] = []

        def watch(name: str, layer: AdaptedLinear) -> RemovableHandle:
            return layer.register_forward_pre_hook(lambda _, args: calls.append((name, args[0])))

        handles = [watch(name, layer) for name, layer in self._layers.items()]
        probe(self, [0], 0)
        for handle in handles:
            handle.remove()
        groups: list[tuple[str, ...]] = []
        for (name, x), (before, x_before) in zip(calls, [("", None), *calls], strict=False):
            if x is x_before and _parent(name) == _parent(before) and name not in groups[-1]:
                groups[-1] += (name,)
            else:
                groups.append((name,))
        grouped = [name for group in groups for name in group]
        if len(set(grouped)) < len(grouped):  # a layer is called more than once: no grouping
            groups = []
        called = set(grouped) if groups else set()
        groups += [(name,) for name in self._layers if name not in called]
        for names in groups:
            group_layers([self._layers[name] for name in names], self._deltas)
        return groups


def _adapt_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Replace every linear layer in place; the new ones by path."""
    layers: dict[str, AdaptedLinear] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        layers[name] = AdaptedLinear(weight.data, module.bias)
        setattr(model.get_submodule(_parent(name)), name.rpartition(".")[2], layers[name])
    return layers


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _triton_deltas(config: EngineConfig, device: torch.device) -> Deltas:
    from kasa_runtime.engine.native.cuda.lowrank import TritonDeltas

    return TritonDeltas(config.max_slots, config.max_num_batched_tokens, device)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(
            f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}"
        ) from error


def _dtype(config: EngineConfig, device: torch.device) -> Any:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" else "auto"
