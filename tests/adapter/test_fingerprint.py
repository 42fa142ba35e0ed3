"""The identity of a base: the tensors count, everything else does not."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kasa_runtime.adapter import fingerprint as fingerprint_module
from kasa_runtime.adapter.fingerprint import fingerprint, weight_files
from kasa_runtime.errors import ModelError

pytestmark = pytest.mark.usefixtures("own_home")

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.arange(4, dtype=torch.bfloat16),
}


def save(directory: Path, **files: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model", model=TENSORS)


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Gets an entry whenever weights are read."""
    calls: list[object] = []
    digest = fingerprint_module._digest
    monkeypatch.setattr(fingerprint_module, "_digest", lambda f: calls.append(f) or digest(f))
    return calls


class TestFingerprint:
    def test_is_a_sha256(self, model):
        assert len(bytes.fromhex(fingerprint(model))) == 32

    def test_does_not_depend_on_directory_file_name_metadata_or_time(self, model, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        save_file(TENSORS, other / "weights.safetensors", {"made": "elsewhere"})
        os.utime(other / "weights.safetensors", (1, 1))
        (other / "config.json").write_text("{}")
        assert fingerprint(other) == fingerprint(model)

    def test_does_not_depend_on_shards(self, model, tmp_path):
        sharded = save(
            tmp_path / "sharded",
            second={"a.weight": TENSORS["a.weight"]},
            first={"b.weight": TENSORS["b.weight"]},
        )
        assert fingerprint(sharded) == fingerprint(model)

    @pytest.mark.parametrize(
        "change",
        [
            {"a.weight": TENSORS["a.weight"].nextafter(torch.tensor(9.0))},
            {"a.weight": TENSORS["a.weight"].reshape(3, 2)},
            {"a.weight": TENSORS["a.weight"].view(torch.int32)},
            {"c.weight": torch.zeros(1)},
        ],
        ids=["one bit each", "shape", "dtype", "one tensor more"],
    )
    def test_depends_on_every_tensor(self, model, tmp_path, change):
        changed = save(tmp_path / "changed", model=TENSORS | change)
        assert fingerprint(changed) != fingerprint(model)

    def test_depends_on_names(self, model, tmp_path):
        swapped = {"c.weight": TENSORS["a.weight"], "b.weight": TENSORS["b.weight"]}
        assert fingerprint(save(tmp_path / "swapped", model=swapped)) != fingerprint(model)

    def test_depends_on_every_bit(self, model, tmp_path):
        data = bytearray((model / "model.safetensors").read_bytes())
        flipped = tmp_path / "flipped"
        flipped.mkdir()
        data[-1] ^= 1
        (flipped / "model.safetensors").write_bytes(data)
        assert fingerprint(flipped) != fingerprint(model)

    def test_reads_the_weights_once(self, model, digests):
        assert fingerprint(model) == fingerprint(model)
        assert len(digests) == 1

    def test_reads_again_when_a_file_changed(self, model, digests):
        before = fingerprint(model)
        save_file(TENSORS | {"a.weight": torch.ones(2, 3)}, model / "model.safetensors")
        assert fingerprint(model) != before
        assert len(digests) == 2

    def test_needs_no_home_to_write_to(self, model, own_home):
        want = fingerprint(model)
        shutil.rmtree(own_home)
        own_home.write_text("a file where the directory should be")
        assert fingerprint(model) == want

    def test_empty_memo_of_a_crash_is_not_believed(self, model, own_home):
        want = fingerprint(model)
        (memo,) = (own_home / "fingerprints").iterdir()
        memo.write_text("")
        assert fingerprint(model) == want
        assert memo.read_text() == want


class TestRefusals:
    def test_directory_without_safetensors(self, tmp_path):
        with pytest.raises(ModelError, match=r"want \*\.safetensors files, found none"):
            fingerprint(tmp_path)

    def test_torn_file(self, model):
        file = model / "model.safetensors"
        data = file.read_bytes()
        for keep in (0, 4, 8, 20, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:keep])
            with pytest.raises(ModelError, match=r"model\.safetensors.*fetch it again"):
                fingerprint(model)

    @pytest.mark.parametrize(
        "data",
        [
            b"\xff" * 64,
            struct.pack("<Q", 1 << 62) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 9) + b'{"a": {}}',
            struct.pack("<Q", 8) + b'{"a": 1}',
            struct.pack("<Q", 2) + b"\xff\xfe",
        ],
    )
    def test_file_that_is_no_safetensors(self, model, data):
        (model / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors.*fetch it again"):
            fingerprint(model)


class TestWeightFiles:
    def index(self, model: Path, weight_map: object) -> None:
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def test_index_names_the_files(self, tmp_path):
        model = save(tmp_path / "model", one=TENSORS, consolidated=TENSORS)
        self.index(model, {"a.weight": "one.safetensors", "b.weight": "one.safetensors"})
        assert weight_files(model) == [model / "one.safetensors"]

    def test_without_an_index_all_safetensors_count(self, tmp_path):
        model = save(tmp_path / "model", two=TENSORS, one=TENSORS)
        assert weight_files(model) == [model / "one.safetensors", model / "two.safetensors"]

    def test_missing_shard_is_refused_by_name(self, model):
        self.index(model, {"a.weight": "lost.safetensors"})
        with pytest.raises(ModelError, match=r"lost\.safetensors"):
            fingerprint(model)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
    def test_unreadable_index_is_refused(self, model, text):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index\.json"):
            fingerprint(model)
