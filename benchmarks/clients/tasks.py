"""Tasks for lm-eval: rows as files of its own kind, and a configuration that reads nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TEAMS = ("account", "billing", "sales", "shipping", "technical")
ANSWERS = "Answer format: "
"""What comes before the choices in rows in the form of LLM-Adapters."""


@dataclass(frozen=True)
class Row:
    """One question. `choices` follow `text` as they are; without them `target` is to be written."""

    text: str
    choices: tuple[str, ...] = ()
    gold: int = 0  # which of the choices is right
    target: str = ""


@dataclass(frozen=True)
class Task:
    """What is scored: by the likelihood of its choices, or by the text that is written."""

    name: str
    rows: tuple[Row, ...]

    @property
    def is_choice(self) -> bool:
        return bool(self.rows[0].choices)

    def write(self, directory: Path) -> None:
        """Rows and configuration, which is JSON and so YAML too."""
        rows = (directory / f"{self.name}.jsonl").absolute()
        rows.write_text("".join(json.dumps(asdict(row)) + "\n" for row in self.rows))
        (directory / f"{self.name}.yaml").write_text(json.dumps(self._configuration(rows)))

    def _configuration(self, rows: Path) -> dict[str, Any]:
        common = {
            "task": self.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "doc_to_text": "{{text}}",
            "target_delimiter": "",
        }
        if self.is_choice:
            return common | {
                "output_type": "multiple_choice",
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc"}],
            }
        return common | {
            "output_type": "generate_until",
            "doc_to_target": "{{target}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 48},
            "filter_list": [{"name": "text", "filter": [{"function": "remove_whitespace"}]}],
            "metric_list": [{"metric": "exact_match"}],
        }


def tickets(path: Path, limit: int) -> tuple[Task, Task]:
    """Of the tickets of examples/tickets: which team it is for, and the whole routing line."""
    rows = list(_read_lines(path, limit))
    prompts = [f"{row['ticket']} =>" for row in rows]
    choices = tuple(f" team={team}" for team in TEAMS)
    golds = [choices.index(" " + row["route"].partition(" | ")[0]) for row in rows]
    team = (Row(text, choices, gold) for text, gold in zip(prompts, golds, strict=True))
    route = (Row(text, target=row["route"]) for text, row in zip(prompts, rows, strict=True))
    return Task("tickets_team", tuple(team)), Task("tickets_route", tuple(route))


def multiple_choice(path: Path, limit: int) -> Task:
    """A JSON array in the form of LLM-Adapters, whose instructions end with the possible answers.
    Named for the file."""
    rows = json.loads(path.read_text())[:limit]
    return Task(path.stem.lower().replace("-", "_"), tuple(map(_of_instruction, rows)))


def _of_instruction(row: dict[str, str]) -> Row:
    question, _, answers = row["instruction"].rpartition(ANSWERS)
    choices = answers.strip().split("/")
    return Row(
        f"{question.strip()}\n\nthe correct answer is",
        tuple(f" {choice}" for choice in choices),
        choices.index(row["answer"]),
    )


def _read_lines(path: Path, limit: int) -> Iterator[dict[str, str]]:
    lines: Iterable[str] = path.read_text().splitlines()[:limit]
    return map(json.loads, lines)
