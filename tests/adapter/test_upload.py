"""One upload: what its manifest may say, and that the bytes are those that it announced."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from adapter.bench import blocked
from kasa_runtime.adapter.checkpoint import CARD_FILE, CONFIG_FILE, META_FILE, WEIGHTS_FILE
from kasa_runtime.adapter.upload import MAX_UPLOAD_BYTES, Upload, check_manifest
from kasa_runtime.errors import DigestMismatch, InvalidRequest
from kasa_runtime.types import AdapterInfo, AdapterState, ManifestFile, UploadManifest

FILES = {CONFIG_FILE: b'{"r": 8}', WEIGHTS_FILE: bytes(range(256)) * 4}
PUBLISHED = AdapterInfo("a", "0123", AdapterState.READY)


def announce(path: str, data: bytes) -> ManifestFile:
    return ManifestFile(path, len(data), hashlib.sha256(data).hexdigest())


MANIFEST = UploadManifest("a", tuple(announce(path, data) for path, data in FILES.items()))


@pytest.fixture
def published() -> list[dict[str, bytes]]:
    """The files of what was published."""
    return []


@pytest.fixture
def upload(tmp_path: Path, published: list[dict[str, bytes]]) -> Upload:
    async def publish() -> AdapterInfo:
        published.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        return PUBLISHED

    return Upload(MANIFEST, tmp_path, publish)


class TestManifest:
    @pytest.mark.parametrize("more", [(), (META_FILE,), (META_FILE, CARD_FILE)])
    def test_takes_the_files_of_an_adapter(self, more):
        check_manifest(
            replace(MANIFEST, files=(*MANIFEST.files, *(announce(path, b"x") for path in more)))
        )

    @pytest.mark.parametrize("name", ["", "../a", "a/b", "A", "a..b", ".kasa", "a@1"])
    def test_refuses_an_illegal_name(self, name):
        with pytest.raises(InvalidRequest) as caught:
            check_manifest(replace(MANIFEST, name=name))
        assert caught.value.field == "manifest.name"

    @pytest.mark.parametrize(
        "path",
        [
            "../adapter_model.safetensors",
            "/etc/passwd",
            "sub/README.md",
            "./README.md",
            "",
            "readme.md",
            "adapter_model.bin",
            "README.md\0",
            "..",
        ],
    )
    def test_refuses_any_other_path(self, path):
        files = (*MANIFEST.files, announce(path, b"x"))
        with pytest.raises(InvalidRequest, match="want one of") as caught:
            check_manifest(replace(MANIFEST, files=files))
        assert caught.value.field == "manifest.files[2].path"

    @pytest.mark.parametrize(
        ("change", "field", "message"),
        [
            ({"sha256": ""}, "sha256", "64 lower-case hex digits"),
            ({"sha256": "0" * 63}, "sha256", "64 lower-case hex digits"),
            ({"sha256": "A" * 64}, "sha256", "64 lower-case hex digits"),
            ({"sha256": "0" * 64 + "\n"}, "sha256", "64 lower-case hex digits"),
            ({"size_bytes": -1}, "size", "got -1"),
        ],
    )
    def test_names_the_file_and_the_field(self, change, field, message):
        files = (MANIFEST.files[0], replace(MANIFEST.files[1], **change))
        with pytest.raises(InvalidRequest, match=message) as caught:
            check_manifest(replace(MANIFEST, files=files))
        assert caught.value.field == f"manifest.files[1].{field}"

    def test_refuses_a_file_that_is_listed_twice(self):
        with pytest.raises(InvalidRequest, match="is listed twice"):
            check_manifest(replace(MANIFEST, files=(*MANIFEST.files, MANIFEST.files[0])))

    @pytest.mark.parametrize("missing", [0, 1])
    def test_needs_config_and_weights(self, missing):
        files = tuple(file for i, file in enumerate(MANIFEST.files) if i != missing)
        with pytest.raises(InvalidRequest, match=f"{MANIFEST.files[missing].path}.* is missing"):
            check_manifest(replace(MANIFEST, files=files))

    def test_limits_the_total_size(self):
        half = replace(MANIFEST.files[0], size_bytes=MAX_UPLOAD_BYTES // 2)
        rest = replace(MANIFEST.files[1], size_bytes=MAX_UPLOAD_BYTES - half.size_bytes)
        check_manifest(replace(MANIFEST, files=(half, rest)))
        over = replace(rest, size_bytes=rest.size_bytes + 1)
        with pytest.raises(InvalidRequest, match="more than the limit of 4294967296"):
            check_manifest(replace(MANIFEST, files=(half, over)))


class TestUpload:
    async def test_a_cancelled_write_ends_before_the_files_may_go(self, upload, monkeypatch):
        written, may_write = [], threading.Event()

        def slowly(path, data):
            may_write.wait()
            written.append(path)

        monkeypatch.setattr(upload, "_append", slowly)
        writing = asyncio.create_task(upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE]))
        await asyncio.sleep(0)
        writing.cancel()
        assert await blocked(writing)
        may_write.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert written == [CONFIG_FILE]

    async def test_publishes_what_was_announced(self, upload, published):
        for path, data in FILES.items():
            await upload.write(path, 0, data)
        assert await upload.commit() is PUBLISHED
        assert published == [FILES]

    async def test_takes_chunks_of_several_files_in_turns(self, upload, published):
        config, weights = FILES[CONFIG_FILE], FILES[WEIGHTS_FILE]
        await upload.write(WEIGHTS_FILE, 0, weights[:100])
        await upload.write(CONFIG_FILE, 0, config[:1])
        await upload.write(WEIGHTS_FILE, 100, b"")
        await upload.write(WEIGHTS_FILE, 100, weights[100:])
        await upload.write(CONFIG_FILE, 1, config[1:])
        await upload.commit()
        assert published == [FILES]

    @pytest.mark.parametrize("path", ["README.md", "../a", "/etc/passwd", ""])
    async def test_refuses_a_path_that_was_not_announced(self, upload, tmp_path, path):
        with pytest.raises(InvalidRequest, match="is not in the manifest") as caught:
            await upload.write(path, 0, b"x")
        assert caught.value.field == "chunk.path"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("offset", [0, 3, 5, -1])
    async def test_refuses_a_gap_or_a_repetition(self, upload, offset):
        await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE][:4])
        with pytest.raises(InvalidRequest, match=f"want 4, the next byte, got {offset}") as caught:
            await upload.write(CONFIG_FILE, offset, b"x")
        assert caught.value.field == "chunk.offset"

    async def test_refuses_more_bytes_than_announced_before_writing_them(self, upload, tmp_path):
        await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE])
        with pytest.raises(DigestMismatch, match=r"announced 8 bytes, got 9 or more"):
            await upload.write(CONFIG_FILE, 8, b"x")
        assert (tmp_path / CONFIG_FILE).stat().st_size == 8

    async def test_refuses_fewer_bytes_than_announced(self, upload, published):
        await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE])
        await upload.write(WEIGHTS_FILE, 0, FILES[WEIGHTS_FILE][:-1])
        with pytest.raises(DigestMismatch, match="announced 1024 bytes, got 1023"):
            await upload.commit()
        assert published == []

    async def test_refuses_a_file_that_never_came(self, upload, published):
        await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE])
        with pytest.raises(DigestMismatch, match=f"{WEIGHTS_FILE}: announced 1024 bytes, got 0"):
            await upload.commit()
        assert published == []

    async def test_refuses_other_bytes_of_the_same_size(self, upload, published):
        await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE])
        await upload.write(WEIGHTS_FILE, 0, bytes(1024))
        with pytest.raises(DigestMismatch, match=f"{WEIGHTS_FILE}: announced sha256"):
            await upload.commit()
        assert published == []

    async def test_after_a_chunk_was_half_written_nothing_is_published(
        self, upload, published, tmp_path, monkeypatch
    ):
        def half(path: str, data: bytes) -> None:
            append(path, data[:3])
            raise OSError(28, "No space left on device")

        append = upload._append
        monkeypatch.setattr(upload, "_append", half)
        with pytest.raises(OSError, match="No space left"):
            await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE])
        monkeypatch.undo()
        with pytest.raises(InvalidRequest, match="want 3, the next byte, got 0"):
            await upload.write(CONFIG_FILE, 0, FILES[CONFIG_FILE])
        with pytest.raises(DigestMismatch):
            await upload.commit()
        assert published == []

    async def test_announced_empty_file_needs_no_chunk(self, tmp_path):
        async def publish() -> AdapterInfo:
            return PUBLISHED

        manifest = replace(MANIFEST, files=(*MANIFEST.files, announce(CARD_FILE, b"")))
        upload = Upload(manifest, tmp_path, publish)
        for path, data in FILES.items():
            await upload.write(path, 0, data)
        assert await upload.commit() is PUBLISHED
