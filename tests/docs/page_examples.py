"""The examples of a Markdown page, in a shell or in Python: commands, what is shown of their
output, and the reason why some are not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt

SHELLS = {"bash", "console", "sh", "shell", "zsh", "fish"}
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")


@dataclass(frozen=True)
class Command:
    """`output` is what the page shows of it, "" where it shows nothing."""

    text: str
    output: str = ""


@dataclass(frozen=True)
class Block:
    """A block of code. `line` counts from 1; `reason` is why it is not run, or None."""

    line: int
    language: str
    content: str
    reason: str | None

    @property
    def is_run(self) -> bool:
        return self.reason is None and self.language in {*SHELLS, "python"}

    @property
    def commands(self) -> list[Command]:
        """For bash, one by one."""
        if self.language == "python":
            return [Command(f"python - <<'END'\n{self.content}END")]
        return list(_session(self.content) if self.language == "console" else _script(self.content))


def blocks(markdown: str) -> Iterator[Block]:
    """All blocks of code, in order. The language of an indented one is ""."""
    reason = None
    for token in MarkdownIt().parse(markdown):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            words = token.info.split()
            language = words[0].lower() if words else ""
            yield Block(token.map[0] + 1, language, token.content, reason)
        found = NOT_RUN.search(token.content) if token.type == "html_block" else None
        reason = found[1] if found else None


def _session(content: str) -> Iterator[Command]:
    """Of what a terminal shows: a line after `$ ` is a command, others are output."""
    parts = re.split(r"(?m)^\$ ", content)
    assert not parts[0].strip(), f"a console block begins with `$ `: {parts[0]!r}"
    for part in parts[1:]:
        [command] = re.findall(r"(?s)\A(?:[^\n]*\\\n)*[^\n]*\n?", part)
        yield Command(command.strip(), part.removeprefix(command).strip("\n"))


def _script(content: str) -> Iterator[Command]:
    for command in re.findall(r"(?m)^(?:.*\\\n)*.*$", content):
        if command.strip() and not command.lstrip().startswith("#"):
            yield Command(command.strip())
