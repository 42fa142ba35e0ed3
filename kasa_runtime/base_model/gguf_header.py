"""What a GGUF file says about itself, read and checked before any conversion."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from kasa_runtime.errors import ModelError


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensor table of one file. Arrays (the vocabulary) are left out of `metadata`."""

    metadata: dict[str, Any]
    tensor_types: dict[str, str]  # tensor name -> "Q4_1", "F32", ...
    num_elements: dict[str, int]  # tensor name -> count

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def of_tokenizer(self, key: str, default: Any = None) -> Any:
        """The value of `tokenizer.ggml.<key>`."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)


def read_header(path: Path) -> GgufHeader:
    """Read the header of `path` and check that all tensors that it announces are there.

    Raises ModelError for a file that is torn, split over several files, or not GGUF.
    """
    try:
        reader = GGUFReader(path)
        metadata = {name: _scalar(field) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise ModelError(
            f"{path}: not a whole GGUF file ({error}); it is torn or of another format: fetch it "
            "again"
        ) from error
    if int(metadata.get("split.count") or 1) > 1:
        raise ModelError(
            f"{path}: one of {metadata['split.count']} parts, want one file; join them with "
            "`llama-gguf-split --merge`"
        )
    return GgufHeader(
        metadata={name: value for name, value in metadata.items() if value is not None},
        tensor_types={tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
        num_elements={tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
    )


def _scalar(field: Any) -> Any:
    # lists are the vocabulary and the merges: large, and read again by the tokenizer's own loader
    return None if len(field.data) > 1 else field.contents()
