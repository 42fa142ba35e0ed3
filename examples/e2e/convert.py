"""Turn the CSV files of the E2E NLG challenge into the JSONL files of run.toml.

    git clone https://github.com/tuetschek/e2e-dataset
    python examples/e2e/convert.py e2e-dataset/devset.csv e2e-dataset/testset_w_refs.csv

The first file becomes data/train.jsonl, one row per text; the second data/test.jsonl, one row per
meaning representation with all its texts. Both have the columns mr and ref. With --hold-out N, the
first text of every Nth meaning representation of the first file goes into data/eval.jsonl, and all
of its texts stay out of data/train.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [(row["mr"].strip(), row["ref"].strip()) for row in csv.DictReader(stream)]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the E2E data set.")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--hold-out", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    rows = read(arguments.train)
    meanings = list(dict.fromkeys(mr for mr, _ in rows))
    held_out = set(meanings[:: arguments.hold_out]) if arguments.hold_out else set()
    first = {mr: ref for mr, ref in reversed(rows) if mr in held_out}
    train = [{"mr": mr, "ref": ref} for mr, ref in rows if mr not in held_out]
    if first:
        write(arguments.out / "eval.jsonl", [{"mr": mr, "ref": ref} for mr, ref in first.items()])
    references: dict[str, list[str]] = {}
    for mr, ref in read(arguments.test):
        references.setdefault(mr, []).append(ref)
    write(arguments.out / "train.jsonl", train)
    write(
        arguments.out / "test.jsonl", [{"mr": mr, "refs": refs} for mr, refs in references.items()]
    )


if __name__ == "__main__":
    main()
