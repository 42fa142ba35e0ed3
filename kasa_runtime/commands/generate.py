"""`kasa generate`: one prompt to a running server. Sampling flags are SamplingParams' fields."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.completion import adapter_names
from kasa_runtime.commands.flags import build, options
from kasa_runtime.commands.output import json_option
from kasa_runtime.commands.server_address import address_option, connect
from kasa_runtime.types import ChatMessage, SamplingParams, TokenChunk

if TYPE_CHECKING:
    from kasa_runtime.client import Client

HELP: dict[str, dict[str, Any]] = {
    "max_tokens": {"default": 256, "help": "most tokens to generate", "show_default": True},
    "min_tokens": {"help": "fewest tokens to generate"},
    "temperature": {"help": "0: greedy"},
    "top_p": {"help": "draw from the tokens that make up this probability"},
    "top_k": {"help": "draw from this many most likely tokens; 0: all"},
    "min_p": {"help": "draw from tokens this likely, relative to the most likely"},
    "repetition_penalty": {"help": "above 1: fewer repetitions of prompt and output"},
    "presence_penalty": {"help": "above 0: fewer tokens that the output has"},
    "frequency_penalty": {"help": "above 0: the same, times how often it has them"},
    "seed": {"help": "make the draw repeatable"},
    "stop": {"help": "end at this text; may be given several times"},
    "ignore_eos": {"help": "go on after the end of sequence"},
    "logprobs": {"help": "log-probabilities of this many tokens, with --json"},
}


@click.command("generate", context_settings={"max_content_width": 100})
@click.argument("prompt")
@click.option(
    "--adapter",
    default="",
    shell_complete=adapter_names,
    help="NAME or NAME@VERSION; the base model by default",
)
@click.option("--chat", is_flag=True, help="send the prompt as a user's message")
@click.option("--system", default="", help="with --chat: a system message before it")
@click.option("--stream", is_flag=True, help="print the text as it comes")
@json_option
@click.option("--timeout", "timeout_s", type=float, help="in seconds; none by default")
@click.option(
    "--cache-salt",
    default="",
    help="share cached beginnings of prompts only with requests that say the same",
)
@address_option
@options(SamplingParams, **HELP)
def command(
    prompt: str,
    *,
    adapter: str,
    chat: bool,
    system: str,
    stream: bool,
    as_json: bool,
    timeout_s: float | None,
    cache_salt: str,
    address: str,
    **sampling: Any,
) -> None:
    """Generate from PROMPT, or from standard input where PROMPT is "-".

    With --json the whole response is one line; with --stream, each part of it.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request: dict[str, Any] = {"messages": _messages(system, text)} if chat else {"prompt": text}
    request |= {
        "adapter": adapter,
        "sampling": build(SamplingParams, sampling),
        "timeout_s": timeout_s,
        "cache_salt": cache_salt,
    }
    with connect(address) as client:
        for chunk in _chunks(client, request, stream=stream):
            click.echo(_line(chunk) if as_json else chunk.text, nl=as_json)
    if not as_json:
        click.echo()


def _messages(system: str, text: str) -> list[ChatMessage]:
    before = [ChatMessage("system", system)] if system else []
    return [*before, ChatMessage("user", text)]


def _chunks(client: Client, request: dict[str, Any], *, stream: bool) -> Iterator[TokenChunk]:
    return client.stream(**request) if stream else iter([client.generate(**request)])


def _line(chunk: TokenChunk) -> str:
    return json.dumps(asdict(chunk), ensure_ascii=False)
