"""The transformers model that an executor runs: reading it, and what there is to know about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kasa_runtime.engine.config import EngineConfig
from kasa_runtime.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of decoder layers, as transformers' configurations call them, that attend to a KV cache
alone."""


@dataclass(frozen=True)
class DecoderInfo:
    """What the engine has to know about a model, whatever runs it."""

    architecture: str  # transformers' class
    vocab_size: int
    max_positions: int  # longest context that the model allows
    num_layers: int
    num_parameters: int
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderInfo:
        """Raises ModelError for a model with layers that keep more than a KV cache."""
        text = model.config.get_text_config()
        if unknown := set(getattr(text, "layer_types", None) or ()) - SERVED_LAYERS:
            raise ModelError(
                f"{type(model).__name__} has layers of kind {sorted(unknown)}, this engine "
                f"serves {sorted(SERVED_LAYERS)}; try another engine"
            )
        return cls(
            architecture=type(model).__name__,
            vocab_size=text.vocab_size,
            max_positions=getattr(text, "max_position_embeddings", None) or 2048,
            num_layers=text.num_hidden_layers,
            num_parameters=model.num_parameters(),
            eos_ids=_eos_ids(model),
        )

    def context_length(self, config: EngineConfig) -> int:
        """Raises ConfigError where the settings want more than the model allows."""
        if config.max_model_len > self.max_positions:
            raise ConfigError(
                f"max_model_len {config.max_model_len} is above the model's {self.max_positions}"
            )
        return config.max_model_len or self.max_positions


def load_decoder(
    model_dir: Path, *, dtype: torch.dtype | str, device: torch.device, attention: str
) -> PreTrainedModel:
    """The model in the directory, for inference, with the attention function of this name. Raises
    ModelError."""
    from torch import nn
    from transformers import AutoModelForCausalLM  # seconds of import
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights: in a log it is one endless line
    try:
        untyped: Any = AutoModelForCausalLM  # the annotations do not know output_loading_info
        model, info = untyped.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{model_dir}: cannot load this model: {error}") from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise ModelError(
            f"{model_dir}: lacks {len(missing)} tensors of {type(model).__name__}, the first is "
            f"{missing[0]}; want a model that generates text"
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    nn.Module.to(loaded, device)
    return loaded


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    eos = generation.eos_token_id if generation else None
    if eos is None:
        eos = model.config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
