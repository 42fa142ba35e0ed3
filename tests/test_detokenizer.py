"""Token ids to text: whole characters only, and nothing that a stop string may take back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kasa_runtime.detokenizer import Detokenizer

CORPUS = [
    "the stop is near, stop the stopping",
    "héllo wörld",
    "世界 你好",  # two characters of three bytes each, twice
    "smile 🙂 family 👨‍👩‍👧",
    "hello hello the the",
]
TEXTS = [*CORPUS, "\n\n", "a\ufffdb", "ends with é", "🙂🙂", ""]


def byte_level_bpe() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def sentencepiece_like() -> Any:
    """Pieces with "▁" for a space and bytes as <0xNN>, as Llama 2's and Gemma's tokenizers have."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "▁stop", *"abdehlnoprst"]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES, SENTENCEPIECE = byte_level_bpe(), sentencepiece_like()
TOKENIZERS = {"byte-level": BYTES, "sentencepiece": SENTENCEPIECE}


def encode(text: str, tokenizer: Any = BYTES) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def decode(ids: Sequence[int], tokenizer: Any = BYTES) -> str:
    return str(tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces(detokenizer: Detokenizer, ids: Iterable[int]) -> list[str]:
    return [detokenizer.push([i]) for i in ids]


def spelled(text: str) -> list[int]:
    """One token for each byte, whatever merges the tokenizer knows."""
    return [i for byte in text.encode() for i in [BYTES.convert_tokens_to_ids(BYTE_NAMES[byte])]]


def _byte_names() -> dict[int, str]:
    """The printable characters that stand for bytes in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


BYTE_NAMES = _byte_names()


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that is complete first; of those that are complete at the same
    character, up to the one that begins first."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


# --- characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_make_the_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = encode(text, tokenizer)
    detokenizer = Detokenizer(tokenizer.backend_tokenizer)
    found = "".join(pieces(detokenizer, ids)) + detokenizer.finish()
    assert found == decode(ids, tokenizer)


@pytest.mark.parametrize("text", ["é", "世", "🙂", "👨‍👩‍👧"])
def test_no_part_of_a_character_is_given_out(text: str) -> None:
    found = pieces(Detokenizer(BYTES.backend_tokenizer), spelled(text))
    assert "".join(found) == text
    assert [len(piece.encode()) for piece in found if piece] == [len(c.encode()) for c in text]
    assert all("\ufffd" not in piece for piece in found)


def test_special_tokens_have_no_text() -> None:
    ids = [*encode("hello"), BYTES.eos_token_id]
    assert "".join(pieces(Detokenizer(BYTES.backend_tokenizer), ids)) == "hello"


def test_ids_that_the_tokenizer_does_not_know_have_no_text() -> None:
    """A model's vocabulary is often padded."""
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    ids = [*encode("a"), 10_000, *encode("b"), 10_000]
    assert "".join(pieces(detokenizer, ids)) + detokenizer.finish() == "ab"


def test_several_tokens_at_once() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    ids = encode("hello wörld 🙂")
    assert detokenizer.push(ids[:4]) + detokenizer.push(()) + detokenizer.push(ids[4:]) == (
        "hello wörld 🙂"
    )


def test_an_unfinished_character_at_the_end_is_left_out() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    assert "".join(pieces(detokenizer, [*encode("hello "), *spelled("🙂")[:3]])) == "hello "
    assert detokenizer.finish() == ""


def test_text_behind_bytes_that_are_no_character_is_not_lost() -> None:
    broken = spelled("🙂")[1:2]
    ids = [*broken, *spelled("\ufffd"), *broken, *spelled("é")[:1]]
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    assert (
        "".join(pieces(detokenizer, [*encode("a"), *ids, *encode("b")]))
        == "a\ufffd\ufffd\ufffd\ufffdb"
    )
    ids = [*broken, *spelled("x"), *broken]
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    assert detokenizer.push(ids) + detokenizer.finish() == "\ufffdx"


def test_a_stop_string_in_the_text_that_comes_last() -> None:
    joiner = "\u200d"
    glued = [i for i in range(len(BYTES)) if joiner in decode([i]) and decode([i])[-1] == "\ufffd"]
    detokenizer = Detokenizer(BYTES.backend_tokenizer, [joiner])
    assert detokenizer.push([*encode("a"), glued[0]]) == "a"
    assert not detokenizer.finish().strip("\ufffd")
    assert detokenizer.stopped


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=30))
def test_any_tokens_give_what_decoding_all_gives(ids: list[int]) -> None:
    """Bytes that are no character, too: a model may say anything."""
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    found = "".join(pieces(detokenizer, ids)) + detokenizer.finish()
    assert found.rstrip("\ufffd") == decode(ids).rstrip("\ufffd")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(SENTENCEPIECE) - 1), max_size=30))
def test_broken_bytes_do_not_break_the_stream(ids: list[int]) -> None:
    """Here bytes that are no character take the ones before them along, which were given out."""
    detokenizer = Detokenizer(SENTENCEPIECE.backend_tokenizer)
    found = "".join(pieces(detokenizer, ids)) + detokenizer.finish()
    whole = decode(ids, SENTENCEPIECE)
    assert found == whole or "\ufffd" in whole
    assert found.count(" the") + found.startswith("the") >= whole.count(" the")


# --- stop strings --------------------------------------------------------------------------------


def test_a_stop_string_over_several_tokens_is_cut() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["hello"])
    found = pieces(detokenizer, spelled("so hello there"))
    assert "".join(found) == "so "
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


def test_text_that_may_begin_a_stop_string_waits() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["stop!"])
    assert pieces(detokenizer, spelled("a sto")) == ["a", " ", "", "", ""]
    assert pieces(detokenizer, spelled("ne")) == ["ston", "e"]


def test_what_waited_is_given_out_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["stop!"])
    assert "".join(pieces(detokenizer, spelled("full stop"))) == "full "
    assert detokenizer.finish() == "stop"
    assert detokenizer.finish() == ""


def test_a_stop_string_that_restarts_inside_itself() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["aab"])
    assert "".join(pieces(detokenizer, spelled("aaaab"))) == "aa"
    assert detokenizer.stopped


def test_the_first_of_overlapping_stop_strings_counts() -> None:
    for stops, want in (
        (["hello wo", "lo"], "say hel"),
        (["o w", "hello w"], "say "),
        (["the", "there"], "say hello world "),
    ):
        detokenizer = Detokenizer(BYTES.backend_tokenizer, stops)
        assert "".join(pieces(detokenizer, spelled("say hello world there"))) == want


def test_a_stop_string_of_characters_of_several_bytes() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["🙂世"])
    assert "".join(pieces(detokenizer, spelled("a🙂🙂世界"))) == "a🙂"
    assert detokenizer.stopped


def test_tokens_after_the_stop_give_nothing() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["."])
    assert detokenizer.push([*encode("one"), *encode("."), *encode("two")]) == "one"
    assert detokenizer.push(encode("three")) == detokenizer.finish() == ""


def test_stop_strings_before_min_tokens_are_text() -> None:
    ids = spelled("a.b.c.d")
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["."], min_tokens=4)
    assert pieces(detokenizer, ids) == ["a", ".", "b", "", "", "", ""]
    assert detokenizer.stopped


def test_a_stop_string_that_begins_before_min_tokens_does_not_count() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["ab"], min_tokens=2)
    assert "".join(pieces(detokenizer, spelled("a"))) == "a"
    detokenizer = Detokenizer(BYTES.backend_tokenizer, ["ab"], min_tokens=3)
    assert "".join(pieces(detokenizer, spelled("xabx"))) == "xabx"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.text("abé世🙂", max_size=14),
    st.lists(st.text("abé世🙂", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=40),
)
def test_the_pieces_are_the_whole_cut_at_the_first_stop(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    """However the tokens arrive."""
    ids, detokenizer, found = spelled(text), Detokenizer(BYTES.backend_tokenizer, stops), ""
    for size in [*sizes, len(ids)]:
        step, ids = ids[:size], ids[size:]
        found += detokenizer.push(step)
        assert text.startswith(found)
    assert found + detokenizer.finish() == cut(text, stops)
    assert detokenizer.stopped == any(s in text for s in stops)
