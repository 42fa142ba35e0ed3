"""`kasa chat`: a conversation with a running server, at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from kasa_runtime.commands.completion import adapter_names
from kasa_runtime.commands.help import Command
from kasa_runtime.commands.sampling import sampling_of, sampling_options
from kasa_runtime.commands.server_address import address_option, connect
from kasa_runtime.errors import KasaError, ModelError
from kasa_runtime.types import ChatMessage, SamplingParams

if TYPE_CHECKING:
    from kasa_runtime.client import Client

HELP = """\
/adapter NAME   have NAME or NAME@VERSION answer from now on; without a name, the base model
/reset          forget what was said; the system message stays
/help           show this
Ctrl-C          stop the answer; Ctrl-D leaves"""


@click.command(
    "chat",
    cls=Command,
    examples=('kasa chat --adapter support --system "Answer briefly."',),
)
@click.option(
    "--adapter",
    default="",
    shell_complete=adapter_names,
    help="NAME or NAME@VERSION; the base model by default",
)
@click.option("--system", default="", help="a system message before the conversation")
@click.option("--timeout", "timeout_s", type=float, help="of an answer, in seconds")
@sampling_options
@address_option
def command(
    *, adapter: str, system: str, timeout_s: float | None, address: str, **sampling: Any
) -> None:
    """Talk with a running server, turn by turn. What was said is sent along with each turn.

    /adapter NAME switches the adapter, /reset forgets what was said, /help shows all of these.
    Ctrl-C stops an answer and Ctrl-D leaves.
    """
    with connect(address) as client:
        model = client.get_model()
        if not model.has_chat_template:
            raise ModelError(f"{model.name} has no chat template; try `kasa generate`")
        chat = Chat(client, sampling_of(sampling), timeout_s, system)
        if adapter:
            chat.switch(adapter)
        if sys.stdin.isatty():
            click.echo(f"{model.name}, {chat.adapter or 'no adapter'}; /help shows what there is")
        _converse(chat)


@dataclass
class Chat:
    """A conversation: what was said, and who answers."""

    client: Client
    sampling: SamplingParams
    timeout_s: float | None
    system: str = ""
    adapter: str = ""
    messages: list[ChatMessage] = field(default_factory=list)

    def switch(self, adapter: str) -> None:
        """Have an adapter answer from now on, "" for the base model. Raises AdapterNotFound."""
        if adapter:
            self.client.get_adapter(adapter)
        self.adapter = adapter

    def ask(self, text: str) -> None:
        """Print the answer as it comes. One that is interrupted counts as far as it came; where
        nothing came, nothing was said."""
        said = [*self.messages, ChatMessage("user", text)]
        chunks = self.client.stream(
            messages=[ChatMessage("system", self.system), *said] if self.system else said,
            adapter=self.adapter,
            sampling=self.sampling,
            timeout_s=self.timeout_s,
        )
        answer = ""
        try:
            for chunk in chunks:
                answer += chunk.text  # first: what is seen was said, whenever Ctrl-C comes
                click.echo(chunk.text, nl=False)
        finally:
            if answer:
                click.echo()
                self.messages = [*said, ChatMessage("assistant", answer)]


def _converse(chat: Chat) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and come back

    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            return
        try:
            if line.startswith("/"):
                _obey(chat, line)
            elif line:
                chat.ask(line)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
        except (KasaError, TimeoutError) as error:
            click.echo(f"kasa: error: {error}", err=True)


def _obey(chat: Chat, line: str) -> None:
    verb, _, argument = line.partition(" ")
    verbs: dict[str, Callable[[], object]] = {
        "/adapter": lambda: chat.switch(argument.strip()),
        "/reset": chat.messages.clear,
        "/help": lambda: click.echo(HELP),
    }
    if verb not in verbs:
        click.echo(f"no command {verb}; there are {', '.join(verbs)}", err=True)
        return
    verbs[verb]()
