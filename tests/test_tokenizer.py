"""The tokenizer that is remembered, against the one that transformers makes of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kasa_runtime import tokenizer as tokenizer_module
from kasa_runtime.errors import InvalidRequest, ModelError
from kasa_runtime.tokenizer import Tokenizer
from kasa_runtime.types import ChatMessage, ToolCall

TEXTS = ["the quick brown fox", "", "  a<|im_end|>b\n\n", "héllo 世界 🙂", "<|im_start|>user\n"]
CHAT = (
    ChatMessage("system", "be <b>brief</b>"),
    ChatMessage("user", 'say "fox"\n\n'),
    ChatMessage("assistant", "fox 🙂"),
    ChatMessage("user", " again"),
)
TEMPLATES = {
    "loop": "{% for m in messages %}\n  {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}\nend",
    "special tokens": "{{ eos_token }}{{ bos_token }}{{ messages[0].content }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "json ascii": "{{ messages | tojson(ensure_ascii=True, sort_keys=True) }}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% set x = 1 %}{% for m in messages %}\n{% generation %}\n"
    "{{ m.content }}{% set x = 2 %}\n{% endgeneration %}\n{{ x }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ tools is none }}{{ documents is none }}{{ tools }}",
    "undefined": "{% if custom is defined %}x{% endif %}{{ nothing }}{{ messages[0].nothing }}.",
    "prompt": "{% if add_generation_prompt %}assistant:{% endif %}",
    "year": "{{ strftime_now('%Y') }}",
    "whitespace": "  {%- if true %}  a  {% endif -%}  \n  {# c #}\n b {{ '<&>' }}",
}
REFUSALS = {
    "raise": "{{ raise_exception('roles must alternate') }}",
    "sandbox": "{{ messages.append(1) }}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    "undefined attribute": "{{ nothing.more }}",
    "syntax": "{% for %}",
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KASA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tiny_chat_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_chat_model, tmp_path / "model")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Gets an entry whenever transformers is asked."""
    calls: list[Path] = []
    ask = tokenizer_module._as_json
    monkeypatch.setattr(tokenizer_module, "_as_json", lambda d: calls.append(d) or ask(d))
    return calls


def of_transformers(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def turns(messages: tuple[ChatMessage, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def set_template(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)


class TestEncoding:
    @pytest.mark.parametrize("text", TEXTS)
    def test_is_that_of_transformers_when_remembered(self, tiny_chat_model, text):
        first, second = Tokenizer(tiny_chat_model), Tokenizer(tiny_chat_model)
        want = of_transformers(tiny_chat_model)(text)["input_ids"]
        assert first.encode(text) == second.encode(text) == want

    def test_special_tokens_that_are_text_stay_text(self, model):
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": True}))
        want = of_transformers(model).backend_tokenizer.encode("a<|im_end|>").ids
        for _ in range(2):
            assert Tokenizer(model).encode("a<|im_end|>") == want
        assert 2 not in want


class TestChat:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_template_renders_as_in_transformers(self, model, name):
        set_template(model, TEMPLATES[name])
        theirs = of_transformers(model)
        text = theirs.apply_chat_template(turns(CHAT), tokenize=False, add_generation_prompt=True)
        want = theirs(text, add_special_tokens=False)["input_ids"]
        for _ in range(2):
            assert Tokenizer(model).encode_chat(CHAT) == want
        assert want

    @pytest.mark.parametrize("name", REFUSALS)
    def test_template_refuses_as_in_transformers(self, model, name):
        set_template(model, REFUSALS[name])
        with pytest.raises(Exception) as theirs:
            of_transformers(model).apply_chat_template(turns(CHAT), tokenize=False)
        for _ in range(2):
            with pytest.raises(
                InvalidRequest, match="the model's chat template refused it"
            ) as ours:
                Tokenizer(model).encode_chat(CHAT)
            assert str(theirs.value) in str(ours.value)

    def test_no_template(self, model):
        (model / "chat_template.jinja").unlink()
        for _ in range(2):
            tokenizer = Tokenizer(model)
            assert not tokenizer.has_chat_template
            with pytest.raises(InvalidRequest, match="no chat template"):
                tokenizer.encode_chat(CHAT)

    def test_no_message(self, tiny_chat_model):
        with pytest.raises(InvalidRequest, match="at least one message"):
            Tokenizer(tiny_chat_model).encode_chat(())

    @pytest.mark.parametrize("name", ["default", "tool_use"])
    def test_tools_and_their_calls_as_in_transformers(self, model, name):
        source = (
            "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{{ m.content }}"
            "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}"
            "{{ m.tool_call_id }}{% endfor %}"
        )
        set_template(model, source)
        if name == "tool_use":
            set_template(model, TEMPLATES["json"])
            (model / "additional_chat_templates").mkdir()
            (model / "additional_chat_templates" / "tool_use.jinja").write_text(source)
        tool = {"type": "function", "function": {"name": "weather"}}
        call = {
            "id": "1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Bonn"}},
        }
        asked = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sun", "tool_call_id": "1"},
        ]
        theirs = of_transformers(model)
        text = theirs.apply_chat_template(asked, tools=[tool], tokenize=False)
        messages = (
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "", (ToolCall("1", "weather", '{"city": "Bonn"}'),)),
            ChatMessage("tool", "sun", tool_call_id="1"),
        )
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert "city=Bonn" in text
        assert Tokenizer(model).encode_chat(messages, [tool]) == want

    def test_tools_want_a_template_that_tells_of_them(self, tiny_chat_model):
        with pytest.raises(InvalidRequest, match=r"tools: .*does not know tools"):
            Tokenizer(tiny_chat_model).encode_chat(CHAT, [{"type": "function"}])

    def test_the_default_of_several_templates(self, model):
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
        set_template(model, "plain {{ messages[0].content }}")
        theirs = of_transformers(model)
        assert isinstance(theirs.chat_template, dict)
        text = theirs.apply_chat_template(turns(CHAT), tokenize=False)
        for _ in range(2):
            want = theirs(text, add_special_tokens=False)["input_ids"]
            assert Tokenizer(model).encode_chat(CHAT) == want


class TestRemembering:
    def test_transformers_is_asked_once(self, model, asked):
        for _ in range(3):
            Tokenizer(model)
        assert len(asked) == 1

    def test_a_file_that_changed_counts(self, model, asked):
        before = Tokenizer(model).encode_chat(CHAT)
        set_template(model, "other")
        assert Tokenizer(model).encode_chat(CHAT) != before
        assert len(asked) == 2

    def test_a_file_more_counts(self, model, asked):
        Tokenizer(model)
        (model / "special_tokens_map.json").write_text('{"pad_token": "<|im_start|>"}')
        Tokenizer(model)
        assert len(asked) == 2

    def test_a_large_file_counts_by_its_time(self, model, asked, monkeypatch):
        monkeypatch.setattr(tokenizer_module, "LARGEST_READ", 0)
        for _ in range(2):
            Tokenizer(model)
        set_template(model, "other")
        Tokenizer(model)
        assert len(asked) == 2

    @pytest.mark.parametrize("package", ["transformers", "tokenizers"])
    def test_versions_count(self, model, asked, monkeypatch, package):
        Tokenizer(model)
        found = tokenizer_module.version
        monkeypatch.setattr(
            tokenizer_module, "version", lambda name: found(name) + "1" * (name == package)
        )
        Tokenizer(model)
        assert len(asked) == 2

    def test_needs_no_home_to_write_to(self, model, own_home):
        own_home.write_text("a file where the directory should be")
        want = of_transformers(model)("fox")["input_ids"]
        assert Tokenizer(model).encode("fox") == want


class TestRefusals:
    def test_directory_without_a_tokenizer(self, tiny_llama):
        with pytest.raises(ModelError, match="tokenizer"):
            Tokenizer(tiny_llama)

    def test_no_directory(self, tmp_path):
        with pytest.raises(ModelError, match="cannot load its tokenizer"):
            Tokenizer(tmp_path / "nothing")
