"""The bytes of tokens, against those that llguidance itself reads from the same tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer
from tiny import save_tiny_chat_model, save_tiny_sentencepiece_model
from tokenizers import Tokenizer, decoders, models, normalizers

from kasa_runtime.engine.native.vocabulary import Vocabulary
from kasa_runtime.errors import ModelError

EOS = {2}


def assert_the_same(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    vocabulary: Any = Vocabulary(tokenizer, size + 30, EOS)
    found = LLTokenizer(vocabulary, n_vocab=size + 30)
    want = LLTokenizer(tokenizer.to_str(), n_vocab=size + 30)
    assert found.vocab_size == want.vocab_size
    for token in range(size + 30):
        assert found.decode_bytes([token]) == want.decode_bytes([token]), token
        if token < size:
            assert found.is_special_token(token) == want.is_special_token(token), token


@pytest.mark.parametrize("save", [save_tiny_chat_model, save_tiny_sentencepiece_model])
def test_the_bytes_are_those_that_llguidance_finds(
    tmp_path: Path, save: Callable[[Path], Path]
) -> None:
    tokenizer = Tokenizer.from_file(str(save(tmp_path) / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "plain"])
    assert_the_same(tokenizer)


@pytest.mark.real_model
def test_the_bytes_of_a_real_one_too(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    vocabulary: Any = Vocabulary(tokenizer, size, EOS)
    want = LLTokenizer(tokenizer.to_str())
    plain = set(range(size)) - set(vocabulary.special_token_ids)
    assert all(vocabulary.tokens[token] == want.decode_bytes([token]) for token in plain)


@pytest.mark.parametrize("save", [save_tiny_chat_model, save_tiny_sentencepiece_model])
def test_a_text_becomes_tokens_of_exactly_its_bytes(
    tmp_path: Path, save: Callable[[Path], Path]
) -> None:
    """No space before it, no special token inside it, and nothing normalised."""
    tokenizer = Tokenizer.from_file(str(save(tmp_path) / "tokenizer.json"))
    before = [tokenizer.normalizer] if tokenizer.normalizer else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.NFC()])
    vocabulary = Vocabulary(tokenizer, tokenizer.get_vocab_size(), EOS)
    for text in ("yes", " the", '{"a": 1}', "é", "e\u0301", "a<|im_end|>b</s>", "\x02", ""):
        ids = vocabulary(text)
        assert b"".join(vocabulary.tokens[i] for i in ids) == text.encode(), text
        assert not set(ids) & set(vocabulary.special_token_ids), text
    assert len(vocabulary(" the quick")) < len(" the quick"), "in the model's own tokens"


def test_tokens_that_the_model_has_no_room_for_are_left_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(save_tiny_chat_model(tmp_path) / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer, 100, EOS)
    assert len(vocabulary.tokens) == 100
    assert max(vocabulary.special_token_ids) < 100


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_a_tokenizer_that_hides_its_bytes_is_refused(decoder: Any) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    tokenizer.decoder = decoder
    with pytest.raises(ModelError, match="byte fallback"):
        Vocabulary(tokenizer, 3, EOS)
