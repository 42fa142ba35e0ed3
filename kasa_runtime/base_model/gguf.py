"""GGUF to a directory of safetensors: every weight dequantised once, to float32.

Reading and dequantising is transformers' own GGUF loading. What it leaves out is done here: it
loads a model that cannot be saved, invents weights that the file lacks, drops tensors and rope
scaling that it does not know.
"""

from __future__ import annotations

import copy
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from kasa_runtime.base_model import provenance
from kasa_runtime.base_model.cache import disk_errors, require_free
from kasa_runtime.base_model.gguf_header import GgufHeader, read_header
from kasa_runtime.base_model.gguf_tokenizer import save_tokenizer
from kasa_runtime.errors import ModelError

# what transformers raises for files that it cannot map to a model
_LOAD_ERRORS = (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError, OSError)


def convert(gguf: Path, directory: Path, origin: provenance.Origin) -> None:
    """Write `gguf` into `directory` as float32 safetensors, configs, tokenizer and chat template.

    The same file gives the same bytes. Tied embeddings are stored once. Raises ModelError where the
    file is torn, its architecture is not supported, or some of it cannot be expressed exactly.
    """
    header = read_header(gguf)
    _refuse_rope_scaling(gguf, header)
    with disk_errors(directory), _quiet():
        require_free(directory, 4 * sum(header.num_elements.values()))
        model, config = _load(gguf)
        _require_every_tensor(gguf, header, model)
        _save(model, config, _generation_config(header), directory)
        save_tokenizer(gguf, header, directory)
        licence = origin.licence or str(header.metadata.get("general.license", ""))
        provenance.write(directory, replace(origin, licence=licence), _details(header))


def _load(gguf: Path) -> tuple[PreTrainedModel, PretrainedConfig]:
    untyped: Any = AutoModelForCausalLM  # the annotations do not know output_loading_info
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(gguf.parent, **where)
        model, info = untyped.from_pretrained(
            gguf.parent,
            config=copy.deepcopy(config),  # given, so that the file is not parsed for it twice more
            dtype=torch.float32,
            output_loading_info=True,
            **where,
        )
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"{gguf}: cannot be converted ({error}); want a GGUF of a decoder-only model that "
            "transformers can read, or use the model's safetensors"
        ) from error
    # transformers fills these with random numbers and only logs it
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{gguf}: lacks {len(missing)} tensors of {type(model).__name__}, the first is "
            f"{missing[0]}; use the model's safetensors"
        )
    return model, config


def _refuse_rope_scaling(gguf: Path, header: GgufHeader) -> None:
    # transformers reads neither of the two ways of stating it, and would serve other positions
    scaling = header.of_architecture("rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensor_types or scaling != "none":
        raise ModelError(
            f"{gguf}: scales its rotary embedding, which the conversion would lose; use the "
            "model's safetensors"
        )


def _require_every_tensor(gguf: Path, header: GgufHeader, model: PreTrainedModel) -> None:
    """Compare counts of elements: each of the file is in the model once, by any name."""
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    wanted = {name: n for name, n in header.num_elements.items() if not _is_unused(name, model)}
    if sum(wanted.values()) != sum(held.values()):
        raise ModelError(
            f"{gguf}: holds {sum(wanted.values())} weights, {type(model).__name__} takes "
            f"{sum(held.values())} of them, so it would not be the same model; use the model's "
            "safetensors"
        )


def _is_unused(name: str, model: PreTrainedModel) -> bool:
    """Blocks after the last layer predict further tokens; a tied output repeats the embedding."""
    if block := re.match(r"blk\.(\d+)\.", name):
        return int(block[1]) >= int(model.config.get_text_config().num_hidden_layers)
    return name == "output.weight" and bool(model.config.tie_word_embeddings)


def _save(
    model: PreTrainedModel,
    config: PretrainedConfig,
    generation_config: GenerationConfig,
    directory: Path,
) -> None:
    # the loaded model counts as quantised and refuses to be saved; a fresh one takes its tensors
    config.dtype = torch.float32
    vars(config).pop("_model_name_or_path", None)  # the title that the GGUF has, no path
    untyped: Any = AutoModelForCausalLM
    with torch.device("meta"):
        fresh = untyped.from_config(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = generation_config
    try:
        fresh.save_pretrained(directory)
    except SafetensorError as error:  # also how a full disk shows itself
        raise ModelError(f"{directory}: cannot write the weights: {error}") from error


def _generation_config(header: GgufHeader) -> GenerationConfig:
    ends = [header.of_tokenizer(f"{kind}_token_id") for kind in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    untyped: Any = GenerationConfig
    config: GenerationConfig = untyped(
        bos_token_id=header.of_tokenizer("bos_token_id"),
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=header.of_tokenizer("padding_token_id"),
    )
    return config


def _details(header: GgufHeader) -> dict[str, Any]:
    return {
        "model_name": header.metadata.get("general.name", ""),
        "tensor_types": dict(sorted(Counter(header.tensor_types.values()).items())),
        "dtype": "float32",
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars; one of them cannot be switched off, so stderr is."""
    logs: Any = transformers_logging
    was_enabled = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_enabled:
            logs.enable_progress_bar()
