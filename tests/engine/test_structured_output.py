"""Structured output on the native engine: whatever a random model would rather say, what it says
has the form that was asked for."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tiny import CHAT_VOCAB, save_tiny_chat_model, save_tiny_sentencepiece_model
from tokenizers import Tokenizer

from engine.making import Result, collect, collect_all, few_blocks, prompt, request, running, until
from kasa_runtime.engine.base import EngineRequest
from kasa_runtime.engine.native.constraint import MAX_KNOWN, ConstraintMaker
from kasa_runtime.engine.native.engine import NativeEngine
from kasa_runtime.engine.native.sampler import sample
from kasa_runtime.engine.native.sequence import Sequence
from kasa_runtime.errors import InvalidRequest
from kasa_runtime.types import FinishReason, SamplingParams, StructuredOutput

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 512
EOS = {2, 7}
NUM_SCHEMAS = 200
PROMPT = prompt(6)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two ends of sequence, and room for more tokens than its tokenizer has."""
    save = save_tiny_chat_model if request.param == "bytes" else save_tiny_sentencepiece_model
    directory = tmp_path_factory.mktemp("structured") / request.param
    return save(directory, max_position_embeddings=CONTEXT, eos_token_id=sorted(EOS))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[NativeEngine]:
    async with running(model_dir, tokenizer=tokenizer, max_num_seqs=64) as engine:
        yield engine


def ask(name: str, count: int = CONTEXT - 8, **wanted: Any) -> EngineRequest:
    """At temperature 1, so that a random model says anything."""
    form = {k: wanted.pop(k) for k in ("json_schema", "regex", "choice", "grammar") if k in wanted}
    sampling = {"temperature": 1.0, "seed": len(name) + sum(map(ord, name)), **wanted}
    return request(name, PROMPT, count, structured_output=StructuredOutput(**form), **sampling)


def text_of(result: Result, tokenizer: Tokenizer) -> str:
    tokens = [token for token in result.token_ids if token not in EOS]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


async def texts(
    engine: NativeEngine, tokenizer: Tokenizer, *wanted: EngineRequest
) -> Mapping[str, tuple[str, FinishReason | None]]:
    found = await collect_all(engine, wanted)
    return {name: (text_of(r, tokenizer), r.reason) for name, r in found.items()}


# --- JSON schemas ---------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b1", "the name", 'quo"te', "ünï", "x_y", "$"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-99, 99), st.text('abc "\\é\n{', max_size=4)
)
INTEGERS = st.builds(
    lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
    st.integers(-200, 200),
    st.integers(0, 300),
)
NUMBERS = st.builds(
    lambda low, span, exclusive: {
        "type": "number",
        ("exclusiveMinimum" if exclusive else "minimum"): low,
        "maximum": low + span,
    },
    st.integers(-20, 20),
    st.integers(1, 50),
    st.booleans(),
)
STRINGS = st.one_of(
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 4),
        st.integers(0, 4),
    ),
    st.sampled_from(["^[a-z]{1,5}$", "^(x|yy)+z?$", "^[0-9]{3}-[0-9]{2}$", "^[^a]{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 9}
    ),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(
        lambda name: {"type": "string", "format": name}
    ),
)
LEAVES = st.one_of(
    INTEGERS,
    NUMBERS,
    STRINGS,
    st.just({"type": "boolean"}),
    st.just({"type": ["null", "boolean"]}),
    st.lists(SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.recursive(
        SCALARS, lambda inner: st.dictionaries(NAMES, inner, max_size=2), max_leaves=3
    ).map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/shared"}),
)


def arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    bounds = st.tuples(st.integers(0, 2), st.integers(0, 2))
    lists = st.builds(
        lambda item, bound: {
            "type": "array",
            "items": item,
            "minItems": bound[0],
            "maxItems": sum(bound),
        },
        items,
        bounds,
    )
    tuples = st.lists(items, min_size=1, max_size=3).map(
        lambda each: {
            "type": "array",
            "prefixItems": each,
            "items": False,
            "minItems": len(each),
        }
    )
    return lists | tuples


@st.composite
def objects(draw: Any, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, values, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    rest = draw(st.sampled_from([False, False, {"type": "boolean"}]))
    found = {"type": "object", "properties": properties, "required": required}
    return found | {"additionalProperties": rest}


SCHEMAS = st.builds(
    lambda schema, shared: {**schema, "$defs": {"shared": shared}},
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            arrays(inner),
            objects(inner),
            st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        ),
        max_leaves=5,
    ),
    INTEGERS | STRINGS,
)


def random_schemas() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=NUM_SCHEMAS,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(SCHEMAS)
    def collect_one(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect_one()
    return found


async def test_what_finishes_of_200_random_schemas_validates(
    engine: NativeEngine, tokenizer: Tokenizer
) -> None:
    schemas = {str(i): schema for i, schema in enumerate(random_schemas())}
    assert len(schemas) >= NUM_SCHEMAS
    assert len({json.dumps(schema) for schema in schemas.values()}) > NUM_SCHEMAS * 0.9
    wanted = [ask(name, json_schema=json.dumps(schema)) for name, schema in schemas.items()]
    found = await texts(engine, tokenizer, *wanted)
    finished = {name: text for name, (text, why) in found.items() if why is FinishReason.STOP}
    for name, text in finished.items():
        Draft202012Validator(schemas[name]).validate(json.loads(text))
    assert {why for _, why in found.values()} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert len(finished) > 0.8 * len(schemas)


# --- regexes, choices, grammars -------------------------------------------------------------------

REGEXES = [
    "[0-9]{3}-[0-9]{4}",
    "(ab|cd)+",
    "(?i)the [a-f]{2,4}",
    "x?",
    'é"[^a-z]{2}\\\\',
    "^anchored$",
]


async def test_the_whole_text_matches_the_regex(engine: NativeEngine, tokenizer: Tokenizer) -> None:
    wanted = [ask(f"{i} {regex}", regex=regex) for regex in REGEXES for i in range(4)]
    found = await texts(engine, tokenizer, *wanted)
    for name, (text, why) in found.items():
        assert why is FinishReason.STOP
        assert re.fullmatch(name[2:], text), (name, text)


CHOICES = ("yes", "yes and no", 'say "no"', "new\nline", "back\\slash", "ünï😀", "a.*[b]", "-/#&~")


async def test_the_text_is_one_of_the_choices(engine: NativeEngine, tokenizer: Tokenizer) -> None:
    each = [ask(f"only {choice}", choice=(choice,)) for choice in CHOICES]
    any_of = [ask(f"any {i}", choice=CHOICES) for i in range(16)]
    found = await texts(engine, tokenizer, *each, *any_of)
    assert all(found[f"only {choice}"] == (choice, FinishReason.STOP) for choice in CHOICES)
    chosen = {found[f"any {i}"][0] for i in range(16)}
    assert chosen <= set(CHOICES) and len(chosen) > 2


async def test_a_context_free_grammar_is_followed(
    engine: NativeEngine, tokenizer: Tokenizer
) -> None:
    grammar = 'start: term | term "+" start\nterm: /[1-9][0-9]?/ | "(" start ")"'
    wanted = [ask(f"{i}", grammar=grammar) for i in range(8)]
    found = await texts(engine, tokenizer, *wanted)
    finished = [text for text, why in found.values() if why is FinishReason.STOP]
    assert len(finished) > 4
    for text in finished:
        ast.parse(text, mode="eval")


# --- the end --------------------------------------------------------------------------------------


async def test_where_nothing_may_follow_it_stops_whatever_else_was_asked(
    engine: NativeEngine, tokenizer: Tokenizer
) -> None:
    found = await texts(
        engine,
        tokenizer,
        ask("eos", choice=("yes",), ignore_eos=True),
        ask("min", choice=("yes",), min_tokens=100),
        ask("empty", regex="", ignore_eos=True, min_tokens=9),
        ask("exact", count=3, regex="[0-9]{3}"),
    )
    assert found["eos"] == found["min"] == ("yes", FinishReason.STOP)
    assert found["empty"] == ("", FinishReason.STOP)
    assert found["exact"][1] is FinishReason.STOP, "with its last token it was whole"


async def test_while_something_may_follow_min_tokens_and_ignore_eos_go_on(
    engine: NativeEngine, tokenizer: Tokenizer
) -> None:
    found = await texts(
        engine,
        tokenizer,
        ask("eos", count=40, regex="a*", ignore_eos=True),
        ask("min", count=60, regex="a*", min_tokens=40),
    )
    assert found["eos"] == ("a" * 40, FinishReason.LENGTH)
    assert re.fullmatch("a{40,}", found["min"][0])


async def test_what_max_tokens_cuts_is_a_beginning(
    engine: NativeEngine, tokenizer: Tokenizer
) -> None:
    value = {"the": ["quick", "brown", "fox"]}
    schema = json.dumps({"const": value})
    found = await texts(engine, tokenizer, ask("cut", count=5, json_schema=schema))
    text, why = found["cut"]
    assert why is FinishReason.LENGTH and text
    assert re.sub(r"\s", "", json.dumps(value)).startswith(re.sub(r"\s", "", text))


# --- beside others --------------------------------------------------------------------------------


async def test_a_row_is_what_it_is_alone_and_leaves_others_alone(
    engine: NativeEngine, model_dir: Path, tokenizer: Tokenizer
) -> None:
    """One grammar many times over, among requests without one; the cache is too small for all."""
    free = [request(f"free {i}", prompt(9, seed=i), 24, ignore_eos=True) for i in range(2)]
    bound = [ask(f"bound {i}", count=24, regex="[a-z ]{60,}") for i in range(3)]
    alone = {w.request_id: await collect(engine, w) for w in (*free, *bound)}
    assert len({tuple(alone[w.request_id].token_ids) for w in bound}) == 3
    async with running(model_dir, tokenizer=tokenizer, **few_blocks(20)) as small:
        together = await collect_all(small, [*free, *bound])
        assert small.stats().num_preemptions
    for name, result in alone.items():
        assert together[name].token_ids == result.token_ids, name


async def test_compiled_grammars_are_few_and_copied(tokenizer: Tokenizer) -> None:
    maker = ConstraintMaker(tokenizer, CHAT_VOCAB + 200, EOS)
    for i in range(MAX_KNOWN + 5):
        await maker.make(StructuredOutput(regex=f"a{{{i}}}b"))
    assert len(maker._known) == MAX_KNOWN
    first, second = [await maker.make(StructuredOutput(regex="ab")) for _ in range(2)]
    [a, b] = [vocabulary_id(tokenizer, text) for text in "ab"]
    assert first.take(a) is None and first.take(b) is None
    assert first.ended and not second.ended


def vocabulary_id(tokenizer: Tokenizer, text: str) -> int:
    token = tokenizer.token_to_id(text)
    assert token is not None
    return int(token)


# --- the sampler ----------------------------------------------------------------------------------


async def rows(
    tokenizer: Tokenizer, vocab: int, *forms: StructuredOutput | None, **params: Any
) -> Any:
    maker = ConstraintMaker(tokenizer, vocab, EOS)
    return [
        Sequence(
            EngineRequest("a", (1,), SamplingParams(**params)),
            constraint=None if form is None else await maker.make(form),
        )
        for form in forms
    ]


async def test_no_logit_is_large_enough_to_leave_the_form(tokenizer: Tokenizer) -> None:
    """Neither an end of sequence where the text is not whole, nor ids that are no token."""
    vocab = tokenizer.get_vocab_size() + 45
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1))
    logits[:, [*EOS, *range(vocab - 45, vocab)]] = 1000.0
    [a, b] = [vocabulary_id(tokenizer, text) for text in "ab"]
    for temperature in (0.0, 1.0):
        params = {"temperature": temperature, "seed": 1, "presence_penalty": 5.0, "top_p": 0.9}
        form, whole = StructuredOutput(regex="[ab]"), StructuredOutput(regex="a?")
        made = await rows(tokenizer, vocab, form, None, whole, **params)
        tokens, _ = sample(logits.clone(), made, frozenset(EOS))
        assert tokens[0] in (a, b)
        assert tokens[1] in {*EOS, *range(vocab - 45, vocab)}, "nobody bound this one"
        assert tokens[2] in EOS


async def test_log_probabilities_stay_the_models_own(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.get_vocab_size() + 3
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(2))
    made = await rows(tokenizer, vocab, StructuredOutput(regex="a"), logprobs=2)
    [token], [found] = sample(logits.clone(), made, frozenset(EOS))
    assert token == vocabulary_id(tokenizer, "a") and found is not None
    want = torch.log_softmax(logits[0], dim=-1)
    assert math.isclose(found.logprob, float(want[token]), rel_tol=1e-5)
    assert [i for i, _ in found.top] == want.topk(2).indices.tolist()


# --- errors ---------------------------------------------------------------------------------------


async def test_a_form_that_cannot_be_had_is_refused_before_the_first_token(
    engine: NativeEngine,
) -> None:
    for field, form in (
        ("json_schema", '{"not": {}}'),
        ("regex", "["),
        ("regex", "[^\\s\\S]"),  # compiles, and nothing matches it
        ("grammar", "start: start"),
        ("grammar", "start: <|nobody|>"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await collect(engine, ask("bad", **{field: form}))
        assert caught.value.field == f"structured_output.{field}"
    assert engine.stats().num_running == engine.stats().num_waiting == 0


async def test_a_grammar_that_leads_nowhere_ends_its_own_request_alone(
    engine: NativeEngine, tokenizer: Tokenizer
) -> None:
    other = asyncio.create_task(collect(engine, ask("other", count=20, regex="[a-z]{60,}")))
    for name, grammar in (
        ("nowhere", 'start: "a" x\nx: x "b"'),
        ("complex", 'start: x\nx: x x x | x x | "" | /[a-z]/'),
    ):
        found = Result()
        with pytest.raises(InvalidRequest) as caught:
            async for output in engine.generate(ask(name, grammar=grammar, ignore_eos=True)):
                found.outputs.append(output)
        assert caught.value.field == "structured_output.grammar"
        assert found.outputs and text_of(found, tokenizer)
    assert (await other).reason is not None
    await until(lambda: engine.stats().kv_cache_usage == 0)
    assert (await collect(engine, ask("nowhere", choice=("fine",)))).reason is FinishReason.STOP


async def test_without_a_tokenizer_it_is_refused(model_dir: Path) -> None:
    async with running(model_dir) as bare:
        with pytest.raises(InvalidRequest, match="without a tokenizer"):
            await collect(bare, ask("a", regex="a"))
        assert (await collect(bare, request("b", PROMPT, 3))).token_ids
