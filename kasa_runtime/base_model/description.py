"""What a model directory holds, told without loading a weight."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kasa_runtime.errors import ModelError

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class Description:
    """The numbers of a base model that its config and the headers of its weights tell."""

    architecture: str
    model_type: str
    num_parameters: int  # as stored: tied embeddings count once
    dtype: str  # of most parameters
    context_length: int  # tokens; 0 where the config does not say
    num_layers: int
    hidden_size: int
    vocab_size: int
    has_chat_template: bool


def describe(directory: Path) -> Description:
    """Read config.json and the headers of the safetensors. Raises ModelError for a damaged one."""
    from transformers import AutoConfig  # seconds of import

    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: its config.json cannot be used: {error}") from error
    text = config.get_text_config()
    counts = _count_by_dtype(directory)
    dtype = max(counts, key=lambda name: counts[name], default="")
    return Description(
        architecture=next(iter(config.architectures or ()), ""),
        model_type=config.model_type,
        num_parameters=counts.total(),
        dtype=_DTYPE_NAMES.get(dtype, dtype.lower()),
        context_length=getattr(text, "max_position_embeddings", None) or 0,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        has_chat_template=_has_chat_template(directory),
    )


def _count_by_dtype(directory: Path) -> Counter[str]:
    """Elements of the safetensors files by their dtype's name there."""
    counts: Counter[str] = Counter()
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in _read_tensor_table(path).items():
            if name != "__metadata__":
                counts[tensor["dtype"]] += prod(tensor["shape"])
    return counts


def _read_tensor_table(path: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file: tensor name -> dtype, shape, offsets."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            table: dict[str, Any] = json.loads(file.read(length))
    except (OSError, struct.error, ValueError, OverflowError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from error
    return table


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    try:  # where tokenizers kept it before transformers 4.51
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("chat_template"))
