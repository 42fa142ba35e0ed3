"""The native engine: one thread owns the model and runs `step()`; the event loop talks to it
through an inbox.

A step is schedule, run, sample, postprocess. Requests join and leave between any two steps. Outputs
cross to the event loop once per step, whatever the number of tokens. A change of adapters is made
ready on a third thread and only committed, which is a swap of pointers, between two steps.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import tokenizers
import torch

from kasa_runtime.adapter.lora import AdapterWeights
from kasa_runtime.background import in_background
from kasa_runtime.engine.base import Engine, EngineLimits, EngineOutput, EngineRequest, EngineStats
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.engine.native.block_manager import BlockManager
from kasa_runtime.engine.native.constraint import ConstraintMaker
from kasa_runtime.engine.native.executor import NO_SLOT, Commit, Executor, TailSource
from kasa_runtime.engine.native.prompt_logprobs import score_prompts
from kasa_runtime.engine.native.sampler import sample
from kasa_runtime.engine.native.scheduler import Scheduler
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.engine.native.slots import SlotTable
from kasa_runtime.errors import CapacityExceeded, EngineDead, KasaError
from kasa_runtime.types import FinishReason, Mode, TokenLogprobs

logger = logging.getLogger(__name__)

Delivery = EngineOutput | BaseException
P = ParamSpec("P")


def carried_through(
    change: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, Coroutine[Any, Any, None]]:
    """Goes on to its end when its caller is cancelled: half of a change would leave in the model
    something else than what is believed to be there."""

    @wraps(change)
    async def to_the_end(*args: P.args, **kwargs: P.kwargs) -> None:
        await asyncio.shield(asyncio.ensure_future(change(*args, **kwargs)))

    return to_the_end


@dataclass(eq=False)
class Change:
    """An adapter that is to come into a slot, and the key of one that is to leave its own."""

    comes: AdapterWeights | None
    goes: str | None
    done: asyncio.Future[None]


class NativeEngine(Engine):
    """Continuous batching over an executor. All public methods: event loop only. `tokenizer`: of
    the model, for structured output, which it refuses without one."""

    def __init__(
        self,
        config: EngineConfig,
        make_executor: Callable[[], Executor],
        tails: TailSource,
        tokenizer: tokenizers.Tokenizer | None = None,
    ) -> None:
        self.config = config
        self._make_executor = make_executor
        self._tails = tails
        self._tokenizer = tokenizer
        self._slots = SlotTable(config.max_slots)
        self._merged_slot = NO_SLOT
        self._residency = asyncio.Lock()  # one change of adapters is prepared at a time
        self._changes: list[Change] = []  # that are wanted
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._mailboxes: dict[str, asyncio.Queue[Delivery]] = {}
        self._commits: set[asyncio.Future[None]] = set()
        self._closing = False
        self._death: BaseException | None = None
        self._num_steps = 0
        self._num_merges = 0

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="kasa-step", daemon=True
        )
        self._thread.start()
        await started
        limits = self.limits
        self._constraints = ConstraintMaker(self._tokenizer, limits.vocab_size, limits.eos_ids)

    async def close(self) -> None:
        self._closing = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._death is None

    def stats(self) -> EngineStats:
        running = len(self._scheduler.running)
        return EngineStats(
            num_running=running,
            num_waiting=max(0, len(self._mailboxes) - running),
            kv_cache_usage=self._scheduler.blocks.usage,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            prefix_cache_queries=self._scheduler.prefix_cache_queries,
            prefix_cache_hits=self._scheduler.prefix_cache_hits,
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        wanted = request.structured_output
        constraint = await self._constraints.make(wanted) if wanted is not None else None
        self._require_alive()
        if request.request_id in self._mailboxes:
            raise KasaError(f"request id {request.request_id!r} is in use")
        seq = Sequence(request, self._slots.find(request.adapter), self._num_merges, constraint)
        mailbox: asyncio.Queue[Delivery] = asyncio.Queue()
        self._mailboxes[request.request_id] = mailbox
        finished = False
        try:
            self._inbox.put(lambda: self._scheduler.add(seq))
            while not finished:
                delivery = await mailbox.get()
                if isinstance(delivery, BaseException):
                    finished = True
                    raise delivery
                finished = delivery.finish_reason is not None
                yield delivery
        finally:
            if finished:
                del self._mailboxes[request.request_id]
            else:
                seq.cancelled = True  # seen at the next step
                await asyncio.shield(asyncio.ensure_future(self._let_go(request.request_id)))

    async def load_adapter(self, adapter: AdapterWeights, instead_of: str | None = None) -> None:
        self._require_alive()
        if adapter.max_rank > self.config.max_rank:
            raise CapacityExceeded(
                f"{adapter.key} has rank {adapter.max_rank}, this engine takes up to "
                f"{self.config.max_rank}; raise max_rank"
            )
        if unknown := sorted(adapter.modules.keys() - self._executor.layers):
            raise CapacityExceeded(f"{adapter.key}: this engine cannot adapt {unknown[0]}")
        await self._change(adapter, instead_of)

    async def unload_adapter(self, key: str) -> None:
        self._require_alive()
        await self._change(None, key)

    @carried_through
    async def merge_adapter(self, key: str) -> None:
        self._require_alive()
        async with self._residency:
            slot = self._slots.find(key)
            if slot == self._merged_slot:
                return
            commit = await self._prepare(self._executor.prepare_merge, slot, self._tails)
            await self._between_steps(lambda: self._commit_merge(slot, commit))

    @carried_through
    async def unmerge_adapter(self) -> None:
        self._require_alive()
        async with self._residency:
            if self._merged_slot == NO_SLOT:
                return
            commit = await self._prepare(self._executor.prepare_unmerge)
            await self._between_steps(lambda: self._commit_merge(NO_SLOT, commit))

    # --- changes of adapters ----------------------------------------------------------------------

    @carried_through
    async def _change(self, comes: AdapterWeights | None, goes: str | None) -> None:
        """Those that are wanted while another one is made ready are made ready together, for a step
        begins only after each."""
        change = Change(comes, goes, self._loop.create_future())
        self._changes.append(change)
        async with self._residency:
            if not change.done.done():
                changes, self._changes = self._changes, []
                await self._make(changes)
        await change.done

    async def _make(self, changes: list[Change]) -> None:
        """All by one commit. If that fails one after the other, so that each fails alone."""
        slots = self._slots.copy()
        contents: dict[int, AdapterWeights | None] = {}
        possible = []
        for change in changes:
            try:
                contents |= self._plan(change, slots)
                possible.append(change)
            except KasaError as error:
                _settle(change.done, error)
        try:
            if contents:
                prepare = self._executor.prepare_slots
                await self._between_steps(await self._prepare(prepare, contents, self._tails))
        except Exception as error:
            if len(possible) == 1:
                _settle(possible[0].done, error)
                return
            for change in possible:
                await self._make([change])
            return
        self._slots = slots
        for change in possible:
            _settle(change.done, None)

    def _plan(self, change: Change, slots: SlotTable) -> dict[int, AdapterWeights | None]:
        """What slots will hold, and in `slots` whose they will be. Raises CapacityExceeded."""
        contents: dict[int, AdapterWeights | None] = {}
        if change.goes is not None and change.goes in slots:
            if slots.find(change.goes) == self._merged_slot:
                raise CapacityExceeded(f"{change.goes} is merged; unmerge it before unloading it")
            contents[slots.release(change.goes)] = None
        if change.comes is not None and change.comes.key not in slots:
            contents[slots.take(change.comes.key)] = change.comes
        return contents

    # --- step thread ------------------------------------------------------------------------------

    def step(self) -> list[EngineOutput]:
        """One iteration. Step thread only; public so that tests can read it and drive it."""
        now_s = time.monotonic()
        outputs = [self._end(seq, why) for seq, why in self._scheduler.expired(now_s)]
        batch = self._scheduler.schedule(now_s)
        if not batch.entries:
            return outputs
        sampling = batch.sampling
        logits = score_prompts(self._executor.run(batch.pack()), batch)
        tokens, logprobs = sample(logits, sampling, self._executor.eos_ids)
        self._num_steps += 1
        self._scheduler.computed(batch)
        return outputs + self._postprocess(sampling, tokens, logprobs)

    def _postprocess(
        self, sampled: list[Sequence], tokens: list[int], logprobs: list[TokenLogprobs | None]
    ) -> list[EngineOutput]:
        outputs = []
        for seq, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            seq.token_ids.append(token)
            if seq.constraint is not None and (error := seq.constraint.take(token)) is not None:
                self._scheduler.finish(seq)
                self._on_loop(self._fail, seq.request.request_id, error)
                continue
            reason = self._finish_reason(seq, token)
            if reason is not None:
                self._scheduler.finish(seq)
            found = (logprob,) if logprob is not None else ()
            of_prompt = seq.prompt_logprobs if seq.num_output_tokens == 1 else ()
            outputs.append(self._output(seq, (token,), found, reason, of_prompt))
        return outputs

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        sampling = seq.request.sampling
        if seq.constraint is not None:
            if seq.constraint.ended:
                return FinishReason.STOP
        elif token in self._executor.eos_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if sampling.max_tokens is not None and seq.num_output_tokens >= sampling.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.LENGTH if len(seq.token_ids) >= self.limits.context_length else None

    def _mode(self, seq: Sequence) -> Mode:
        if seq.slot == NO_SLOT:
            return Mode.BASE
        return Mode.MERGED if seq.slot == self._merged_slot else Mode.BATCHED

    def _end(self, seq: Sequence, reason: FinishReason) -> EngineOutput:
        self._scheduler.finish(seq)
        return self._output(seq, (), (), reason)

    def _output(
        self,
        seq: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        prompt_logprobs: Iterable[TokenLogprobs | None] = (),
    ) -> EngineOutput:
        return EngineOutput(
            seq.request.request_id,
            token_ids,
            logprobs,
            reason,
            seq.scheduled_s,
            self._mode(seq),
            seq.num_cached_tokens,
            tuple(prompt_logprobs),
        )

    def _run(self, started: asyncio.Future[None]) -> None:
        """The step thread: set up, then serve the inbox and step until closed or broken."""
        try:
            self._set_up()
        except BaseException as error:
            self._death = error
            self._on_loop(_settle, started, error)
            return
        self._on_loop(_settle, started, None)
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._serve_inbox()
                    outputs = self.step()
                    if outputs:
                        self._on_loop(self._dispatch, outputs)
        except BaseException as error:
            logger.exception("the step thread died")
            self._death = error
        self._on_loop(self._fail_all, self._death)
        self._executor.close()

    def _set_up(self) -> None:
        executor = self._executor = self._make_executor()
        self._scheduler = Scheduler(
            BlockManager(executor.num_blocks, executor.block_size),
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_prefill_tokens=self.config.max_prefill_tokens,
            prefix_caching=self.config.prefix_caching,
        )
        self.limits = EngineLimits(
            # A sequence that fits the cache alone can always finish, whatever else is preempted for
            # it.
            context_length=min(executor.context_length, executor.num_blocks * executor.block_size),
            vocab_size=executor.vocab_size,
            eos_ids=executor.eos_ids,
            max_slots=self.config.max_slots,
            max_rank=self.config.max_rank,
            executor=executor.name,
            dtype=executor.dtype,
            num_layers=executor.num_layers,
            num_parameters=executor.num_parameters,
        )

    def _serve_inbox(self) -> None:
        """Run what arrived; wait for something to arrive when there is nothing to step."""
        if not self._scheduler.has_work:
            self._inbox.get()()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _commit_merge(self, slot: int, commit: Commit) -> None:
        commit()
        self._merged_slot = slot
        self._num_merges += 1

    # --- crossing between the threads -------------------------------------------------------------

    async def _prepare(self, prepare: Callable[..., Commit], *args: object) -> Commit:
        """Run the slow half of a change on another thread."""
        try:
            return await in_background(prepare, *args)
        except Exception:
            self._require_alive()  # else the model is gone, which is all that this error says
            raise

    async def _between_steps(self, commit: Commit) -> None:
        """Run `commit` on the step thread before its next step, and wait for it."""
        self._require_alive()
        done: asyncio.Future[None] = self._loop.create_future()
        self._commits.add(done)
        done.add_done_callback(self._commits.discard)

        def on_step_thread() -> None:
            try:
                commit()
            except BaseException as error:
                self._on_loop(_settle, done, error)
                raise
            self._on_loop(_settle, done, None)

        self._inbox.put(on_step_thread)
        await done

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _dispatch(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:  # None: cancelled, and the engine died meanwhile
                mailbox.put_nowait(output)

    def _fail(self, request_id: str, error: KasaError) -> None:
        """End one request, whose sequence the step thread has let go of."""
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None:
            mailbox.put_nowait(error)

    def _fail_all(self, cause: BaseException | None) -> None:
        for request_id, mailbox in self._mailboxes.items():
            if cause is None:
                mailbox.put_nowait(EngineOutput(request_id, (), (), FinishReason.CANCELLED))
            else:
                mailbox.put_nowait(_dead(cause))
        for commit in tuple(self._commits):
            _settle(commit, _dead(cause))

    async def _let_go(self, request_id: str) -> None:
        """After a cancel: forget the request once the step thread has let go of its sequence."""
        while self.alive:
            delivery = await self._mailboxes[request_id].get()
            if isinstance(delivery, BaseException) or delivery.finish_reason is not None:
                break
        del self._mailboxes[request_id]

    def _require_alive(self) -> None:
        if self._closing or not self.alive:
            raise _dead(self._death)


def _dead(cause: BaseException | None) -> EngineDead:
    error = EngineDead(f"the engine has stopped ({cause or 'closed'}); restart the server")
    error.__cause__ = cause
    return error


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
