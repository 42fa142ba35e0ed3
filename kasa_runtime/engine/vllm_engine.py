"""vLLM behind the engine protocol: KaSA by its multi-LoRA path, merged weights by its own loaders.

In vLLM every adapter is a plain LoRA of rank r + t on the untouched base (`vllm_adapters.py`).
While one is merged, its requests run without a LoRA, those of the base with one, and what lies in
every other slot is a difference of deltas, so that requests that run with a LoRA go on exactly. One
that runs without cannot begin to have one: a switch waits for its end, and new ones for the switch.

Made for vLLM 0.32. A line that is true of some version only says so, and when it can go.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.background import finish, in_background, on_loop_clock
from kasa_runtime.engine import vllm_process
from kasa_runtime.engine.base import Engine, EngineOutput, EngineRequest, EngineStats
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.grammar import check
from kasa_runtime.engine.vllm_adapters import Tails, difference_rank, write_difference
from kasa_runtime.engine.vllm_arguments import sampling_arguments, structured_arguments
from kasa_runtime.errors import (
    AdapterInvalid,
    CapacityExceeded,
    EngineDead,
    InvalidRequest,
    KasaError,
    ModelError,
)
from kasa_runtime.types import FinishReason, Mode, SamplingParams, TokenLogprobs

logger = logging.getLogger(__name__)

POLL_S = 0.02
SHUTDOWN_S = 10.0
REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.CANCELLED,
}
T = TypeVar("T")


@dataclass(frozen=True)
class Resident:
    """An adapter in a slot. vLLM knows it by a number that nothing else ever has."""

    weights: AdapterWeights | None  # None: what base requests run with while one is merged
    lora: Any  # vLLM's LoRARequest, whose directory holds the plain LoRA on the untouched base


class VllmEngine(Engine):
    """One vLLM engine, in processes of its own. Event loop only."""

    def __init__(self, model_dir: Path, config: EngineConfig, tails: Tails) -> None:
        self.config = config
        self._model_dir = model_dir
        self._tails = tails
        self._llm: Any = None
        self._counts = vllm_process.Counts()
        self._numbers = itertools.count(1)
        self._residents: dict[str | None, Resident] = {}  # by key; None: see Resident
        self._merged: str | None = None
        self._num_switches = 0
        self._switch: Switch | None = None  # that waits for its turn
        self._residency = asyncio.Lock()  # one change of adapters at a time
        self._ids: set[str] = set()  # of requests, those that wait included
        self._inside: dict[str, tuple[str | None, bool]] = {}  # id -> adapter, whether by a LoRA
        self._closing = False
        self._death: BaseException | None = None

    async def start(self) -> None:
        self._llm = await asyncio.to_thread(self._start)
        self.limits = vllm_process.limits_of(self._llm, self._model_dir, self.config.max_slots)
        names = list(self._tails.base.modules)
        found = await self._call(self._llm.collective_rpc("kasa_adaptable", args=(names,)))
        # Of pipeline stages, each has its own layers.
        self._adaptable = frozenset(name for worker in found for name in worker)
        await self._probe()

    async def close(self) -> None:
        self._closing = True
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if not llm.errored:
            await llm.abort(list(self._inside))
        await asyncio.to_thread(llm.shutdown, SHUTDOWN_S)

    @property
    def alive(self) -> bool:
        started = self._llm is not None and not self._closing
        return started and self._death is None and not self._llm.errored

    def stats(self) -> EngineStats:
        return self._counts.stats(num_requests=len(self._ids))

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self._require_alive()
        if request.request_id in self._ids:
            raise KasaError(f"request id {request.request_id!r} is in use")
        if request.adapter is not None and request.adapter not in self._residents:
            raise KeyError(request.adapter)
        arguments = sampling_arguments(request.sampling, request.prompt_logprobs)
        self._ids.add(request.request_id)
        try:
            if request.structured_output is not None:
                await in_background(check, request.structured_output)
            ended = await self._wait_for_turn(request)
            if ended is not None:
                yield EngineOutput(request.request_id, (), (), ended, None, self._mode(request))
                return
            async with aclosing(self._run(request, arguments)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._ids.discard(request.request_id)

    async def load_adapter(self, adapter: AdapterWeights, instead_of: str | None = None) -> None:
        self._require_alive()
        if instead_of is not None:
            await finish(self._unload(instead_of))
        await finish(self._load(adapter))

    async def unload_adapter(self, key: str) -> None:
        self._require_alive()
        await finish(self._unload(key))

    async def merge_adapter(self, key: str) -> None:
        self._require_alive()
        await finish(self._switch_to(key))

    async def unmerge_adapter(self) -> None:
        self._require_alive()
        await finish(self._switch_to(None))

    def _start(self) -> Any:
        vllm_process.prepare(self.config)
        num_loras = _num_loras(self.config)
        return vllm_process.start(
            self._model_dir, self.config, num_loras=num_loras, counts=self._counts
        )

    async def _probe(self) -> None:
        """One token. vLLM's kernels do not all say at the start what they do not support."""
        probe = EngineRequest("probe", (0,), SamplingParams(max_tokens=1))
        try:
            async for _ in self.generate(probe):
                pass
        except EngineDead as error:
            await self.close()
            raise ModelError(
                f"{self._model_dir}: vLLM died of the first token; its log above says why"
            ) from error

    # --- requests ---------------------------------------------------------------------------------

    async def _wait_for_turn(self, request: EngineRequest) -> FinishReason | None:
        """Until the request can run in the present weights and, if a switch waits, in the next.
        Returns why it ended before that."""
        while True:
            if request.deadline_s is not None and time.monotonic() >= request.deadline_s:
                return FinishReason.DEADLINE
            if self._closing:
                return FinishReason.CANCELLED
            self._require_alive()
            has_lora = request.adapter != self._merged
            outlasts = self._switch is None or self._switch.spares(request.adapter, has_lora)
            if outlasts and self._fits(request.adapter, self._merged):
                return None
            await asyncio.sleep(POLL_S)

    async def _run(
        self, request: EngineRequest, arguments: dict[str, Any]
    ) -> AsyncGenerator[EngineOutput, None]:
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.sampling_params import SamplingParams as VllmSamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        has_lora = request.adapter != self._merged
        lora = self._residents[request.adapter].lora if has_lora else None
        self._inside[request.request_id] = request.adapter, has_lora
        params = VllmSamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        if (wanted := request.structured_output) is not None:
            params.structured_outputs = StructuredOutputsParams(**structured_arguments(wanted))
        deadline_s = on_loop_clock(request.deadline_s)
        scheduled_s = None
        outputs = self._llm.generate(
            self._prompt(request), params, request.request_id, lora_request=lora
        )
        try:
            async with aclosing(outputs):
                while True:
                    async with asyncio.timeout_at(deadline_s):
                        output = await anext(outputs)
                    found = self._output(request, output)
                    scheduled_s = found.scheduled_s
                    yield found
                    if output.finished:
                        return
        except TimeoutError:
            reason = FinishReason.DEADLINE
            mode = self._mode(request)
            yield EngineOutput(request.request_id, (), (), reason, scheduled_s, mode)
        except EngineDeadError as error:
            raise self._dead(error) from error
        except VLLMValidationError as error:
            raise InvalidRequest("sampling", str(error)) from error
        finally:
            del self._inside[request.request_id]

    def _prompt(self, request: EngineRequest) -> dict[str, Any]:
        """As vLLM's renderer would make it. What was computed before a switch is not found after
        it."""
        prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
        if self._num_switches or request.cache_salt:
            prompt["cache_salt"] = f"{self._num_switches}:{request.cache_salt}"
        return prompt

    def _mode(self, request: EngineRequest) -> Mode:
        if request.adapter is None:
            return Mode.BASE
        return Mode.MERGED if request.adapter == self._merged else Mode.BATCHED

    def _output(self, request: EngineRequest, output: Any) -> EngineOutput:
        [completion] = output.outputs
        count, of_prompt = request.sampling.logprobs, request.prompt_logprobs
        if output.finished and completion.finish_reason not in REASONS:
            raise KasaError(f"vLLM ended it for the reason {completion.finish_reason!r}")
        return EngineOutput(
            request.request_id,
            tuple(completion.token_ids),
            () if count is None else _logprobs(completion.token_ids, completion.logprobs, count),
            REASONS[completion.finish_reason] if output.finished else None,
            # of the engine's process, on the clock that all processes share
            output.metrics.scheduled_ts if output.metrics else None,
            self._mode(request),
            output.num_cached_tokens or 0,
            # of a delta: all of them in the first, none in the others
            _logprobs(request.prompt_ids, output.prompt_logprobs, of_prompt)
            if of_prompt is not None and output.prompt_logprobs
            else (),
        )

    # --- adapters ---------------------------------------------------------------------------------

    async def _load(self, adapter: AdapterWeights) -> None:
        async with self._residency:
            if adapter.key in self._residents:
                return
            self._require_fit(adapter)
            directory = await in_background(write_difference, adapter, None, self._tails)
            resident = self._resident(adapter, directory)
            if self._fits_weights(adapter, self._merged):
                await self._add(resident)
            else:
                _warn_of_waiting([adapter.key], self._merged)
            self._residents[adapter.key] = resident

    def _require_fit(self, adapter: AdapterWeights) -> None:
        if missing := sorted(adapter.modules.keys() - self._adaptable):
            raise CapacityExceeded(
                f"{adapter.key}: vLLM cannot adapt {missing[0]} ({len(missing)} of its "
                f"{len(adapter.modules)} layers); serve it with --engine native"
            )
        rank = difference_rank(adapter, None)
        if rank > self.limits.max_rank:
            raise CapacityExceeded(
                f"{adapter.key} has rank {rank} with its tail (r + t), this engine takes up to "
                f"{self.limits.max_rank}; raise max_lora_rank"
            )
        if len(self._residents.keys() - {None}) >= self.config.max_slots:
            raise CapacityExceeded(
                f"all {self.config.max_slots} slots hold an adapter; raise max_slots"
            )

    async def _add(self, resident: Resident) -> None:
        """Load and pin what stands for it beside the merged adapter."""
        directory = await self._directory(resident, self._merged)
        lora = _lora_request(resident.lora.lora_name, resident.lora.lora_int_id, directory)
        try:
            await self._call(self._llm.add_lora(lora))
            await self._call(self._llm.pin_lora(lora.lora_int_id))
        except EngineDead:
            raise
        except Exception as error:  # of any kind, from the other process
            raise AdapterInvalid(f"{lora.lora_name}: vLLM refuses it: {error}") from error

    async def _unload(self, key: str) -> None:
        async with self._residency:
            if key not in self._residents:
                return
            if key == self._merged:
                raise CapacityExceeded(f"{key} is merged; unmerge it before unloading it")
            number = self._residents[key].lora.lora_int_id
            await self._call(self._llm.remove_lora(number))
            del self._residents[key]

    def _resident(self, weights: AdapterWeights | None, directory: Path) -> Resident:
        name = weights.key if weights else "base"  # no key: those have an @
        return Resident(weights, _lora_request(name, next(self._numbers), directory))

    def _weights(self, key: str | None) -> AdapterWeights | None:
        return self._residents[key].weights if key is not None else None

    def _fits(self, key: str | None, merged: str | None) -> bool:
        """Whether requests for it can run while `merged` is."""
        return self._fits_weights(self._weights(key), merged)

    def _fits_weights(self, weights: AdapterWeights | None, merged: str | None) -> bool:
        if weights is not None and weights.key == merged:
            return True
        return difference_rank(weights, self._weights(merged)) <= self.limits.max_rank

    # --- merging ----------------------------------------------------------------------------------

    async def _switch_to(self, target: str | None) -> None:
        async with self._residency:
            if target is not None and target not in self._residents:
                raise KeyError(target)
            if target == self._merged:
                return
            self._require_mergeable(target)
            if None not in self._residents:
                nothing = await in_background(write_difference, None, None, self._tails)
                self._residents[None] = self._resident(None, nothing)
            spared = {key for key in self._residents if self._fits(key, target)}
            arguments = await self._switch_arguments(target, spared)
            _warn_of_waiting([key for key in self._residents if key not in spared], target)
            self._switch = Switch(spared)
            try:
                await self._until(lambda: not self._must_end())
                self._num_switches += 1
                await self._replace_weights(arguments)
                self._merged = target
            finally:
                self._switch = None

    def _require_mergeable(self, key: str | None) -> None:
        weights = self._weights(key)
        if weights is None:
            return
        if quantization := self._llm.model_config.quantization:
            raise CapacityExceeded(
                f"{key} cannot be merged into weights that are quantised ({quantization}); it is "
                "served without"
            )
        base = self._tails.base
        if shared := [name for name in weights.modules if base.shares_tensor(name)]:
            raise CapacityExceeded(
                f"{key} cannot be merged: {shared[0]} shares {base.tensor_key(shared[0])}, which "
                "would change too; it is served without"
            )

    async def _switch_arguments(
        self, target: str | None, spared: set[str | None]
    ) -> tuple[Any, ...]:
        """What the workers are told: see `KasaWorker.kasa_switch`."""
        weights = self._weights(target)
        keys = (
            {self._tails.base.tensor_key(name): name for name in weights.modules} if weights else {}
        )
        merged = self._residents[target].lora.lora_path if weights else ""
        loras = []
        for key in spared:
            resident = self._residents[key]
            directory = await self._directory(resident, target)
            loras.append((resident.lora.lora_name, resident.lora.lora_int_id, str(directory)))
        return merged, keys, loras

    async def _directory(self, resident: Resident, merged: str | None) -> Path:
        """The plain LoRA that stands for it while `merged` is."""
        weights, other = resident.weights, self._weights(merged)
        if weights is not None and weights.key == merged:
            weights = other = None
        return await in_background(write_difference, weights, other, self._tails)

    def _must_end(self) -> list[str]:
        """The requests that run on the weights as they are and cannot on the next."""
        assert self._switch is not None
        return [i for i, state in self._inside.items() if not self._switch.spares(*state)]

    async def _replace_weights(self, arguments: tuple[Any, ...]) -> None:
        try:
            await self._call(self._llm.collective_rpc("kasa_switch", args=arguments))
        except BaseException as error:  # of any kind, from the other processes
            self._death = error  # their weights may be half of one and half of the other
            raise self._dead(error) from error

    # --- vLLM's processes -------------------------------------------------------------------------

    async def _call(self, call: Awaitable[T]) -> T:
        """What it returns or raises; vLLM leaves calls without an answer when it dies."""
        task = asyncio.ensure_future(call)
        try:
            await self._until(task.done)
        finally:
            task.cancel()
        return task.result()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._require_alive()
            await asyncio.sleep(POLL_S)

    def _require_alive(self) -> None:
        if not self.alive:
            raise self._dead(self._death)

    def _dead(self, cause: BaseException | None) -> EngineDead:
        why = "closed" if self._closing else (cause or "vLLM's process ended; its log says why")
        error = EngineDead(f"the engine has stopped ({why}); restart the server")
        error.__cause__ = cause
        return error


@dataclass(frozen=True)
class Switch:
    """A change of the weights that waits for requests to end."""

    spared: set[str | None]  # whose LoRAs are there after it too

    def spares(self, adapter: str | None, has_lora: bool) -> bool:
        """Whether a request goes on through it."""
        return has_lora and adapter in self.spared


def _num_loras(config: EngineConfig) -> int:
    """vLLM's slots: one more for what base requests run with while an adapter is merged."""
    # vLLM 0.32 on the CPU reads the last slot for rows without a LoRA, whose index is -1, so that
    # one stays empty. Drop it once lora/ops/torch_ops/lora_ops.py leaves such rows out.
    return config.max_slots + 1 + (1 if vllm_process.runs_on_cpu() else 0)


def _lora_request(name: str, number: int, directory: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(directory))


def _logprobs(token_ids: Sequence[int], rows: Sequence[Any], count: int) -> tuple[Any, ...]:
    """Of every token its own, and the `count` most likely ones; vLLM gives both in one row. None
    where it has no row, as for the first of a prompt."""
    found: list[TokenLogprobs | None] = []
    for token_id, row in zip(token_ids, rows, strict=True):
        if row is None:
            found.append(None)
            continue
        ranked = sorted((p.rank, i, p.logprob) for i, p in row.items() if p.rank <= count)
        top = tuple((i, logprob) for _, i, logprob in ranked[:count])
        found.append(TokenLogprobs(token_id, row[token_id].logprob, top))
    return tuple(found)


def _warn_of_waiting(keys: list[str | None], merged: str | None) -> None:
    if keys:
        logger.warning(
            "requests for %s wait until %s is unmerged: their difference has a rank above "
            "max_lora_rank",
            ", ".join(map(str, keys)),
            merged,
        )
