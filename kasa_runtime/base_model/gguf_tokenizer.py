"""The tokenizer of a GGUF file: transformers' reading, made to follow what the file says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from kasa_runtime.base_model.gguf_header import GgufHeader
from kasa_runtime.errors import ModelError

logger = logging.getLogger(__name__)

# `tokenizer.ggml.pre` names how text is cut before the merges. llama.cpp cuts these at digits,
_SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
# these as GPT-2 does, which is what transformers builds where it does not know better.
_PLAIN = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais"})


def save_tokenizer(gguf: Path, header: GgufHeader, directory: Path) -> None:
    """Write the tokenizer and the chat template of `gguf` into `directory`.

    Warns where the file names a way of cutting text that neither transformers nor we know. Raises
    ModelError where there is no tokenizer in the file, or none that transformers can build.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise ModelError(
            f"{gguf}: no tokenizer can be built from it ({error!r}); use the model's safetensors"
        ) from error
    _cut_as_the_file_says(gguf, header, tokenizer.backend_tokenizer)
    _add_what_the_file_says(header, tokenizer)
    if context_length := header.of_architecture("context_length"):
        tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(directory)
    _drop(directory / "tokenizer_config.json", "is_local", "local_files_only")


def _cut_as_the_file_says(gguf: Path, header: GgufHeader, backend: Any) -> None:
    """Set the pre-tokenizer of a byte-level BPE; other kinds have none to choose."""
    kind = header.of_tokenizer("pre", "")
    if header.of_tokenizer("model") != "gpt2":
        return
    if kind in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif kind not in _PLAIN and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning(
            "%s: its text splitting (tokenizer.ggml.pre = %r) is not known here, GPT-2's is used "
            "instead; prompts may become other tokens than the model was trained on: prefer the "
            "model's safetensors",
            gguf,
            kind,
        )


def _add_what_the_file_says(header: GgufHeader, tokenizer: Any) -> None:
    """Set whether `tokenizer(text)` adds BOS and EOS."""
    # where the file is silent, llama.cpp adds BOS to SentencePiece only
    is_sentencepiece = header.of_tokenizer("model") == "llama"
    tokenizer.add_bos_token = bool(header.of_tokenizer("add_bos_token", is_sentencepiece))
    tokenizer.add_eos_token = bool(header.of_tokenizer("add_eos_token", False))


def _drop(path: Path, *keys: str) -> None:
    """Remove what only says how the file was read."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
