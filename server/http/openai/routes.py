"""Where OpenAI's API is."""

from __future__ import annotations

from starlette.routing import Route

from kasa_runtime.runtime import Runtime
from server.access import Gate
from server.adapters import Adapters
from server.generating import Generating
from server.http.calls import Endpoint, Handler
from server.http.openai.catalogue import LoraAdapters, Models
from server.http.openai.chat import ChatCompletions
from server.http.openai.completions import Completions


def openai_routes(
    runtime: Runtime, generating: Generating, adapters: Adapters, gate: Gate, max_bytes: int
) -> list[Route]:
    """`max_bytes`: of a request's body."""

    def route(method: str, path: str, handle: Handler) -> Route:
        return Route(path, Endpoint(gate, handle), methods=[method])

    models = Models(runtime)
    loras = LoraAdapters(adapters, runtime.config.adapters_dir, max_bytes)
    completions = Completions(runtime, generating, gate, max_bytes)
    chat_completions = ChatCompletions(runtime, generating, gate, max_bytes)
    return [
        route("GET", "/v1/models", models.list),
        route("GET", "/v1/models/{model:path}", models.get),
        route("POST", "/v1/completions", completions),
        route("POST", "/v1/chat/completions", chat_completions),
        route("POST", "/v1/load_lora_adapter", loras.load),
        route("POST", "/v1/unload_lora_adapter", loras.unload),
    ]
