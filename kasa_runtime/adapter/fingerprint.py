"""The identity of a base model: a digest of its weights.

Two directories with the same tensors have the same fingerprint, whatever their names, shards or
timestamps; one bit changed anywhere gives another. Computing it reads every weight once, so the
result is remembered beside the tails, keyed by the files' paths, sizes and modification times.
"""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path

from kasa_runtime.errors import ModelError
from kasa_runtime.home import kasa_home, keep


def fingerprint(model_dir: Path) -> str:
    """The hexadecimal sha256 over all tensors (name, dtype, shape, bytes) of the directory's
    safetensors files.

    Raises ModelError where there are none or one cannot be read."""
    files = weight_files(model_dir)
    memo = kasa_home() / "fingerprints" / f"{_stat_key(files)}.txt"
    with suppress(OSError):
        if known := memo.read_text().strip():
            return known
    digest = _digest(files)
    keep(memo, digest)
    return digest


def weight_files(model_dir: Path) -> list[Path]:
    """The directory's safetensors files: those that its index names, else all. Raises ModelError if
    there are none."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{model_dir}: want *.safetensors files, found none; is it a model directory?"
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.with_name(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index ({error!r}); fetch it again") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{index.parent}: {', '.join(missing)} is missing; fetch the model again")
    return files


def _stat_key(files: list[Path]) -> str:
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:32]


def _digest(files: list[Path]) -> str:
    entries: list[bytes] = []
    for file in files:
        entries += _tensor_digests(file)
    total = hashlib.sha256()
    for entry in sorted(entries):
        total.update(entry)
    return total.hexdigest()


def _tensor_digests(file: Path) -> list[bytes]:
    """One line per tensor of a safetensors file: name, dtype, shape, sha256 of its bytes."""
    size = file.stat().st_size
    entries = []
    with file.open("rb") as stream:
        try:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if 8 + header_bytes > size:
                raise ValueError(f"its header has {header_bytes} bytes, the file {size}")
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            tensors = [(n, i["dtype"], i["shape"], *i["data_offsets"]) for n, i in header.items()]
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{file}: not a readable safetensors file ({error!r}); fetch it again"
            ) from error
        for name, dtype, shape, begin, end in tensors:
            start, want = 8 + header_bytes + begin, end - begin
            if start + want > size:
                raise ModelError(
                    f"{file}: truncated, {name} has {max(0, size - start)} of {want} bytes; "
                    "fetch it again"
                )
            stream.seek(start)
            digest = hashlib.sha256(stream.read(want)).hexdigest()
            entries.append(f"{name}|{dtype}|{shape}|{digest}\n".encode())
    return entries
