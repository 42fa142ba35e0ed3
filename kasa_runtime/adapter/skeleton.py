"""A base model without its weights: which linear layers and which tensors it has.

transformers' own class says so, built on the meta device, so it costs no memory and reads no
weight. Importing that class takes seconds, so the answer is remembered under KASA_HOME, and a
server that has it does not import transformers at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasa_runtime.errors import ModelError
from kasa_runtime.home import remembered

VERSION = 1
"""Of what is remembered; raise it when that changes."""


@dataclass(frozen=True)
class LinearShape:
    """A layer that can be adapted. `transposed`: stored (in, out), as transformers' Conv1D does."""

    out_features: int
    in_features: int
    transposed: bool = False


@dataclass(frozen=True)
class Skeleton:
    """`modules`: the linear layers, by their path. `tensors`: shapes of all that the model holds,
    by name. `prefix`: what checkpoints of the bare model leave out of both. `num_labels`: outputs
    of a classifier's head by config.json, 2 where it does not say."""

    modules: dict[str, LinearShape]
    tensors: dict[str, tuple[int, ...]]
    prefix: str
    num_labels: int


def skeleton(directory: Path, architecture: str = "") -> Skeleton:
    """Of the model in `directory`, in the transformers class `architecture` or else that of its
    config.json. Raises ModelError where transformers cannot build it."""
    made_of = {
        "config.json": hashlib.sha256(_read_config(directory)).hexdigest(),
        "architecture": architecture,
        "transformers": version("transformers"),
        "torch": version("torch"),
        "version": str(VERSION),
    }
    known = remembered("skeletons", made_of, lambda: _as_json(meta_model(directory, architecture)))
    return Skeleton(
        {name: LinearShape(*shape) for name, shape in known["modules"].items()},
        {name: tuple(shape) for name, shape in known["tensors"].items()},
        known["prefix"],
        known["num_labels"],
    )


def meta_model(directory: Path, architecture: str = "") -> nn.Module:
    """The transformers model, without memory for its weights. Raises ModelError."""
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


def classifier(directory: Path) -> str:
    """The class that transformers gives this model for sequence classification. Raises
    ModelError."""
    from transformers import AutoModelForSequenceClassification

    mapping: Any = AutoModelForSequenceClassification
    config = _config(directory)
    try:
        return str(mapping._model_mapping[type(config)].__name__)
    except KeyError as error:
        raise ModelError(
            f"{directory}: transformers has no {config.model_type} for sequence classification"
        ) from error


def _as_json(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return {
        "modules": {name: astuple(shape) for name, shape in linear_layers(model).items()},
        "tensors": {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        "prefix": str(getattr(model, "base_model_prefix", "") or "model"),
        "num_labels": int(getattr(config, "num_labels", 2)),
    }


def _read_config(directory: Path) -> bytes:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory}: want a config.json, found none; is it a model directory?")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    _read_config(directory)
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ModelError(f"{directory}: transformers cannot build this model: {error}") from error
