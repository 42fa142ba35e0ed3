"""The identity of a base model: a digest of its weights.

Two directories with the same tensors have the same fingerprint, whatever their names, shards or
timestamps; one bit changed anywhere gives another. Computing it reads every weight once, so the
result is remembered beside the tails, keyed by the files' paths, sizes and modification times.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

from kasa_runtime.errors import ModelError
from kasa_runtime.home import kasa_home


def fingerprint(model_dir: Path) -> str:
    """The hexadecimal sha256 over all tensors (name, dtype, shape, bytes) of the directory's
    safetensors files.

    Raises ModelError where there are none or one cannot be read."""
    files = weight_files(model_dir)
    memo = kasa_home() / "fingerprints" / f"{_stat_key(files)}.txt"
    if memo.is_file():
        return memo.read_text().strip()
    digest = _digest(files)
    memo.parent.mkdir(parents=True, exist_ok=True)
    staged = memo.with_suffix(f".{os.getpid()}")
    staged.write_text(digest)
    staged.replace(memo)
    return digest


def weight_files(model_dir: Path) -> list[Path]:
    """The directory's safetensors files: those that its index names, else all. Raises ModelError if
    there are none."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [model_dir / name for name in names]
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{model_dir}: want *.safetensors files, found none; is it a model directory?"
        )
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
    entries = []
    with file.open("rb") as stream:
        try:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        except (struct.error, ValueError) as error:
            raise ModelError(
                f"{file}: not a readable safetensors file ({error}); fetch it again"
            ) from error
        start = 8 + header_bytes
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            stream.seek(start + begin)
            digest = _hash_exactly(stream.read(end - begin), end - begin, file)
            entries.append(f"{name}|{info['dtype']}|{info['shape']}|{digest}\n".encode())
    return entries


def _hash_exactly(data: bytes, want: int, file: Path) -> str:
    if len(data) != want:
        raise ModelError(
            f"{file}: truncated, a tensor has {len(data)} of {want} bytes; fetch it again"
        )
    return hashlib.sha256(data).hexdigest()
