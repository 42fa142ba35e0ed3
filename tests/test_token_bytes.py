from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kasa_runtime.token_bytes import TokenBytes

TEXT = "hello wörld 日本語 🙂\n\tx"


@pytest.fixture
def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello wörld"] * 4, trainer)
    return tokenizer


def test_bytes_of_a_byte_level_tokenizer_are_those_of_the_text(byte_level):
    token_bytes = TokenBytes(byte_level)
    parts = [token_bytes(token_id) for token_id in byte_level.encode(TEXT).ids]
    assert b"".join(parts) == TEXT.encode()
    assert any(len(part) == 1 and part[0] > 127 for part in parts)  # parts of characters, too


def test_bytes_of_a_sentencepiece_tokenizer_are_those_of_the_text():
    vocabulary = {"<unk>": 0, "▁hello": 1, "▁": 2, "<0xE6>": 3, "<0x97>": 4, "<0xA5>": 5, "ö": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    token_bytes = TokenBytes(tokenizer)
    assert b"".join(map(token_bytes, (1, 2, 3, 4, 5, 6))).decode() == " hello 日ö"


def test_a_special_token_is_its_name_and_one_that_is_none_nothing(byte_level):
    token_bytes = TokenBytes(byte_level)
    assert token_bytes(0) == b"<|end|>"
    assert token_bytes(99999) == b""


def test_a_tokenizer_without_a_decoder_has_tokens_too():
    tokenizer = Tokenizer(models.WordLevel({"fox": 0}, unk_token="fox"))
    assert TokenBytes(tokenizer)(0) == b"fox"
