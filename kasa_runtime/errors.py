"""Every error that this library raises on purpose.

    KasaError
    ├── Unauthenticated           no token, or none that is known
    ├── PermissionDenied          the token does not permit it
    ├── InvalidRequest            a field of a request is wrong; names the field
    ├── ConfigError               a setting or a configuration file is wrong; names the key
    ├── ModelError                the base model cannot be had or is not supported
    ├── AdapterError              carries the adapter's name where it is known
    │   ├── AdapterNotFound
    │   ├── AdapterInvalid        the adapter's content cannot be applied exactly
    │   ├── BaseMismatch          made for another base model
    │   ├── DigestMismatch        bytes differ from the digest that was announced
    │   ├── VersionConflict       the current version is not the one that the caller expected
    │   ├── AdapterQuarantined    was refused when it was read; carries the reason
    │   └── AdapterInUse          requests hold it, or it is merged
    ├── StoreReadOnly             the adapters directory cannot be written
    ├── Overloaded                try again later; carries `retry_after_s`
    │   ├── LimitExceeded         a limit of this adapter; carries its name
    │   └── ShuttingDown          try again elsewhere
    ├── CapacityExceeded          does not fit the engine's settings, now or ever
    ├── EngineDead                the step thread has ended
    ├── Unreachable               no server answers; raised by clients alone
    └── TrainingError
        └── DataError             a row or a file of training data is wrong; names both

A message says what was wanted, what was found and what to do. Only `server/status.py` maps these to
gRPC codes, and only `server/http/errors.py` to HTTP's.
"""

from __future__ import annotations

import re


class KasaError(Exception):
    """Base of all errors of this library."""


class InvalidRequest(KasaError):
    """A field of a request is wrong. `field` is its path in the request, for example
    `sampling.top_p`."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class Unauthenticated(KasaError):
    """The server wants a token, and the call has none, or none that it knows."""


class PermissionDenied(KasaError):
    """The token of a call does not permit it."""


class ConfigError(KasaError):
    """A setting is wrong; the message names it."""


class ModelError(KasaError):
    """The base model cannot be found, read, fetched or run."""


class AdapterError(KasaError):
    """Something about one adapter. `name` is the adapter's name, or "" where it is not known."""

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class AdapterNotFound(AdapterError):
    """No adapter (or no such version of it) is in the adapters directory."""


class AdapterInvalid(AdapterError):
    """The adapter's files cannot be read, or cannot be applied exactly, so none of it is served."""


class BaseMismatch(AdapterError):
    """The adapter was made for a base model with other weights."""


class DigestMismatch(AdapterError):
    """Received bytes do not have the announced size or sha256."""


class VersionConflict(AdapterError):
    """`expected_version` is not the current version."""


class AdapterQuarantined(AdapterError):
    """The adapter's directory was refused when it was read; the message carries the reason."""


class AdapterInUse(AdapterError):
    """The operation needs an adapter that no request holds."""


class StoreReadOnly(KasaError):
    """The adapters directory cannot be written, so nothing can be uploaded, deleted or rolled
    back."""


class Overloaded(KasaError):
    """The queue is full. `retry_after_s` (seconds) is an estimate of when to try again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitExceeded(Overloaded):
    """An adapter has as many requests, or had as many tokens, as its limit allows. `name` is the
    adapter's, "" for the base model."""

    def __init__(self, message: str, *, retry_after_s: float, name: str = "") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.name = name


class ShuttingDown(Overloaded):
    """The server is draining and takes no new requests; another one, or the next one, will."""


class CapacityExceeded(KasaError):
    """Something does not fit: an adapter's rank, the engine's slots, the KV cache."""


class EngineDead(KasaError):
    """The engine's step thread has ended; the process should be restarted."""


class Unreachable(KasaError):
    """No server answers at an address. Raised by clients."""


class TrainingError(KasaError):
    """Training cannot start or cannot go on."""


class DataError(TrainingError):
    """A data file or one of its rows is wrong; the message names file and line."""


def reason(error_type: type[BaseException]) -> str:
    """An error class's name on the wire, `ErrorInfo.reason`: AdapterNotFound is
    ADAPTER_NOT_FOUND."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error_type.__name__).upper()
