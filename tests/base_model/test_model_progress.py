from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from kasa_runtime.base_model.progress import ConsoleProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_there_are_two_lines() -> None:
    said: list[str] = []
    with ConsoleProgress(said.append).track("Work", total=2, unit="steps") as advance:
        advance(1)
        advance(1)
    assert said[0] == "Work ..."
    assert said[1].startswith("Work: done in ")
    assert len(said) == 2


def test_bar_goes_on_while_stderr_is_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with (
        ConsoleProgress().track("Work", total=2, unit="steps") as advance,
        redirect_stderr(io.StringIO()) as silenced,
    ):
        advance(2)
    assert "2/2" in terminal.getvalue()
    assert silenced.getvalue() == ""
