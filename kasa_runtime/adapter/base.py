"""The base model as an adapter sees it: a fingerprint and named linear layers, read from its
directory.

Builds the architecture on the meta device, so it costs no memory and reads no weight until one is
asked for.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kasa_runtime.adapter.fingerprint import fingerprint, weight_files
from kasa_runtime.errors import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearShape:
    """A layer that can be adapted. `transposed`: stored (in, out), as transformers' Conv1D does."""

    out_features: int
    in_features: int
    transposed: bool = False


class BaseModel:
    """Names, shapes and weights of the linear layers in a model directory. Raises ModelError
    throughout.

    `architecture`: the transformers class that runs it, where it is not the one in config.json, as
    when an encoder gets a classifier's head."""

    def __init__(self, directory: Path, *, architecture: str = "") -> None:
        self.directory = directory
        self.architecture = architecture

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.directory)

    @cached_property
    def modules(self) -> dict[str, LinearShape]:
        """Every linear layer, by its path in the transformers model, output embeddings included."""
        return linear_layers(self._model)

    @cached_property
    def _model(self) -> nn.Module:
        return _meta_model(self.directory, self.architecture)

    def weight(self, module: str) -> Tensor:
        """The pristine weight (out, in) of a layer, in the dtype in which it is stored."""
        key = self.tensor_key(module)
        try:
            with safe_open(self._files[key], framework="pt") as handle:
                stored: Tensor = handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._files[key]}: cannot read {key} ({error})") from error
        return stored.T if self.modules[module].transposed else stored

    @cached_property
    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in weight_files(self.directory):
            try:
                with safe_open(path, framework="pt") as handle:
                    files.update(dict.fromkeys(handle.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
        return files

    def tensor_key(self, module: str) -> str:
        """The layer's tensor in the files. Checkpoints of the bare model lack the leading part
        ("model.", "bert."); a tied output embedding is stored once, as the input embedding."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '') or 'model'}."
        candidates = [f"{module}.weight", f"{module.removeprefix(prefix)}.weight"]
        if module == "lm_head":
            candidates += [key for key in self._files if key.endswith("embed_tokens.weight")]
        for key in candidates:
            if key in self._files:
                return key
        raise ModelError(f"{self.directory}: want a tensor {candidates[0]}, the files have none")


def linear_layers(model: nn.Module) -> dict[str, LinearShape]:
    """Paths and shapes of the layers that a low-rank delta can be added to."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = LinearShape(module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            found[name] = LinearShape(out_features, in_features, transposed=True)
    return found


def _meta_model(directory: Path, architecture: str = "") -> nn.Module:
    import transformers

    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: want a config.json, found none; is it a model directory?")
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        name = architecture or (config.architectures or [""])[0]
        model_class = getattr(transformers, name, None)
        with torch.device("meta"):
            if model_class is None:
                return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
            return model_class(config)  # type: ignore[no-any-return]
    except (ValueError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ModelError(f"{directory}: transformers cannot build this model: {error}") from error
