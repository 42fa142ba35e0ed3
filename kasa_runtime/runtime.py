"""The library's front door: one base model, many adapters, `generate`.

    request -> tokenizer -> lease on an adapter version -> engine -> detokenizer -> chunks

Importing this module is light; torch comes with `Runtime.create`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kasa_runtime.adapter.names import is_name
from kasa_runtime.admission import Admission, Visit
from kasa_runtime.background import in_background, on_loop_clock
from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import (
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
    KasaError,
    ShuttingDown,
)
from kasa_runtime.limits import Limits, LimitsConfig
from kasa_runtime.merging import AutoMerge, MergeConfig, MergePolicy
from kasa_runtime.types import (
    BASE,
    AdapterInfo,
    AdapterVersion,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Observer,
    RuntimeStats,
    TokenChunk,
    UploadManifest,
)

if TYPE_CHECKING:
    from kasa_runtime.adapter.manager import AdapterManager
    from kasa_runtime.adapter.residency import Lease
    from kasa_runtime.adapter.upload import Upload
    from kasa_runtime.engine.base import Engine
    from kasa_runtime.engine.factory import Begun
    from kasa_runtime.generation import Generation
    from kasa_runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

POLL_S = 0.05


@dataclass(frozen=True)
class RuntimeConfig:
    """What to serve, and how."""

    model: str = field(
        default="smollm2-135m",
        metadata={"help": "directory of safetensors, .gguf file, hub id, or smollm2-135m"},
    )
    adapters_dir: Path = field(
        default=Path("adapters"), metadata={"help": "where adapters are put and uploaded to"}
    )
    engine: Literal["native", "vllm"] = field(
        default="native",
        metadata={"help": "what generates: the embedded engine, or vLLM (a package of its own)"},
    )
    poll_interval_s: float = field(
        default=1.0,
        metadata={
            "help": "seconds that a directory of adapters has to stay as it is before it counts as "
            "complete; also between looks at it where polling is needed"
        },
    )
    watch: Literal["auto", "poll"] = field(
        default="auto",
        metadata={
            "help": "how changes of the adapters directory are noticed: the file system tells, or "
            "polling; auto polls on network mounts"
        },
    )
    keep_versions: int = field(
        default=5, metadata={"help": "versions of an adapter that are kept for rollback"}
    )
    start_wait_s: float = field(
        default=2.0,
        metadata={
            "help": "seconds that a start waits at most for adapters that no earlier one has "
            "checked; the rest is checked while others are served, what is asked for first"
        },
    )
    host_cache_gib: float = field(
        default=1.0,
        metadata={
            "help": "memory for adapters that are in no slot, in GiB: they come back without being "
            "read again; 0: none"
        },
    )
    pin: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "an adapter that always has a slot, whatever version the name stands for; may "
            "be given several times, at most max_slots - 1 times"
        },
    )
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    merging: MergeConfig = field(default_factory=MergeConfig)
    native: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ConfigError(f"keep_versions must be at least 1, got {self.keep_versions}")
        if not self.poll_interval_s > 0:
            raise ConfigError(f"poll_interval_s must be above 0, got {self.poll_interval_s}")
        for name in ("start_wait_s", "host_cache_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in self.pin:
            if not is_name(name):
                raise ConfigError(f"pin must be the name of an adapter, got {name!r}")
        if len(set(self.pin)) >= self.native.max_slots and self.pin:
            raise ConfigError(
                f"pin has {len(set(self.pin))} names, and of the {self.native.max_slots} slots at "
                "least one has to be left to others; pin fewer or raise max_slots"
            )


@dataclass(frozen=True)
class Beginning:
    """A start that is under way. `graph`: where one is being compiled."""

    model_dir: Path
    graph: Begun | None
    tokenizer: Future[Tokenizer]


def begin(config: RuntimeConfig) -> Beginning:
    """Find the model and begin what can be begun without torch, so that a program may import what
    else it needs before it calls `Runtime.create`. Raises ModelError."""
    from kasa_runtime.base_model.source import resolve
    from kasa_runtime.engine.factory import begin as begin_graph
    from kasa_runtime.tokenizer import Tokenizer

    model_dir = resolve(config.model)
    graph = begin_graph(model_dir, config.native) if config.engine == "native" else None
    reader = ThreadPoolExecutor(1, "kasa-tokenizer")
    tokenizer = reader.submit(Tokenizer, model_dir)
    reader.shutdown(wait=False)
    return Beginning(model_dir, graph, tokenizer)


class Runtime:
    """One model and its adapters, served. Event loop only; make it with `create`."""

    def __init__(
        self,
        config: RuntimeConfig,
        model: ModelInfo,
        engine: Engine,
        manager: AdapterManager,
        tokenizer: Tokenizer,
        observer: Observer,
    ) -> None:
        self.config = config
        self._model = model
        self._engine = engine
        self._manager = manager
        self._tokenizer = tokenizer
        self._observer = observer
        self._admission = self._make_admission()
        manager.when_slots_change(self._admission.advance)
        self._draining = False
        self._cut_off = asyncio.Event()
        self._merge_policy = MergePolicy(config.merging)
        self._auto_merge: AutoMerge | None = None
        if config.merging.mode == "auto":
            self._auto_merge = AutoMerge(config.merging, manager, observer, self._merge_policy)
        self._fetching_ahead = asyncio.Semaphore(1)
        self._ahead: set[asyncio.Task[None]] = set()
        # Threads of its own: the loop's are at times all busy with adapters and their tails.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    @classmethod
    async def create(
        cls,
        config: RuntimeConfig,
        observer: Observer | None = None,
        begun: Beginning | None = None,
    ) -> Runtime:
        """Load the base model, start the engine, take in the adapters directory. `begun`: what
        `begin` returned for this configuration. Raises ModelError, ConfigError."""
        observer = observer or Observer()
        if begun is None:
            begun = await in_background(begin, config)
        model_dir = begun.model_dir
        # Here and not before: torch is imported while what was begun goes on.
        from kasa_runtime.adapter.manager import AdapterManager
        from kasa_runtime.adapter.store import AdapterStore
        from kasa_runtime.adapter.tails import TailCache
        from kasa_runtime.engine.factory import make_engine

        # First of what may import transformers, which no two threads can at once.
        tokenizer = await asyncio.wrap_future(begun.tokenizer)
        tails = await in_background(TailCache.for_model, model_dir)
        store = AdapterStore(config.adapters_dir, config.keep_versions)
        engine = make_engine(
            config.engine, model_dir, tails, config.native, begun.graph, tokenizer.backend
        )
        await engine.start()
        manager = AdapterManager(
            store,
            tails,
            engine,
            max_slots=engine.limits.max_slots,
            observer=observer,
            max_host_bytes=int(config.host_cache_gib * 2**30),
            pinned=config.pin,
            poll_interval_s=config.poll_interval_s,
            force_polling=config.watch == "poll",
        )
        try:
            await manager.start(config.start_wait_s)
        except BaseException:
            await engine.close()
            raise
        model = _describe(config, model_dir, tails.base.fingerprint, engine, tokenizer)
        # What is there now stays: a garbage collection that looked through all of it would hold up
        # a step by a tenth of a second.
        gc.freeze()
        return cls(config, model, engine, manager, tokenizer, observer)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for those in flight, at most `timeout_s`; then cancel the
        rest."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._admission.num_in_flight and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        self._cut_off.set()

    async def close(self) -> None:
        """Stop watching and stepping; running requests end as cancelled."""
        self._draining = True
        for task in self._ahead:
            task.cancel()
        if self._auto_merge is not None:
            await self._auto_merge.close()
        await self._manager.close()
        await self._engine.close()
        gc.unfreeze()
        self._encoding.shutdown(wait=False)

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return self.alive and not self._draining

    @property
    def alive(self) -> bool:
        """False once the engine has stopped."""
        return self._engine.alive

    @property
    def model(self) -> ModelInfo:
        return self._model

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one generation, the last with its end. Closing the generator cancels, at the
        next step.

        Raises, before the first chunk: InvalidRequest, AdapterNotFound, AdapterQuarantined,
        AdapterInvalid, CapacityExceeded, Overloaded, LimitExceeded, EngineDead."""
        from kasa_runtime.generation import Generation

        detokenizer = self._tokenizer.detokenizer(request.sampling)
        generation = Generation(request, time.monotonic(), detokenizer, self._observer)
        try:
            self._refuse_if_draining()
            with self._admission.visit(generation.name) as visit:
                self._observer.queued(generation.name)
                loop = asyncio.get_running_loop()
                encoding = loop.run_in_executor(self._encoding, self._encode, request)
                generation.prompt_ids = await encoding
                async with aclosing(self._run(generation, visit)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            generation.abandon()
            raise
        except BaseException as error:
            self._observer.failed(generation.name, error)
            raise
        finally:
            generation.tell_trace()

    def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: tuple[ChatMessage, ...] | None = None,
        tools: tuple[Mapping[str, Any], ...] = (),
    ) -> list[int]:
        """The ids that `generate` would start from. Blocking. Raises InvalidRequest."""
        if messages is not None:
            return self._tokenizer.encode_chat(messages, tools)
        return self._tokenizer.encode(prompt or "")

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """What each token stands for; of a special one, its name. b"" where there is no such
        token."""
        return [self._tokenizer.token_bytes(token_id) for token_id in token_ids]

    def list_adapters(self) -> list[AdapterInfo]:
        """By name; a quarantined one says why."""
        return self._manager.list()

    async def get_adapter(self, name: str) -> AdapterInfo:
        """`name` or `name@version`; a quarantined one is returned, not raised. Raises
        AdapterNotFound."""
        return await self._manager.get(name)

    async def list_adapter_versions(self, name: str) -> list[AdapterVersion]:
        """What `name@version` and a rollback can reach, latest first. Raises AdapterNotFound,
        AdapterQuarantined (nothing is served of it)."""
        return await self._manager.versions(name)

    def upload(self, manifest: UploadManifest) -> AbstractAsyncContextManager[Upload]:
        """Stage an adapter; see `Upload`. Leaving the context without `commit` discards it."""
        return self._manager.upload(manifest)

    async def delete_adapter(self, name: str) -> None:
        """Remove a name with all its versions. Raises AdapterNotFound, AdapterInUse (one is merged;
        in auto mode it is unmerged instead), StoreReadOnly."""
        await self._unmerge_in_auto_mode(name)
        await self._manager.delete(name)

    async def rollback_adapter(self, name: str, version: str) -> AdapterInfo:
        """Make an older version current again. `version` "": the one before the current."""
        return await self._manager.rollback(name, version)

    async def load_adapter(self, name: str, *, pin: bool = False) -> AdapterInfo:
        """Bring into an engine slot ahead of its first request if one is free or idle, else into
        memory beside the engine. `pin`: wait for a slot, and keep the name in it until it is
        unloaded, whatever version it comes to stand for. Raises CapacityExceeded if no slot would
        be left for others."""
        return await self._manager.load(name, pin=pin)

    async def unload_adapter(self, name: str) -> AdapterInfo:
        """Free its memory, and its slot once no request holds it; it is pinned no longer. Raises
        AdapterInUse when merged; in auto mode it is unmerged instead."""
        await self._unmerge_in_auto_mode(name)
        return await self._manager.unload(name)

    async def merge_adapter(self, name: str) -> AdapterInfo:
        """Write it into the weights: its requests cost nothing extra, all others go on exactly. In
        auto mode it stays for the dwell time, after which traffic decides again."""
        info = await self._manager.merge(name)
        self._merge_policy.switched()
        return info

    async def unmerge_adapter(self) -> None:
        """Put the pristine weights back; no-op when nothing is merged. In auto mode nothing is
        merged for the dwell time, after which traffic decides again."""
        await self._manager.unmerge()
        self._merge_policy.switched()

    def stats(self) -> RuntimeStats:
        engine = self._engine.stats()
        return RuntimeStats(
            num_requests_running=engine.num_running,
            num_requests_waiting=max(0, self._admission.num_in_flight - engine.num_running),
            kv_cache_usage=engine.kv_cache_usage,
            prefix_cache_queries=engine.prefix_cache_queries,
            prefix_cache_hits=engine.prefix_cache_hits,
            merged_adapter=self._manager.merged or BASE,
            resident_adapters=self._manager.resident_names(),
            host_tier_bytes=self._manager.host_tier_bytes,
            token_shares=self._merge_policy.shares() if self._auto_merge is not None else {},
            num_slots=self._engine.limits.max_slots,
            num_steps=engine.num_steps,
            num_preemptions=engine.num_preemptions,
            running_adapters=self._admission.num_inside,
            waiting_adapters=self._admission.num_waiting,
        )

    # --- inside -----------------------------------------------------------------------------------

    async def _unmerge_in_auto_mode(self, spec: str) -> None:
        """What nobody asked to merge, nobody has to unmerge."""
        if self._auto_merge is None or self._manager.merged is None:
            return
        name, _, version = spec.partition("@")
        merged_name, _, merged_version = self._manager.merged.partition("@")
        if name == merged_name and merged_version.startswith(version):
            await self.unmerge_adapter()

    def _make_admission(self) -> Admission:
        native = self.config.native
        # Beside those that run, as many as end in a step, so that no place is empty in the next.
        num_ready = min(-(-native.max_num_seqs // 4), native.max_queue // 4)
        return Admission(
            Limits(self.config.limits),
            max_in_flight=native.max_num_seqs + native.max_queue,
            max_inside=native.max_num_seqs + 2 * num_ready,
            reserve=num_ready,
            max_slots=self._engine.limits.max_slots,
            always_in_slots=self._manager.always_in_slots,
        )

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise ShuttingDown("this server is shutting down; try another", retry_after_s=5.0)

    async def _exists(self, name: str) -> bool:
        """Whether there is such an adapter; names that clients make up take no place."""
        if name == BASE:
            return True
        try:
            await self._manager.get(name)
        except AdapterNotFound:
            return False
        return True

    def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        """The prompt's ids, checked against the model's limits. Raises InvalidRequest naming the
        field."""
        limits = self._engine.limits
        if request.token_ids is not None:
            where, ids = "tokens.ids", request.token_ids
        elif request.messages is not None:
            ids = tuple(self._tokenizer.encode_chat(request.messages, request.tools))
            where = "chat"
        else:
            where, ids = "prompt", tuple(self._tokenizer.encode(request.prompt or ""))
        if not ids:
            raise InvalidRequest(where, "must not be empty")
        # Of a text, too: a tokenizer may know more tokens than the model.
        if bad := [i for i in ids if not 0 <= i < limits.vocab_size]:
            raise InvalidRequest(where, f"want ids from 0 to {limits.vocab_size - 1}, got {bad[0]}")
        allowed = self.config.limits.max_prompt_tokens or len(ids)
        if len(ids) > allowed:
            raise InvalidRequest(where, f"has {len(ids)} tokens, this server takes {allowed}")
        if len(ids) >= limits.context_length:
            raise InvalidRequest(
                where, f"has {len(ids)} tokens, the context holds {limits.context_length}"
            )
        max_tokens = request.sampling.max_tokens
        room = limits.context_length - len(ids)
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequest(
                "sampling.max_tokens",
                f"want at most {room} after a prompt of {len(ids)} tokens, got {max_tokens}",
            )
        return ids

    async def _run(self, generation: Generation, visit: Visit) -> AsyncGenerator[TokenChunk, None]:
        from kasa_runtime.engine.base import EngineRequest

        request = generation.request
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(on_loop_clock(request.deadline_s)):
                    if await self._exists(generation.name):
                        self._fetch_ahead(request.adapter, visit)
                        await visit.enter(len(generation.prompt_ids))
                    generation.admitted_s = time.monotonic()
                    lease = await stack.enter_async_context(self._lease(request.adapter))
            except TimeoutError:
                yield generation.end(FinishReason.DEADLINE)
                return
            generation.lease, generation.leased_s = lease, time.monotonic()
            engine_request = EngineRequest(
                request.request_id,
                generation.prompt_ids,
                request.sampling,
                adapter=lease.key if lease else None,
                deadline_s=request.deadline_s,
                client=generation.name,
                cache_salt=request.cache_salt,
                prompt_logprobs=request.prompt_logprobs,
                structured_output=request.structured_output,
            )
            key = lease.key if lease else BASE
            self._merge_policy.count(key, len(generation.prompt_ids))
            outputs = await stack.enter_async_context(
                aclosing(self._engine.generate(engine_request))
            )
            async for output in outputs:
                visit.charge(len(output.token_ids))
                chunk = generation.advance(output)
                self._merge_policy.count(key, len(output.token_ids))
                if chunk.finish_reason is None and self._cut_off.is_set():
                    chunk = generation.end(FinishReason.CANCELLED, chunk)
                yield chunk
                if chunk.finish_reason is not None:
                    return

    def _fetch_ahead(self, adapter: str, visit: Visit) -> None:
        """Bring an adapter into memory while its request waits, if it has to. One at a time: what
        is to be loaded now is not held up."""

        async def fetch() -> None:
            async with self._fetching_ahead:
                if visit.waiting:
                    with suppress(KasaError, OSError):  # the request will learn of it
                        await self._manager.fetch(adapter)

        if adapter != BASE:
            task = asyncio.create_task(fetch(), name=f"fetch ahead {adapter}")
            self._ahead.add(task)
            task.add_done_callback(self._ahead.discard)

    @asynccontextmanager
    async def _lease(self, adapter: str) -> AsyncIterator[Lease | None]:
        if adapter == BASE:
            yield None
            return
        async with self._manager.lease(adapter) as lease:
            yield lease


def _describe(
    config: RuntimeConfig, model_dir: Path, fingerprint: str, engine: Engine, tokenizer: Tokenizer
) -> ModelInfo:
    limits = engine.limits
    architectures = json.loads((model_dir / "config.json").read_text()).get("architectures")
    return ModelInfo(
        name=config.model if not Path(config.model).exists() else Path(config.model).name,
        fingerprint=fingerprint,
        architecture=(architectures or [""])[0],
        dtype=limits.dtype,
        context_length=limits.context_length,
        vocab_size=limits.vocab_size,
        num_layers=limits.num_layers,
        num_parameters=limits.num_parameters,
        engine=config.engine,
        executor=limits.executor,
        has_chat_template=tokenizer.has_chat_template,
    )
