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
