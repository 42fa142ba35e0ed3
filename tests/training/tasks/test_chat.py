"""Conversations: the loss is on what the assistant writes, and nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kasa_runtime.errors import DataError
from kasa_runtime.training.examples import IGNORED

from ..making import make_tokenizer
from .conftest import MakeTask, row

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "A:{{ m.content.split('</think>')[-1] }}\n{% elif m.role == 'assistant' %}A:{{ m.content }}\n"
    "{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
TURNS = [
    {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "two"},
]


def tokenizer_with(template: str, end: str = "<|end|>") -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    if end != "<|end|>":
        tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.chat_template = template
    return tokenizer


def learnt(make: MakeTask, tokenizer: Any, messages: Any) -> tuple[str, list[str]]:
    """The whole conversation, and the stretches of it that have a loss."""
    task = make(task="chat", tokenizer=tokenizer)
    (example,) = task.encode([row(messages=messages)]).examples
    stretches: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            stretches.append([])
        else:
            stretches[-1].append(token)
    kept = [tokenizer.decode(stretch) for stretch in stretches if stretch]
    return tokenizer.decode(example.input_ids), kept


def test_loss_is_on_the_assistants_turns_and_their_ends(make: MakeTask) -> None:
    whole, kept = learnt(make, tokenizer_with(CHATML, "<|im_end|>"), TURNS)
    assert whole == (
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    assert kept == ["one<|im_end|>\n", "two<|im_end|>\n"]


def test_a_template_without_end_token_gets_one_after_the_last_answer(make: MakeTask) -> None:
    whole, kept = learnt(make, make_tokenizer(), TURNS[:2])
    assert whole == "<|user|>1?\n<|assistant|>one\n<|end|>"
    assert kept == ["one\n<|end|>"]


def test_what_follows_the_last_answer_is_left_out(make: MakeTask) -> None:
    assert learnt(make, make_tokenizer(), TURNS[:3]) == learnt(make, make_tokenizer(), TURNS[:2])


def test_first_token_has_no_loss_where_the_template_shows_answers_alone(make: MakeTask) -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}"
    whole, kept = learnt(make, tokenizer_with(template + "{% endfor %}"), TURNS[:2])
    assert (whole, kept) == ("one<|end|>", ["ne<|end|>"])


def test_text_outside_ascii_keeps_its_place(make: MakeTask) -> None:
    messages = [{"role": "user", "content": "für 1 €?"}, {"role": "assistant", "content": "«ö»"}]
    assert learnt(make, make_tokenizer(), messages)[1] == ["«ö»\n<|end|>"]


def test_template_that_trims_what_is_said_is_followed(make: MakeTask) -> None:
    tokenizer = tokenizer_with(CHATML.replace("m.content", "m.content | trim"), "<|im_end|>")
    messages = [{"role": "user", "content": " 1? "}, {"role": "assistant", "content": " one "}]
    assert learnt(make, tokenizer, messages)[1] == ["one<|im_end|>\n"]


def test_template_that_merges_the_system_message_is_followed(make: MakeTask) -> None:
    """Its rendering of the system message alone is no beginning of the conversation."""
    tokenizer = tokenizer_with(
        "{% for m in messages %}{% if m.role == 'user' %}[{% if loop.index0 == 1 %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}]"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    whole, kept = learnt(make, tokenizer, messages)
    assert whole == "[Be brief. 1?]one<|end|>[2?]two<|end|>"
    assert kept == ["one<|end|>", "two<|end|>"]


def test_template_that_reshapes_earlier_turns_is_refused(make: MakeTask) -> None:
    thought = [dict(m) for m in TURNS]
    thought[1]["content"] = "<think>hm</think>one"
    tokenizer = tokenizer_with(THINKING)
    assert learnt(make, tokenizer, thought[:2])[1] == ["<think>hm</think>one\n<|end|>"]
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*differently once more follows"):
        learnt(make, tokenizer, thought)


def test_refusal_of_a_template_is_told(make: MakeTask) -> None:
    tokenizer = tokenizer_with("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*template refuses .*roles must alternate"):
        learnt(make, tokenizer, TURNS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"messages: want a list of \{role, content\}, got 'hello'"),
        ([], r"messages: want a list"),
        (None, r"field 'messages' is null"),
        ([{"role": "user"}], r"messages\[0\]: want \{role, content\} with texts"),
        ([TURNS[0], {"role": "assistant", "content": None}], r"messages\[1\]: want \{role"),
        ([TURNS[0], {**TURNS[1], "tool_calls": []}], r"messages\[1\]: has 'tool_calls'; only role"),
        ([TURNS[1]], r"the assistant begins; want a message before its first"),
        ([TURNS[0]], r"want a message of the assistant, found none"),
        ([TURNS[0], {"role": "assistant", "content": " "}], r"message 2: .*answer is empty"),
    ],
)
def test_bad_messages_are_named(make: MakeTask, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:7: {message}"):
        learnt(make, make_tokenizer(), messages)


def test_keys_that_are_null_are_not_there(make: MakeTask) -> None:
    """As in a table, where every message has all keys of any."""
    padded = [{**m, "tool_calls": None} for m in TURNS]
    assert learnt(make, make_tokenizer(), padded) == learnt(make, make_tokenizer(), TURNS)


def test_the_last_answer_is_what_is_asked_for(make: MakeTask) -> None:
    task = make(task="chat", eval_metrics=("exact_match",))
    each = row(messages=TURNS)
    prompt = task.tokenizer.decode(task.prompt_ids(each))
    assert prompt == "<|user|>1?\n<|assistant|>one\n<|user|>2?\n<|assistant|>"
    assert task.references(each) == ["two"]
    assert task.question(each) == "2?"
    with pytest.raises(DataError, match="the last message must be the assistant's"):
        task.check([row(messages=TURNS[:3])])
    with pytest.raises(DataError, match="want a message before the assistant's"):
        task.check([row(messages=TURNS[1:2])])
