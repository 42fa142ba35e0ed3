"""A runtime without a model, which honours the interface of `kasa_runtime.runtime.Runtime`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from kasa_runtime.errors import (
    AdapterInUse,
    AdapterNotFound,
    DigestMismatch,
    InvalidRequest,
    Overloaded,
    VersionConflict,
)
from kasa_runtime.runtime import RuntimeConfig
from kasa_runtime.types import (
    AdapterInfo,
    AdapterMethod,
    AdapterState,
    AdapterTier,
    AdapterVersion,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    Mode,
    ModelInfo,
    Observer,
    RuntimeStats,
    Timing,
    TokenChunk,
    TokenLogprobs,
    UploadManifest,
    Usage,
)

MODEL = ModelInfo(
    name="fake",
    fingerprint="f00d",
    architecture="FakeForCausalLM",
    dtype="float32",
    context_length=2048,
    vocab_size=1000,
    num_layers=2,
    num_parameters=12345,
    engine="native",
    executor="torch",
    has_chat_template=True,
)
STYLE = AdapterInfo(
    name="style",
    version="abc123",
    state=AdapterState.READY,
    rank=8,
    alpha=16.0,
    method=AdapterMethod.KASA,
    truncation_rank=8,
    truncation_rule="min_dim",
    target_modules=("q_proj", "v_proj"),
    base_fingerprint="f00d",
    size_bytes=4096,
    create_time=1_700_000_000.5,
)
BROKEN = AdapterInfo(
    name="broken", version="", state=AdapterState.QUARANTINED, reason="adapter_config.json: no r"
)


class FakeUpload:
    def __init__(self, runtime: FakeRuntime, manifest: UploadManifest) -> None:
        self._runtime = runtime
        self._manifest = manifest
        self._staged = {file.path: b"" for file in manifest.files}

    async def write(self, path: str, offset: int, data: bytes) -> None:
        if path not in self._staged:
            raise InvalidRequest("chunk.path", f"must be in the manifest, got {path!r}")
        if offset != len(self._staged[path]):
            found = len(self._staged[path])
            raise InvalidRequest("chunk.offset", f"must be {found}, got {offset}")
        self._staged[path] += data

    async def commit(self) -> AdapterInfo:
        for file in self._manifest.files:
            data = self._staged[file.path]
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise DigestMismatch(f"{file.path}: other bytes", name=self._manifest.name)
        digest = hashlib.sha256(b"".join(self._staged.values())).hexdigest()
        self._runtime.uploaded = dict(self._staged)
        return self._runtime.put(replace(STYLE, name=self._manifest.name, version=digest))


class FakeRuntime:
    """Answers a prompt with its words. `delay_s` passes before each; `error` is raised instead."""

    def __init__(self, observer: Observer, *, delay_s: float = 0.0) -> None:
        self.alive = True
        self.config = RuntimeConfig()
        self.model = MODEL
        self.observer = observer
        self.delay_s = delay_s
        self.error: BaseException | None = None
        self.requests: list[GenerationRequest] = []
        self.running: set[str] = set()
        self.ended = asyncio.Event()
        self.drained_s: float | None = None
        self.closed = False
        self.answer = "hello there"  # to messages and token ids
        self.merged = ""
        self.uploaded: dict[str, bytes] = {}
        self._adapters = {info.name: info for info in (STYLE, BROKEN)}

    @property
    def ready(self) -> bool:
        return self.alive and self.drained_s is None

    async def drain(self, timeout_s: float) -> None:
        self.drained_s = timeout_s
        deadline_s = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.closed = True

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        if not self.ready:
            raise Overloaded("draining", retry_after_s=1.5)
        info = self.find(request.adapter) if request.adapter else None
        self.running.add(request.request_id)
        try:
            async for chunk in self._chunks(request, info):
                yield chunk
        finally:
            self.running.discard(request.request_id)
            self.ended.set()

    async def _chunks(
        self, request: GenerationRequest, info: AdapterInfo | None
    ) -> AsyncIterator[TokenChunk]:
        words = (request.prompt or self.answer).split()[: request.sampling.max_tokens]
        prompt = (request.prompt or "").split() or list(request.token_ids or ())
        reason = FinishReason.STOP
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        if request.prompt_logprobs is not None:
            rest = (TokenLogprobs(i, -0.25, ((i, -0.25),)) for i in range(1, len(prompt)))
            prompt_logprobs = (None, *rest)
        for index, word in enumerate(words):
            await asyncio.sleep(self.delay_s)
            if request.deadline_s is not None and time.monotonic() > request.deadline_s:
                reason = FinishReason.DEADLINE
                break
            logprobs = ()
            if request.sampling.logprobs is not None:
                logprobs = (TokenLogprobs(index, -0.5, ((index, -0.5), (7, -1.5))),)
            first = {"prompt_logprobs": prompt_logprobs} if index == 0 else {}
            yield TokenChunk(word + " ", (index,), logprobs, **first)
        yield TokenChunk(
            text="",
            token_ids=(),
            finish_reason=reason,
            usage=Usage(prompt_tokens=len(words), completion_tokens=len(words)),
            adapter=f"{info.name}@{info.version}" if info else "",
            mode=Mode.BATCHED if info else Mode.BASE,
            timing=Timing(0.01, 0.02, 0.03),
        )

    def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: tuple[ChatMessage, ...] | None = None,
        tools: tuple[object, ...] = (),
    ) -> list[int]:
        text = prompt if prompt is not None else "".join(m.content for m in messages or ())
        return [len(word) for word in text.split()]

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        return [f"t{token_id} ".encode() for token_id in token_ids]

    def list_adapters(self) -> list[AdapterInfo]:
        return list(self._adapters.values())

    async def get_adapter(self, name: str) -> AdapterInfo:
        return self.find(name)

    async def list_adapter_versions(self, name: str) -> list[AdapterVersion]:
        info = self.find(name)
        current = AdapterVersion(info.version, True, 4096, 1.5, info.state, info.tier, 2)
        return [current, AdapterVersion("0ld", False, 1024, 0.5)]

    def find(self, name: str) -> AdapterInfo:
        info = self._adapters.get(name.partition("@")[0])
        if info is None:
            raise AdapterNotFound(f"no adapter {name!r}", name=name)
        return info

    def put(self, info: AdapterInfo) -> AdapterInfo:
        self._adapters[info.name] = info
        self.observer.adapters_changed(self.list_adapters())
        return info

    @asynccontextmanager
    async def upload(self, manifest: UploadManifest) -> AsyncIterator[FakeUpload]:
        current = self._adapters.get(manifest.name)
        expected = manifest.expected_version
        if expected is not None and expected != (current.version if current else ""):
            raise VersionConflict(f"expected {expected!r}", name=manifest.name)
        yield FakeUpload(self, manifest)

    async def delete_adapter(self, name: str) -> None:
        self.find(name)
        if self.merged == name:
            raise AdapterInUse(f"{name} is merged; unmerge it first", name=name)
        del self._adapters[name]
        self.observer.adapters_changed(self.list_adapters())

    async def rollback_adapter(self, name: str, version: str) -> AdapterInfo:
        return self.put(replace(self.find(name), version=version or "0ld"))

    async def load_adapter(self, name: str, *, pin: bool = False) -> AdapterInfo:
        loaded = {"state": AdapterState.RESIDENT, "tier": AdapterTier.SLOT}
        return self.put(replace(self.find(name), **loaded, pinned=pin))

    async def unload_adapter(self, name: str) -> AdapterInfo:
        unloaded = {"state": AdapterState.READY, "tier": AdapterTier.DISK}
        return self.put(replace(self.find(name), **unloaded, pinned=False))

    async def merge_adapter(self, name: str) -> AdapterInfo:
        self.merged = name
        return self.put(replace(self.find(name), state=AdapterState.MERGED))

    async def unmerge_adapter(self) -> None:
        self.merged = ""

    def stats(self) -> RuntimeStats:
        resident = {
            info.name: info.tier
            for info in self.list_adapters()
            if info.tier is not AdapterTier.DISK
        }
        shares = {"": 0.25, "style@abc123": 0.5, "style@def456": 0.25}
        return RuntimeStats(
            *(len(self.running), 0, 0.25, 30, 20, self.merged, resident, shares, 512),
            num_slots=4,
            num_steps=7,
            num_preemptions=1,
            running_adapters={"style": 2},
            waiting_adapters={"": 1, "unknown": 2, "warm": 1},
        )
