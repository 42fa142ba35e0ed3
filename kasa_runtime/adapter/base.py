"""The base model as an adapter sees it: a fingerprint and named linear layers, read from its
directory. No weight is read until one is asked for.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kasa_runtime.adapter.fingerprint import fingerprint, weight_files
from kasa_runtime.adapter.skeleton import (
    LinearShape,
    Skeleton,
    classifier,
    meta_model,
    skeleton,
)
from kasa_runtime.errors import ModelError

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
        return cls(directory, architecture=classifier(directory) if wants_head else "")

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.directory)

    @property
    def tails_key(self) -> str:
        """What tells its tails from those of other weights."""
        return self.fingerprint

    @property
    def modules(self) -> dict[str, LinearShape]:
        """Every linear layer, by its path in the transformers model, output embeddings included."""
        return self._skeleton.modules

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that the transformers model holds, by name."""
        return self._skeleton.tensors

    @cached_property
    def model_class(self) -> type[nn.Module]:
        """The transformers class that runs it."""
        return type(meta_model(self.directory, self.architecture))

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier's head by config.json, 2 where it does not say."""
        return self._skeleton.num_labels

    @cached_property
    def _skeleton(self) -> Skeleton:
        return skeleton(self.directory, self.architecture)

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
        bare = module.removeprefix(f"{self._skeleton.prefix}.")
        return [f"{module}.weight", f"{bare}.weight"]
