"""A server's OpenAI-compatible API, as far as a load needs it: ours, or any other."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx

from kasa_runtime.errors import ConfigError, Unreachable
from kasa_runtime.loadtest.load import Refused
from kasa_runtime.types import (
    AdapterInfo,
    AdapterState,
    ChatMessage,
    SamplingParams,
    TokenChunk,
    Usage,
)

if TYPE_CHECKING:
    from kasa_runtime.client import SecurityOptions

DATA = "data: "
DONE = "[DONE]"
A_TOKEN = (-1,)
"""Stands for a token: the API tells no ids, and sends one for most texts."""


@dataclass(frozen=True)
class ServedModel:
    """The base model, as far as the API tells."""

    name: str


class OpenAiClient:
    """What a load asks of a server, with the names that `AsyncClient` has for it. Event loop only;
    use `async with`."""

    def __init__(self, url: str, security: SecurityOptions) -> None:
        """Raises ConfigError for a URL or files of `security` that cannot be used."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--http: want a URL like http://127.0.0.1:8080, got {url!r}")
        self._url = url.rstrip("/").removesuffix("/v1")
        token = security.get("token")
        self._http = httpx.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=_context(security) if url.startswith("https:") else False,
            timeout=None,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # the load is for the server, not for a proxy
        )
        self._base = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def get_model(self) -> ServedModel:
        """Raises KasaError if the server does not answer as wanted."""
        cards = await self._cards()
        self._base = next(card["id"] for card in cards if not card.get("parent"))
        return ServedModel(self._base)

    async def list_adapters(self) -> list[AdapterInfo]:
        """Of which only the names are known."""
        names = [card["id"] for card in await self._cards() if card.get("parent")]
        return [AdapterInfo(name, "", AdapterState.READY) for name in names]

    async def stream(
        self,
        prompt: str | None,
        *,
        messages: Sequence[ChatMessage] | None,
        adapter: str,
        sampling: SamplingParams,
        timeout_s: float,
    ) -> AsyncIterator[TokenChunk]:
        """A generation as it comes. Raises TimeoutError, and KasaError for what fails."""
        body: dict[str, Any] = {"model": adapter or self._base, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        if messages is None:
            path, body["prompt"] = "/v1/completions", prompt
        else:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": m.role, "content": m.content} for m in messages]
        body |= _fields(sampling, chat=messages is not None)
        async with asyncio.timeout(timeout_s):
            async for event in self._events(path, body):
                yield _chunk(event)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refused(response)
                async for line in response.aiter_lines():
                    if line.startswith(DATA) and line != DATA + DONE:
                        event: dict[str, Any] = json.loads(line.removeprefix(DATA))
                        if "error" in event:
                            raise _of_object(event["error"], "ERROR")
                        yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    async def _cards(self) -> list[dict[str, Any]]:
        """Of `/v1/models`: adapters have a `parent`, the base model has none."""
        try:
            response = await self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise _refused(response)
        cards = response.json().get("data", [])
        if all(card.get("parent") for card in cards):
            raise ConfigError(f"{self._url}/v1/models names no base model, got {response.text}")
        return list(cards)

    def _unreachable(self, error: httpx.HTTPError) -> Unreachable:
        what = str(error) or type(error).__name__
        return Unreachable(f"no answer from {self._url}: {what}; is `kasa serve` running there?")


def _context(security: SecurityOptions) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=security.get("root_certificates"))
    certificate, key = security.get("certificate"), security.get("private_key")
    if (certificate is None) != (key is None):
        raise ConfigError("certificate and private_key must be given together, got one of them")
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _fields(sampling: SamplingParams, *, chat: bool) -> dict[str, Any]:
    """Of a request's body: what is set, under the API's names; those of ours that it does not know
    are extensions, which vLLM has too."""
    default, values = asdict(SamplingParams()), asdict(sampling)
    fields = {name: value for name, value in values.items() if value != default[name]}
    fields["temperature"] = sampling.temperature  # whose default is 1 there
    if chat and sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return fields


def _chunk(event: dict[str, Any]) -> TokenChunk:
    """Of one event of either API. The last one has the usage and no choice."""
    [choice] = event["choices"] or [{}]
    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
    usage = event.get("usage")
    return TokenChunk(text, A_TOKEN if text else (), usage=usage and _usage(usage))


def _usage(usage: dict[str, Any]) -> Usage:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)


def _refused(response: httpx.Response) -> Refused:
    """Of an answer that is no 200: by its error object, where it has one."""
    status = f"HTTP_{response.status_code}"
    try:
        return _of_object(response.json()["error"], status)
    except (ValueError, KeyError, TypeError):
        return Refused(f"{status}: {response.text[:200]}", reason=status)


def _of_object(error: dict[str, Any], otherwise: str) -> Refused:
    code = error.get("code")
    reason = code.upper() if isinstance(code, str) else otherwise
    return Refused(str(error["message"]), reason=reason)
