"""The scripts in examples/ that make or convert data, on small inputs of the published forms."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tickets_are_the_committed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "tickets/make_data.py", "--out", tmp_path)
    for split in ("train", "dev", "test"):
        committed = EXAMPLES / "tickets" / "data" / f"{split}.jsonl"
        assert (tmp_path / f"{split}.jsonl").read_bytes() == committed.read_bytes()


def test_test_tickets_use_phrasings_that_training_lacks() -> None:
    data = EXAMPLES / "tickets" / "data"
    train = " ".join(row["ticket"] for row in rows(data / "train.jsonl"))
    assert "drops its connection every few minutes" not in train
    assert any("drops its connection" in row["ticket"] for row in rows(data / "test.jsonl"))


def test_tickets_have_the_facts_of_their_route_in_the_text() -> None:
    for row in rows(EXAMPLES / "tickets" / "data" / "test.jsonl"):
        route = dict(part.split("=") for part in row["route"].split(" | "))
        assert list(route) == ["team", "priority", "product", "ref"]
        assert route["product"] in row["ticket"]
        assert route["ref"] == "none" or route["ref"] in row["ticket"]


def test_e2e_csv_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = tmp_path / "set.csv"
    csv.write_text('mr,ref\n"name[A], area[B]","A is, at B."\n"name[A], area[B]",At B is A.\n')
    run(monkeypatch, "e2e/convert.py", csv, csv, "--out", tmp_path)
    mr = "name[A], area[B]"
    assert rows(tmp_path / "train.jsonl")[0] == {"mr": mr, "ref": "A is, at B."}
    assert rows(tmp_path / "test.jsonl") == [{"mr": mr, "refs": ["A is, at B.", "At B is A."]}]


def test_snips_json_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "PlayMusic"
    folder.mkdir()
    pieces = [{"text": "play "}, {"text": "café", "entity": "album"}, {"text": " now"}]
    text = json.dumps({"PlayMusic": [{"data": pieces}]}, ensure_ascii=False)
    (folder / "train_PlayMusic_full.json").write_bytes(text.encode("latin-1"))
    (folder / "validate_PlayMusic.json").write_bytes(text.encode("utf-8"))
    out = tmp_path / "out"
    run(monkeypatch, "snips/convert.py", tmp_path, "--out", out)
    want = [{"text": "play café now", "target": "PlayMusic(album=café)"}]
    assert rows(out / "train.jsonl") == rows(out / "test.jsonl") == want
