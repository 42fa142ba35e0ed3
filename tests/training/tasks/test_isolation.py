"""Packed sequences do not see each other, and models in which they would are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.examples import Collator, Example, packed
from kasa_runtime.training.tasks.isolation import check_isolation

from ..making import make_model

LENGTHS = (7, 1, 5, 9, 3, 12, 2, 1, 1)


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_packed_logits_are_those_of_each_sequence_alone(make: type, attention: str) -> None:
    """In several rows, some of them padded, and sequences of a single token."""
    model: LlamaForCausalLM = make()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(1, 257, (n,), generator=generator).tolist() for n in LENGTHS]
    rows = packed([Example(tuple(ids), tuple(ids)) for ids in drawn], max_length=16)
    batch = Collator(pad_id=0)([{"example": example} for example in rows])
    assert len({len(example) for example in rows}) > 1, "no row is padded"
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        for example, found in zip(rows, logits, strict=True):
            starts = [i for i, position in enumerate(example.positions) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(example)], strict=True):
                alone = model(torch.tensor([example.input_ids[start:end]])).logits[0]
                torch.testing.assert_close(found[start:end], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_models_that_isolate_pass(make: type, dtype: torch.dtype) -> None:
    check_isolation(make().to(dtype))


def test_recurrent_models_are_refused() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=257, hidden_size=32, state_size=4, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"MambaForCausalLM .* does not keep packed rows apart"):
        check_isolation(MambaForCausalLM(config))
