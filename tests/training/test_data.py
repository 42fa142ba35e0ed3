"""Rows, templates, token ids and batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from kasa_runtime.errors import DataError
from kasa_runtime.training.config import DataSection
from kasa_runtime.training.data import IGNORED, Collator, encode, read_rows, shuffled

from .making import WriteRows


def section(path: Path, **changes: object) -> DataSection:
    return DataSection(train=path, prompt="{q} =>", completion=" {a}", **changes)


def test_loss_is_on_the_completion_and_the_end_token(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows("a.jsonl", [{"q": "one", "a": "1"}])
    item = encode(read_rows(path), section(path), tokenizer)[0]
    trained = [
        i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORED
    ]
    assert tokenizer.decode(item["input_ids"]) == "one => 1<|end|>"
    assert tokenizer.decode(trained) == " 1<|end|>"


def test_chat_wraps_the_prompt_as_a_user_message(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows("a.jsonl", [{"q": "one", "a": "1"}])
    data = DataSection(train=path, prompt="{q}", completion="{a}", chat=True, system="Count.")
    item = encode(read_rows(path), data, tokenizer)[0]
    want = "<|system|>Count.\n<|user|>one\n<|assistant|>1<|end|>"
    assert tokenizer.decode(item["input_ids"]) == want


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"rows.jsonl:2: not valid JSON"),
        ("[1]", r"rows.jsonl:2: want a JSON object, got list"),
        ({"q": "x"}, r"rows.jsonl:2: no field 'a', which ' \{a\}' needs; has q"),
        ({"q": "x", "a": " "}, r"rows.jsonl:2: the completion ' \{a\}' is empty"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, bad: object, message: str
) -> None:
    path = write_rows("rows.jsonl", [{"q": "one", "a": "1"}, bad])
    with pytest.raises(DataError, match=message):
        encode(read_rows(path), section(path), tokenizer)


def test_broken_template_is_a_data_error(write_rows: WriteRows) -> None:
    row = read_rows(write_rows("rows.jsonl", [{"q": "x"}]))[0]
    with pytest.raises(DataError, match="cannot fill in the template"):
        row.render("{q")


def test_missing_and_empty_files_are_data_errors(tmp_path: Path, write_rows: WriteRows) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"empty.jsonl: want at least one row"):
        read_rows(write_rows("empty.jsonl", [""]))


def test_rows_that_are_too_long_are_counted(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows("a.jsonl", [{"q": "x" * 50, "a": "1"}, {"q": "one", "a": "1"}])
    examples = encode(read_rows(path), section(path, max_length=20), tokenizer)
    assert (len(examples), examples.num_too_long) == (1, 1)
    assert "1 rows left out as too long" in examples.describe()
    with pytest.raises(DataError, match=r"all 2 rows are longer than max_length = 5 .* has 9"):
        encode(read_rows(path), section(path, max_length=5), tokenizer)


def test_order_depends_on_the_seed_alone(write_rows: WriteRows) -> None:
    rows = read_rows(write_rows("a.jsonl", [{"i": i} for i in range(50)]))
    orders = [[row.fields["i"] for row in shuffled(rows, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(50))
    assert [row.fields["i"] for row in shuffled(rows, seed=1, limit=3)] == orders[0][:3]


def test_batches_are_padded_on_the_right() -> None:
    batch = Collator(pad_id=9)(
        [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
