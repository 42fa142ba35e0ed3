"""Chat messages as token ids, by the model's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kasa_runtime.errors import ConfigError
from kasa_runtime.training.examples import IGNORED, Example
from kasa_runtime.training.rows import Row

ASSISTANT = "assistant"

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Chat:
    """A tokenizer's chat template. Raises ConfigError where there is none, or the tokenizer cannot
    say which characters a token stands for."""

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "[data] task = chat and chat = true need a tokenizer with a chat template, this "
                "model's has none"
            )
        if not self.tokenizer.is_fast:
            raise ConfigError("[data] chat needs a fast tokenizer, this model's is a slow one")

    def prompt_ids(self, row: Row, messages: Messages) -> list[int]:
        """The messages, and the beginning of the assistant's answer: what a server makes of
        them."""
        text = self._text(row, messages, answer_next=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def example(self, row: Row, messages: Messages) -> Example:
        """The conversation up to its last answer, with a loss on what the assistant writes, the
        ends of its turns included. A template that does not end them by the end-of-sequence token
        gets one after the last, or nothing would teach the model to stop."""
        text, answers = self._answers(row, messages)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        labels = [
            token if any(start <= at < end for start, end in answers) else IGNORED
            for token, (at, _) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        eos = int(self.tokenizer.eos_token_id)
        last = [i for i, (at, _) in enumerate(encoded["offset_mapping"]) if at >= answers[-1][0]]
        if eos not in (ids[i] for i in last):
            ids.append(eos)
            labels.append(eos)
        labels[0] = IGNORED  # nothing stands before it to tell it from
        return Example(tuple(ids), tuple(labels))

    def _answers(self, row: Row, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text of the conversation, and where in it the assistant's turns are."""
        text, answers = "", []
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if index == 0:
                raise row.error("the assistant begins; want a message before its first")
            if not message["content"].strip():
                raise row.error(f"message {index + 1}: the assistant's answer is empty")
            opened = self._text(row, messages[:index], answer_next=True)
            closed = self._text(row, messages[: index + 1], answer_next=False)
            if not opened.startswith(text) or not closed.startswith(opened):
                raise row.error(
                    "the model's chat template writes the beginning of this conversation "
                    "differently once more follows, so a model cannot be trained on all of its "
                    "answers at once; give each answer a row of its own, or use task = completion"
                )
            answers.append((len(opened), len(closed)))
            text = closed
        if not answers:
            raise row.error("want a message of the assistant, found none")
        return text, answers

    def _text(self, row: Row, messages: Messages, *, answer_next: bool) -> str:
        turns = [dict(message) for message in messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=answer_next, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, IndexError) as error:
            raise row.error(f"the model's chat template refuses the messages ({error})") from error
        return str(text)


def messages_of(row: Row, field: str) -> list[dict[str, str]]:
    """[{role, content}, ...] of a row. Raises DataError for another form, and for what a template
    would not be told, such as calls of tools."""
    messages: Any = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise row.error(f"{field}: want a list of {{role, content}}, got {str(messages)[:80]!r}")
    return [_message(row, f"{field}[{i}]", message) for i, message in enumerate(messages)]


def _message(row: Row, where: str, message: Any) -> dict[str, str]:
    given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
    if not all(isinstance(given.get(key), str) for key in ("role", "content")):
        raise row.error(f"{where}: want {{role, content}} with texts, got {str(message)[:80]!r}")
    if others := sorted(given.keys() - {"role", "content"}):
        raise row.error(f"{where}: has {others[0]!r}; only role and content are read, remove it")
    return given
