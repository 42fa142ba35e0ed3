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
from typing import Any

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


SEQUENCE_CLASSIFICATION = "SEQ_CLS"
"""PEFT's `task_type` of adapters with a head for labels or numbers."""


class BaseModel:
    """Names, shapes and weights of the linear layers in a model directory. Raises ModelError
    throughout.

    `architecture`: the transformers class that runs it, where it is not the one in config.json, as
    when an encoder gets a classifier's head."""

    def __init__(self, directory: Path, *, architecture: str = "") -> None:
        self.directory = directory
        self.architecture = architecture

    @classmethod
    def for_task(cls, directory: Path, task_type: str) -> BaseModel:
        """The base as an adapter of PEFT's `task_type` sees it."""
        wants_head = task_type == SEQUENCE_CLASSIFICATION
        return cls(directory, architecture=_classifier(directory) if wants_head else "")

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.directory)

    @property
    def tails_key(self) -> str:
        """What tells its tails from those of other weights."""
        return self.fingerprint

    @cached_property
    def modules(self) -> dict[str, LinearShape]:
        """Every linear layer, by its path in the transformers model, output embeddings included."""
        return linear_layers(self._model)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that the transformers model holds, by name."""
        return {name: tuple(x.shape) for name, x in self._model.state_dict().items()}

    @property
    def model_class(self) -> type[nn.Module]:
        """The transformers class that runs it."""
        return type(self._model)

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier's head by config.json, 2 where it does not say."""
        config: Any = self._model.config
        return int(getattr(config, "num_labels", 2))

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
        candidates = self._own_keys(module)
        if module == "lm_head":
            candidates += [key for key in self._files if key.endswith("embed_tokens.weight")]
        for key in candidates:
            if key in self._files:
                return key
        raise ModelError(f"{self.directory}: want a tensor {candidates[0]}, the files have none")

    def shares_tensor(self, module: str) -> bool:
        """Whether the layer's weight is that of another module, as a tied output embedding's is."""
        return self.tensor_key(module) not in self._own_keys(module)

    def _own_keys(self, module: str) -> list[str]:
        prefix = f"{getattr(self._model, 'base_model_prefix', '') or 'model'}."
        return [f"{module}.weight", f"{module.removeprefix(prefix)}.weight"]


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


def _classifier(directory: Path) -> str:
    """The class that transformers gives this model for sequence classification."""
    from transformers import AutoModelForSequenceClassification

    mapping: Any = AutoModelForSequenceClassification
    config = _config(directory)
    try:
        return str(mapping._model_mapping[type(config)].__name__)
    except KeyError as error:
        raise ModelError(
            f"{directory}: transformers has no {config.model_type} for sequence classification"
        ) from error


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: want a config.json, found none; is it a model directory?")
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ModelError(f"{directory}: transformers cannot build this model: {error}") from error


def _meta_model(directory: Path, architecture: str = "") -> nn.Module:
    import transformers

    config = _config(directory)
    try:
        name = architecture or (config.architectures or [""])[0]
        model_class = getattr(transformers, name, None)
        with torch.device("meta"):
            if model_class is None:
                return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
            return model_class(config)  # type: ignore[no-any-return]
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{directory}: transformers cannot build this model: {error}") from error
