"""Kills processes that change one adapters directory, at random moments, and looks at what is left.

python benchmarks/crash.py [--rounds N] [--seed S] [--directory DIR]

In each round two processes upload, take in, roll back and delete adapters of their own names in the
same directory; retention removes old versions all the time. One of them is killed (SIGKILL), the
other one has to go on. Then a new store is opened, as a start would, and must show of every name
exactly the state after the last acknowledged change, or after the one that was cut off; every
version whole by its digest; and nothing on the disk that belongs to neither.

Prints how many kills hit which change, and how often the state was the old and the new one. Exits
with 1, naming the round, if anything is wrong. It kills processes and not the machine: the order of
flushes is tested elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kasa_runtime.adapter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.content import content_digest
from kasa_runtime.adapter.store import AdapterStore

KEEP_VERSIONS = 2
NAMES = (("a", "b"), ("c", "d"))
"""Of each process."""
LONGEST_LIFE_S = 0.06
CHUNKS = 8
CHUNK_BYTES = 64 << 10


@dataclass(frozen=True)
class Change:
    """One change of the directory: upload, take_in, rollback or delete."""

    kind: str
    name: str
    content: str = ""


@dataclass(frozen=True)
class State:
    """What a name stands for: contents, not versions. `versions`: oldest first."""

    current: str
    versions: tuple[str, ...]
    seen: str = ""


States = dict[str, State]


def expected(states: States, change: Change) -> States:
    """The states after a change: what the store promises, told a second time."""
    before = states.get(change.name)
    if change.kind == "delete":
        return {name: state for name, state in states.items() if name != change.name}
    if change.kind == "rollback":
        assert before is not None
        return states | {change.name: replace(before, current=change.content)}
    if change.kind == "take_in" and before is not None and before.seen == change.content:
        return states
    older = before.versions if before is not None else ()
    replaced = before.current if before is not None else None
    order = [v for v in older if v not in (change.content, replaced)]
    order += [v for v in (replaced, change.content) if v is not None]
    seen = change.content if change.kind == "take_in" else (before.seen if before else "")
    versions = tuple(dict.fromkeys(order))[-KEEP_VERSIONS:]
    return states | {change.name: State(change.content, versions, seen)}


def random_changes(draw: random.Random, names: tuple[str, ...], states: States) -> Iterator[Change]:
    """Changes that are possible one after the other, for ever."""
    while True:
        name = draw.choice(names)
        kind = draw.choices(("upload", "take_in", "rollback", "delete"), (4, 3, 2, 1))[0]
        if kind in ("rollback", "delete") and name not in states:
            continue
        content = ""
        if kind == "rollback":
            content = draw.choice(states[name].versions)
        elif kind != "delete":
            content = str(draw.randrange(8))
        change = Change(kind, name, content)
        states = expected(states, change)
        yield change


def write_files(directory: Path, name: str, content: str) -> None:
    """An adapter as the store knows one: two files, the larger one written piece by piece."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps({"name": name, "content": content}))
    with (directory / WEIGHTS_FILE).open("wb", buffering=0) as stream:
        for _ in range(CHUNKS):
            stream.write(content.encode() * CHUNK_BYTES)


def digest_of(name: str, content: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        write_files(Path(directory), name, content)
        return content_digest(Path(directory))


def make(store: AdapterStore, change: Change, digests: dict[tuple[str, str], str]) -> None:
    match change.kind:
        case "upload":
            with store.staging() as staged:
                write_files(staged, change.name, change.content)
                store.publish(change.name, staged)
        case "take_in":
            write_files(store.root / change.name, change.name, change.content)
            store.take_in(change.name, lambda _: None)
        case "rollback":
            store.set_current(change.name, digests[change.name, change.content])
        case "delete":
            store.delete(change.name)


class Process:
    """Changes the directory in a process of its own until it is killed or told to stop."""

    def __init__(self, root: Path, changes: Iterator[Change], digests: dict[tuple[str, str], str]):
        self._journal, writing = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it can be handled
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                status = self._run(root, changes, digests, writing)
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.close(writing)

    @staticmethod
    def _run(
        root: Path, changes: Iterator[Change], digests: dict[tuple[str, str], str], journal: int
    ) -> int:
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        store = AdapterStore(root, KEEP_VERSIONS)
        while not stopped:
            change = next(changes)
            os.write(journal, json.dumps(vars(change)).encode() + b"\n")
            make(store, change, digests)
            os.write(journal, b"done\n")
        return 0

    def end(self, number: signal.Signals) -> tuple[list[Change], Change | None]:
        """Changes that were acknowledged, and the one that was cut off."""
        os.kill(self._pid, number)
        with open(self._journal, "rb") as stream:
            lines = stream.read().splitlines()
        _, status = os.waitpid(self._pid, 0)
        wanted = -number if number is signal.SIGKILL else 0
        if os.waitstatus_to_exitcode(status) != wanted:
            raise SystemExit("a process failed beside the one that was killed; see above")
        changes = [Change(**json.loads(line)) for line in lines if line != b"done"]
        is_cut_off = bool(lines) and lines[-1] != b"done"
        return (changes[:-1], changes[-1]) if is_cut_off else (changes, None)


def found_states(store: AdapterStore, contents: dict[str, tuple[str, str]]) -> States:
    """What the directory says. Raises ValueError if a version is torn or another name's."""
    found = {}
    for name in store.names():
        for version in (store.current(name).version, *store.versions(name)):
            directory = store.version(name, version).directory
            if content_digest(directory) != version or contents[version][0] != name:
                raise ValueError(f"{name}@{version} is torn")
        record = json.loads((store.root / ".kasa" / "names" / f"{name}.json").read_text())
        found[name] = State(
            contents[record["current"]][1],
            tuple(contents[v][1] for v in record["versions"]),
            contents[record["seen"]][1] if record["seen"] else "",
        )
    return found


def leftovers(store: AdapterStore) -> list[Path]:
    """What belongs to no name."""
    state = store.root / ".kasa"
    names = store.names()
    known = {state / "names" / f"{name}.json" for name in names}
    known |= {state / "versions" / name for name in names}
    known |= {state / "versions" / n / v for n in names for v in store.versions(n)}
    there = [*(state / "staging").iterdir(), *(state / "names").iterdir()]
    there += [path for pattern in ("*", "*/*") for path in (state / "versions").glob(pattern)]
    return sorted(set(there) - known)


@dataclass
class Tally:
    """Kills by the change they hit; those that left the old and the new state."""

    hit: Counter[str] = field(default_factory=Counter)
    outcome: Counter[str] = field(default_factory=Counter)
    num_changes: int = 0


def crash_once(
    root: Path,
    draw: random.Random,
    states: States,
    digests: dict[tuple[str, str], str],
    tally: Tally,
) -> States:
    """One round. The states that it left; raises ValueError if they are not what was promised."""
    processes = [
        Process(root, random_changes(random.Random(draw.random()), names, states), digests)
        for names in NAMES
    ]
    time.sleep(draw.uniform(0, LONGEST_LIFE_S))
    acknowledged, cut_off = processes[0].end(signal.SIGKILL)
    others, _ = processes[1].end(signal.SIGTERM)
    for change in (*acknowledged, *others):
        states = expected(states, change)
    tally.num_changes += len(acknowledged) + len(others)
    tally.hit[cut_off.kind if cut_off else "nothing"] += 1

    store = AdapterStore(root, KEEP_VERSIONS)
    found = found_states(store, {digest: key for key, digest in digests.items()})
    after = expected(states, cut_off) if cut_off else states
    if found not in (states, after):
        raise ValueError(f"{cut_off}: found {found}, want {states} or {after}")
    tally.outcome["new" if cut_off and found == after else "old"] += 1
    if left := leftovers(store):
        raise ValueError(f"{cut_off}: left over are {left}")
    for name in {name for own in NAMES for name in own} - found.keys():
        # A directory that is there would be taken in again, as that of a cut off take_in may be.
        is_half_copied = cut_off == Change("take_in", name, cut_off.content if cut_off else "")
        if (root / name).exists() and not is_half_copied:
            raise ValueError(f"{cut_off}: {root / name} is there, though {name} was deleted")
        shutil.rmtree(root / name, ignore_errors=True)
    return found


def main(arguments: argparse.Namespace) -> int:
    draw = random.Random(arguments.seed)
    names = [name for own in NAMES for name in own]
    digests = {(name, str(i)): digest_of(name, str(i)) for name in names for i in range(8)}
    tally, states = Tally(), States()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for index in range(arguments.rounds):
            try:
                states = crash_once(Path(directory), draw, states, digests, tally)
            except ValueError as error:
                print(f"round {index}: {error}", file=sys.stderr)
                return 1
    print(f"{arguments.rounds} kills, {tally.num_changes} changes acknowledged, none lost or torn")
    print("hit:   " + "  ".join(f"{kind} {count}" for kind, count in tally.hit.most_common()))
    print("found: " + "  ".join(f"{kind} {count}" for kind, count in tally.outcome.most_common()))
    return 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
