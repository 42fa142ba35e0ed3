"""`kasa generate`: one prompt to a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.completion import adapter_names
from kasa_runtime.commands.help import Command
from kasa_runtime.commands.output import json_option
from kasa_runtime.commands.sampling import sampling_of, sampling_options
from kasa_runtime.commands.server_address import address_option, connect
from kasa_runtime.commands.structured import structured_options, structured_output_of
from kasa_runtime.types import ChatMessage, TokenChunk

if TYPE_CHECKING:
    from kasa_runtime.client import Client


@click.command(
    "generate",
    cls=Command,
    examples=(
        'kasa generate --adapter snips "play some jazz =>"',
        'kasa generate --chat --temperature 0.7 "Why does bread rise?"',
        'kasa generate --choice yes --choice no "Is a whale a fish? Answer:"',
        "kasa generate --json --logprobs 5 - < prompt.txt",
    ),
)
@click.argument("prompt")
@click.option(
    "--adapter",
    default="",
    shell_complete=adapter_names,
    help="NAME or NAME@VERSION; the base model by default",
)
@click.option("--chat", is_flag=True, help="send the prompt as a user's message")
@click.option("--system", default="", help="with --chat: a system message before it")
@click.option(
    "--stream/--no-stream",
    default=None,
    help="print the text as it comes; on a terminal that is so by default",
)
@json_option
@click.option("--timeout", "timeout_s", type=float, help="in seconds; none by default")
@click.option(
    "--cache-salt",
    default="",
    help="share cached beginnings of prompts only with requests that say the same",
)
@click.option(
    "--prompt-logprobs",
    type=int,
    help="log-probabilities of the prompt's tokens and of this many likeliest, with --json",
)
@structured_options
@sampling_options
@address_option
def command(
    prompt: str,
    *,
    adapter: str,
    chat: bool,
    system: str,
    stream: bool | None,
    as_json: bool,
    timeout_s: float | None,
    cache_salt: str,
    prompt_logprobs: int | None,
    address: str,
    json_schema: str | None,
    regex: str | None,
    choice: tuple[str, ...],
    grammar: Path | None,
    **sampling: Any,
) -> None:
    """Generate from PROMPT, or from standard input where PROMPT is "-".

    With --json the whole response is one line; with --stream, each part of it.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request: dict[str, Any] = {"messages": _messages(system, text)} if chat else {"prompt": text}
    request |= {
        "adapter": adapter,
        "sampling": sampling_of(sampling),
        "timeout_s": timeout_s,
        "cache_salt": cache_salt,
        "prompt_logprobs": prompt_logprobs,
        "structured_output": structured_output_of(json_schema, regex, choice, grammar),
    }
    if stream is None:
        stream = sys.stdout.isatty() and not as_json
    with connect(address) as client:
        chunks = _chunks(client, request, stream=stream)
        if as_json:
            for chunk in chunks:
                click.echo(json.dumps(asdict(chunk), ensure_ascii=False))
        else:
            _print_text(chunks)


def _print_text(chunks: Iterable[TokenChunk]) -> None:
    """As it comes; the line is ended whatever happens, so that an error has one of its own."""
    began = False
    try:
        for chunk in chunks:
            began = True
            click.echo(chunk.text, nl=False)
    finally:
        if began:
            click.echo()


def _messages(system: str, text: str) -> list[ChatMessage]:
    before = [ChatMessage("system", system)] if system else []
    return [*before, ChatMessage("user", text)]


def _chunks(client: Client, request: dict[str, Any], *, stream: bool) -> Iterator[TokenChunk]:
    return client.stream(**request) if stream else iter([client.generate(**request)])
