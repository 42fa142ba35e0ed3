"""Turn the SNIPS custom intent engines into the JSONL files of run.toml.

    git clone https://github.com/sonos/nlu-benchmark
    python examples/snips/convert.py nlu-benchmark/2017-06-custom-intent-engines

Reads <Intent>/train_<Intent>_full.json and <Intent>/validate_<Intent>.json. A sentence is there a
list of pieces of text, some of which name the slot that they fill.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def read(path: Path, intent: str) -> list[dict[str, str]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:  # some of the files are not UTF-8
        text = raw.decode("latin-1")
    return [row(sentence["data"], intent) for sentence in json.loads(text)[intent]]


def row(pieces: list[dict[str, Any]], intent: str) -> dict[str, str]:
    slots = [f"{p['entity']}={p['text'].strip()}" for p in pieces if "entity" in p]
    text = "".join(piece["text"] for piece in pieces)
    return {"text": " ".join(text.split()), "target": f"{intent}({'; '.join(slots)})"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the SNIPS data set.")
    parser.add_argument("folder", type=Path, help="2017-06-custom-intent-engines")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    intents = sorted(path.parent.name for path in arguments.folder.glob("*/train_*_full.json"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, pattern in (("train", "train_{}_full.json"), ("test", "validate_{}.json")):
        files = [(arguments.folder / name / pattern.format(name), name) for name in intents]
        rows = [found for path, name in files for found in read(path, name)]
        lines = [json.dumps(found, ensure_ascii=False) + "\n" for found in rows]
        (arguments.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
