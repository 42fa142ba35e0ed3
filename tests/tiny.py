"""A tiny Llama with random weights: small enough to make in a test, real enough to be one."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB = 128


def save_tiny_llama(directory: Path, *, seed: int = 0, **overrides: object) -> Path:
    """Save a Llama of three layers with grouped-query attention: every shape of a projection occurs
    (square, wide, tall), and its weights are large enough for an error in one of them to show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(directory)
    return directory


CHAT_VOCAB = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_chat_model(directory: Path, **overrides: object) -> Path:
    """The tiny Llama with a byte-level tokenizer, an end-of-sequence token (id 2) and a chat
    template beside it: all that a runtime needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    save_tiny_llama(directory, vocab_size=CHAT_VOCAB, **overrides)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CHAT_VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, again"] * 8, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


SENTENCEPIECE_VOCAB = 400


def save_tiny_sentencepiece_model(directory: Path, **overrides: object) -> Path:
    """The tiny Llama with a tokenizer as Llama's are: a sign for the space, byte fallback, the end
    of sequence is id 2. The model's vocabulary is larger than the tokenizer's."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    save_tiny_llama(directory, vocab_size=SENTENCEPIECE_VOCAB, **overrides)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "\u2581",
        *map(chr, range(0x21, 0x7F)),
        "th",
        "the",
        "\u2581the",
        "\u2581\u2581",
        '":',
    ]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581"), ('"', ":")]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    return directory
