"""The driver's end of a system's process. It is stopped whenever it is not asked, so that no thread
of its spins beside the system whose turn it is."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import Case
from benchmarks.peers.environments import (
    ROOT,
    PeerUnavailable,
    end_group,
    last_line,
    terminate_group,
)
from benchmarks.peers.measures import Record, measures

LOAD_TIMEOUT_S = 1800.0  # the first start on a machine converts, compiles, computes tails
WARM_UP_TOKENS = 4
WARM_UP_SEED = -1


class Process:
    """One system with its model loaded. Raises PeerUnavailable wherever it gives no answer. All its
    processes end with `close`, and when the driver is killed."""

    def __init__(
        self,
        name: str,
        command: list[str],
        variables: dict[str, str],
        settings: dict[str, Any],
        log: Path,
    ) -> None:
        self.name = name
        self._log = log
        self._vocab_size = settings["vocab_size"]
        self._warm: set[Case] = set()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=variables,
                text=True,
                start_new_session=True,  # Ctrl-C is the driver's; signals reach all its processes
            )
        self._watch = subprocess.Popen(
            ["sh", "-c", f"read _; kill -s KILL -- -{self.pid}"],  # once the driver's end is closed
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.versions: dict[str, str] = self._ask("load", settings, LOAD_TIMEOUT_S)["versions"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def measure(self, case: Case, round_: int, tokens: int, timeout_s: float) -> Record:
        """One round of one case, warmed up when it is the first since the adapters changed."""
        wanted = {"num_held": case.num_held, "merged": case.mix == "merged"}
        if self._ask("prepare", wanted, timeout_s)["changed"]:
            self._warm.clear()
        if case not in self._warm:
            self._run(case, WARM_UP_SEED, min(WARM_UP_TOKENS, tokens), timeout_s)
            self._warm.add(case)
        answer = self._run(case, round_, tokens, timeout_s)
        token_ids = answer.pop("token_ids")
        return Record(self.name, case, round_, measures(**answer), token_ids)

    def terminate(self) -> None:
        """Begin to end; `close` waits. vLLM takes 8 s."""
        terminate_group(self._process)

    def close(self) -> None:
        """Idempotent; a stopped process ends too."""
        self._watch.kill()
        self._watch.wait()
        end_group(self._process)
        for pipe in (self._process.stdin, self._process.stdout, self._watch.stdin):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of a message that nobody read
                pipe.close()

    def _run(self, case: Case, seed: int, tokens: int, timeout_s: float) -> dict[str, Any]:
        message = {
            "prompts": case.prompts(seed, self._vocab_size),
            "adapters": case.adapters(seed),
            "tokens": tokens,
        }
        return self._ask("run", message, timeout_s)

    def _ask(self, what: str, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._exchange(json.dumps({what: message}), timeout_s)
        except BaseException:
            self.close()
            raise
        if "error" in answer:
            self.close()
            raise PeerUnavailable(f"{answer['error']} ({self._log})")
        return answer

    def _exchange(self, line: str, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerUnavailable(f"it ended: {last_line(self._log)} ({self._log})") from None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise PeerUnavailable(f"no answer in {timeout_s:.0f} s ({self._log})")
        answer = self._process.stdout.readline()
        if not answer:
            raise PeerUnavailable(f"it ended: {last_line(self._log)} ({self._log})")
        self._signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(answer)
        return found

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)
