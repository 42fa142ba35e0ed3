"""Packing and batches of token ids."""

from __future__ import annotations

from kasa_runtime.training.examples import IGNORED, Collator, Example, Examples, packed


def example(*ids: int) -> Example:
    return Example(ids, ids)


def batch_of(*examples: Example, pad_id: int = 9) -> dict[str, list[list[int]]]:
    batch = Collator(pad_id)([{"example": e} for e in examples])
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_batches_are_padded_on_the_right() -> None:
    assert batch_of(Example((1, 2, 3), (IGNORED, 2, 3)), Example((4,), (4,))) == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 2, 3], [4, IGNORED, IGNORED]],
    }


def test_encoders_get_one_label_a_row_and_the_kinds_of_their_tokens() -> None:
    batch = batch_of(Example((1, 2), 1, token_type_ids=(0, 1)), Example((3,), 0))
    assert batch["labels"] == [1, 0]
    assert batch["token_type_ids"] == [[0, 1], [0, 0]]
    assert batch_of(Example((1,), 2.5), Example((3,), 0.0))["labels"] == [2.5, 0.0]


def test_padding_that_equals_a_label_is_not_masked_by_its_value() -> None:
    """Where the padding token is the end-of-sequence token."""
    assert batch_of(Example((1, 9), (1, 9)), Example((9,), (9,)))["labels"] == [
        [1, 9],
        [9, IGNORED],
    ]


def test_packing_takes_the_first_sequence_with_room() -> None:
    bins = packed([example(1, 1, 1), example(2, 2), example(3), example(4, 4)], max_length=4)
    assert [b.input_ids for b in bins] == [(1, 1, 1, 3), (2, 2, 4, 4)]
    assert [b.positions for b in bins] == [(0, 1, 2, 0), (0, 1, 0, 1)]


def test_no_packed_sequence_is_told_from_the_one_before() -> None:
    (row,) = packed([example(1, 2), example(3, 4), example(5)], max_length=5)
    assert row.labels == (IGNORED, 2, IGNORED, 4, IGNORED)


def test_packed_batches_have_positions_instead_of_a_mask() -> None:
    """Padding is one more sequence."""
    bins = packed([example(1, 1, 1), example(2, 2), example(3)], max_length=4)
    batch = batch_of(*bins)
    assert batch["position_ids"] == [[0, 1, 2, 0], [0, 1, 0, 1]]
    assert batch["input_ids"] == [[1, 1, 1, 3], [2, 2, 9, 9]]
    assert "attention_mask" not in batch


def test_packing_keeps_every_token_and_never_exceeds_the_length() -> None:
    examples = [example(*[i] * (1 + i * 7 % 13)) for i in range(300)]
    bins = packed(examples, max_length=16)
    assert max(map(len, bins)) <= 16
    assert sum(map(len, bins)) == sum(map(len, examples))
    assert len(bins) < 1.1 * sum(map(len, examples)) / 16


def test_a_set_says_what_is_in_it() -> None:
    examples = [example(1, 2), example(3)]
    assert Examples(examples, num_rows=2).describe() == "2 rows, 3 tokens"
    few = Examples(packed(examples, 4), num_rows=2, num_too_long=1)
    assert few.describe() == "2 rows, 3 tokens in 1 sequences (1 rows left out as too long)"
