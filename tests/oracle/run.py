"""Runs a schedule against a runtime and judges every token that came out of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from engine.making import config, few_blocks

from kasa_runtime.errors import AdapterInUse, AdapterNotFound, CapacityExceeded
from kasa_runtime.merging import MergeConfig
from kasa_runtime.runtime import Runtime
from kasa_runtime.runtime_config import RuntimeConfig
from kasa_runtime.types import (
    FinishReason,
    GenerationRequest,
    ManifestFile,
    Observer,
    SamplingParams,
    UploadManifest,
)
from oracle.reference import Reference
from oracle.schedule import NAMES, Action, Kind, make_schedule

MAX_OPEN = 24
"""Requests at the same time."""

MERGING = {
    "manual": MergeConfig(),
    # Of a dozen names that are asked for alike, one often has this much of so short a time.
    "auto": MergeConfig(
        "auto", merge_share=0.25, unmerge_share=0.2, merge_window_s=0.5, merge_dwell_s=0.0
    ),
}

MAX_LOOKS = 600
"""Tenths of a second without a token after which a run is taken to hang."""


@dataclass
class Answer:
    """What one request got."""

    action: Action
    allowed: set[str | None]  # versions that its name may stand for; None: the name is gone
    tokens: list[int] = field(default_factory=list)
    adapter: str = ""
    reason: FinishReason | None = None
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of a run: how many of everything, and what went wrong, line by line."""

    counts: Counter[str]
    wrong: list[str]


@dataclass
class Name:
    """What a name may stand for at this moment."""

    current: str | None = None
    coming: set[str | None] = field(default_factory=set)  # a change is under way to one of these
    seen: list[str] = field(default_factory=list)  # versions, in the order of their first upload
    change: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: list[Answer] = field(default_factory=list)  # requests whose version is not yet chosen


class Decisions(Observer):
    """Counts what auto mode does."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def merge_decided(self, adapter: str) -> None:
        self.counts["auto merge" if adapter else "auto unmerge"] += 1


async def play(
    model_dir: Path,
    reference: Reference,
    executor: str,
    *,
    seed: int,
    num_requests: int,
    mode: str = "manual",
) -> Outcome:
    """A schedule against a runtime of its own, short of everything: slots, cache, versions."""
    with tempfile.TemporaryDirectory() as adapters_dir:
        settings = RuntimeConfig(
            str(model_dir),
            Path(adapters_dir),
            poll_interval_s=0.02,
            keep_versions=3,
            merging=MERGING[mode],
            native=config(executor=executor, max_slots=3, max_num_seqs=8, **few_blocks(192)),
        )
        decisions = Decisions()
        async with await Runtime.create(settings, decisions) as runtime:
            run = Run(runtime, settings.adapters_dir, reference)
            outcome = await run.play(make_schedule(seed, num_requests))
        return Outcome(outcome.counts + decisions.counts, outcome.wrong)


class Run:
    """One schedule on one runtime, whose adapters directory is empty at first."""

    def __init__(self, runtime: Runtime, adapters_dir: Path, reference: Reference) -> None:
        self._runtime = runtime
        self._adapters_dir = adapters_dir
        self._reference = reference
        self._names: dict[str, Name] = {}
        self._answers: list[Answer] = []
        self._changes: set[asyncio.Task[None]] = set()
        self._requests: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._num_tokens = 0

    async def play(self, actions: list[Action]) -> Outcome:
        """All actions in order, each begun before those before it have ended, but for the uploads
        that come first."""
        for action in actions:
            if action.index == len(NAMES):  # how fast the first uploads are decides nothing
                await self._end_of(set(self._changes))
            await self._wait_for_tokens(action.wait_tokens)
            label = f"{action.index} {action.kind}"
            if action.kind is Kind.REQUEST:
                await self._room()
                self._requests.add(asyncio.create_task(self._request(action), name=label))
            else:
                self._changes.add(asyncio.create_task(self._change(action), name=label))
        await self._end_of(self._changes | self._requests)
        await asyncio.to_thread(self._judge)
        return Outcome(self._counts, self._wrong)

    async def _end_of(self, tasks: set[asyncio.Task[None]]) -> None:
        """Counted in looks, not by the clock: a machine that stands still is not a hang."""
        num_looks, num_tokens = 0, self._num_tokens
        while open_tasks := {t for t in tasks if not t.done()}:
            await asyncio.wait(open_tasks, timeout=0.1)
            num_looks = num_looks + 1 if num_tokens == self._num_tokens else 0
            num_tokens = self._num_tokens
            if num_looks == MAX_LOOKS:
                names = ", ".join(sorted(t.get_name() for t in open_tasks))
                self._wrong.append(f"nothing goes on any more; these have not ended: {names}")
                for task in open_tasks:
                    task.cancel()
                num_looks = 0

    async def _room(self) -> None:
        for _ in range(MAX_LOOKS):
            running = [t for t in self._requests if not t.done()]
            if len(running) < MAX_OPEN:
                return
            await asyncio.wait(running, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)

    async def _wait_for_tokens(self, count: int) -> None:
        wanted = self._num_tokens + count
        for _ in range(1000):  # not for ever: what runs may wait for a later action
            if self._num_tokens >= wanted or all(t.done() for t in self._requests):
                return
            await asyncio.sleep(0.001)

    # --- requests ---------------------------------------------------------------------------------

    async def _request(self, action: Action) -> None:
        answer = Answer(action, set())
        self._answers.append(answer)
        spec = self._spec(action, answer)
        request = GenerationRequest(
            f"{action.index}",
            spec,
            token_ids=action.prompt,
            sampling=SamplingParams(max_tokens=action.max_tokens),
            deadline_s=time.monotonic() + action.deadline_s if action.deadline_s else None,
            cache_salt=action.salt,
        )
        name = self._name(action.name)
        name.waiting.append(answer)
        try:
            async with aclosing(self._runtime.generate(request)) as chunks:
                async for chunk in chunks:
                    if answer in name.waiting:
                        name.waiting.remove(answer)
                    answer.tokens += chunk.token_ids
                    self._num_tokens += len(chunk.token_ids)
                    answer.adapter, answer.reason = chunk.adapter, chunk.finish_reason
                    if action.cancel_after and len(answer.tokens) >= action.cancel_after:
                        return
        except AdapterNotFound as error:
            answer.error = str(error)
        except Exception as error:  # whatever it is, it is a finding
            self._wrong.append(f"{action}: {error!r}")
        finally:
            if answer in name.waiting:
                name.waiting.remove(answer)

    def _spec(self, action: Action, answer: Answer) -> str:
        """What to ask for; fills in what may answer."""
        name = self._name(action.name)
        if not action.name:
            return ""
        if action.version >= 0 and name.seen:
            version = name.seen[action.version % len(name.seen)]
            answer.allowed = {version, None}  # retention may have removed it
            return f"{action.name}@{version}"
        answer.allowed = {name.current, *name.coming}
        return action.name

    # --- changes ----------------------------------------------------------------------------------

    async def _change(self, action: Action) -> None:
        changes: dict[Kind, Callable[[Action], Awaitable[object]]] = {
            Kind.UPLOAD: self._upload,
            Kind.COPY: self._copy,
            Kind.ROLLBACK: self._rollback,
            Kind.DELETE: self._delete,
            Kind.LOAD: lambda a: self._runtime.load_adapter(a.name),
            Kind.PIN: lambda a: self._runtime.load_adapter(a.name, pin=True),
            Kind.UNLOAD: lambda a: self._runtime.unload_adapter(a.name),
            Kind.MERGE: lambda a: self._runtime.merge_adapter(a.name),
            Kind.UNMERGE: lambda _: self._runtime.unmerge_adapter(),
        }
        try:
            await changes[action.kind](action)
            self._counts[action.kind] += 1
        except (AdapterNotFound, AdapterInUse, CapacityExceeded) as error:  # pins leave one slot
            self._counts[f"{action.kind}: {type(error).__name__}"] += 1
        except Exception as error:  # whatever it is, it is a finding
            self._wrong.append(f"{action}: {error!r}")

    async def _upload(self, action: Action) -> None:
        directory = self._reference.directories[action.content]
        files = {p.name: p.read_bytes() for p in directory.iterdir()}
        manifest = UploadManifest(
            action.name,
            tuple(
                ManifestFile(n, len(data), hashlib.sha256(data).hexdigest())
                for n, data in files.items()
            ),
        )
        version = self._reference.versions[action.content]
        async with self._moving(action.name, version):
            async with self._runtime.upload(manifest) as upload:
                for file, data in files.items():
                    await upload.write(file, 0, data)
                info = await upload.commit()
            if info.version != version:
                self._wrong.append(f"{action}: published as {info.version}, want {version}")

    async def _rollback(self, action: Action) -> None:
        name = self._name(action.name)
        if not name.seen:
            raise AdapterNotFound(f"{action.name} has no version yet", name=action.name)
        version = name.seen[action.version % len(name.seen)]
        async with self._moving(action.name, version):
            await self._runtime.rollback_adapter(action.name, version)

    async def _delete(self, action: Action) -> None:
        async with self._moving(action.name, None):
            await self._runtime.delete_adapter(action.name)

    async def _copy(self, action: Action) -> None:
        """As people do it: beside the old one, which then goes. Seen at some later time."""
        name = self._name(action.name)
        name.coming |= {self._reference.versions[action.content], None}
        for answer in name.waiting:
            answer.allowed |= name.coming
        source = self._reference.directories[action.content]
        async with name.change:
            await asyncio.to_thread(self._replace, source, self._adapters_dir / action.name)

    def _replace(self, source: Path, target: Path) -> None:
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(source, beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)

    def _moving(self, name: str, version: str | None) -> _Moving:
        return _Moving(self._name(name), version)

    def _name(self, name: str) -> Name:
        return self._names.setdefault(name, Name())

    # --- judgement --------------------------------------------------------------------------------

    def _judge(self) -> None:
        for answer in self._answers:
            action = answer.action
            if answer.error:
                self._counts["not found"] += 1
                if None not in answer.allowed:
                    self._wrong.append(f"{action}: {answer.error}, but the name was never gone")
                continue
            self._counts[answer.reason or "cancelled by its reader"] += 1
            wrong = self._wrong_version(answer) or self._wrong_end(answer)
            version = answer.adapter.partition("@")[2]
            if answer.reason is None:
                candidates = [v or "" for v in answer.allowed] or [""]
            else:
                candidates = [version]
            if not wrong:
                wrong = self._wrong_tokens(answer, candidates)
            if wrong:
                self._wrong.append(f"{action}: {wrong}; got {answer}")

    def _wrong_version(self, answer: Answer) -> str:
        name, _, version = answer.adapter.partition("@")
        if answer.reason is None or (answer.reason is FinishReason.DEADLINE and not name):
            return ""  # ended before it was told, or before a version was chosen
        if name != answer.action.name:
            return f"served by {answer.adapter!r}"
        if name and version not in answer.allowed:
            return f"served by version {version}, want one of {answer.allowed}"
        return ""

    def _wrong_end(self, answer: Answer) -> str:
        full = len(answer.tokens) == answer.action.max_tokens
        match answer.reason:
            case FinishReason.LENGTH:
                return "" if full else f"ended by length after {len(answer.tokens)} tokens"
            case FinishReason.STOP:
                return "" if answer.tokens[-1] == 2 else "stopped without an end of sequence"
            case FinishReason.DEADLINE:
                return "" if answer.action.deadline_s else "has no deadline"
            case None:
                return "" if answer.action.cancel_after else "has no end"
        return f"ended as {answer.reason}"

    def _wrong_tokens(self, answer: Answer, candidates: list[str]) -> str:
        """Empty if one of the versions gives these tokens."""
        wrong = ""
        for version in candidates:
            verdict = self._reference.check(version, answer.action.prompt, answer.tokens)
            if not verdict.wrong:
                self._counts["requests with a tie"] += verdict.num_ties > 0
                self._counts["tokens"] += len(answer.tokens)
                return ""
            wrong = verdict.wrong
        return wrong


class _Moving:
    """While a name moves to another version; changes of one name wait for each other."""

    def __init__(self, name: Name, version: str | None) -> None:
        self._name, self._version = name, version

    async def __aenter__(self) -> None:
        await self._name.change.acquire()
        self._name.coming.add(self._version)
        for answer in self._name.waiting:
            answer.allowed.add(self._version)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        name = self._name
        if kind is None:
            name.current = self._version
            if self._version is None:
                name.seen.clear()
            elif self._version not in name.seen:
                name.seen.append(self._version)
        name.coming.discard(self._version)
        name.change.release()
