"""Modules that an adapter holds whole beside its low-rank layers, such as a classifier's head.

PEFT's `modules_to_save`: a module is meant if the end of its path is in the list, and its tensors
lie in the adapter's file under their own names. PEFT lists heads by all names that models give
them, so names that the base has no module of are harmless.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.adapter.config import AdapterConfig
from kasa_runtime.errors import AdapterInvalid


def check_saved(saved: Mapping[str, Tensor], config: AdapterConfig, base: BaseModel) -> None:
    """Raises AdapterInvalid unless `saved` (by their names in the model) are all tensors of the
    modules that `config` names, and have the shapes that they have in `base`, but for the number of
    labels, which is the adapter's own."""
    if missing := [n for n in base.tensors if config.saves_exactly(n) and n not in saved]:
        raise AdapterInvalid(
            f"modules_to_save names {missing[0].rpartition('.')[0]}, but {missing[0]} is not among "
            "the tensors; the file is incomplete"
        )
    if config.modules_to_save and not saved:
        raise AdapterInvalid(
            f"modules_to_save is {list(config.modules_to_save)}, the base has no such module, and "
            "there are no tensors of one; was the adapter made for another architecture?"
        )
    labels = num_labels(saved, base)
    for name, tensor in saved.items():
        if name not in base.tensors:
            raise AdapterInvalid(
                f"the base has no tensor {name}, which modules_to_save replaces; was the adapter "
                "made for another architecture?"
            )
        want = _with_labels(base.tensors[name], base.num_labels, labels)
        if tuple(tensor.shape) != want:
            raise AdapterInvalid(f"{name} has shape {tuple(tensor.shape)}, want {want}")


def num_labels(saved: Mapping[str, Tensor], base: BaseModel) -> int:
    """How many outputs the head in `saved` has; those of `base`'s own configuration without one."""
    for name, tensor in saved.items():
        if tensor.ndim and base.tensors.get(name, ())[:1] == (base.num_labels,):
            return tensor.shape[0]
    return base.num_labels


def _with_labels(shape: tuple[int, ...], before: int, labels: int) -> tuple[int, ...]:
    return (labels, *shape[1:]) if shape[:1] == (before,) else shape
