"""The page in a real browser, against a real server with a tiny model: nothing is replaced."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from adapter.making import ALL_LINEAR, edit_json, write_adapter
from conftest import CONFIG
from fake_runtime import STYLE, FakeRuntime
from playwright.sync_api import Browser, Locator, Page, Request, expect

from benchmarks.dashboard import served
from kasa_runtime import tokens
from kasa_runtime.adapter.base import BaseModel
from kasa_runtime.tokens import Action
from server.app import Edge, Server
from server.config import AccessConfig, ServerConfig
from tools.chromium import chromium, executable

pytestmark = pytest.mark.skipif(
    executable() is None, reason="no chromium in PATH; `make browser` installs it"
)
expect.set_options(timeout=10_000)

FLAGS = ("--executor", "torch", "--threads", "1", "--poll-interval-s", "0.05")
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def made(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for the tiny model: `one`, `two`, `three`, and one of another kind."""
    folder = tmp_path_factory.mktemp("made")
    base = BaseModel(tiny_chat_model)
    for seed, name in enumerate(("one", "two", "three", "other-kind")):
        write_adapter(folder / name, base, ALL_LINEAR, seed=seed, base_fingerprint=base.fingerprint)
    edit_json(folder / "other-kind" / "adapter_config.json", peft_type="IA3")
    return folder


@pytest.fixture(scope="module")
def address(
    tiny_chat_model: Path, made: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Of a server with `one` and `two`, and `broken`, which it refused."""
    adapters = tmp_path_factory.mktemp("adapters")
    for name, source in (("one", "one"), ("two", "two"), ("broken", "other-kind")):
        for path in (made / source).iterdir():
            (adapters / name).mkdir(exist_ok=True)
            (adapters / name / path.name).write_bytes(path.read_bytes())
    with served(tiny_chat_model, adapters, *FLAGS, home=session_home) as (_, http):
        yield f"http://{http}"


@contextmanager
def opened(browser: Browser, address: str, **options: object) -> Iterator[Page]:
    """The page. Whatever it says to the console, and whatever it asks of others, is wrong."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    page, wrong = context.new_page(), []

    def check(request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(address).netloc:
            wrong.append(f"asked for {request.url}")

    page.on("request", check)
    page.on("pageerror", lambda error: wrong.append(f"raised {error}"))
    # What the server refuses is in the console too; the tests say where it may.
    page.on(
        "console",
        lambda message: message.text.startswith("Failed to load") or wrong.append(message.text),
    )
    page.goto(address)
    try:
        yield page
        assert wrong == []
    finally:
        context.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        expect(row(page, "two")).to_be_visible()
        yield page


def row(page: Page, name: str) -> Locator:
    return page.locator(f"tr[data-name='{name}']")


def state(page: Page, name: str) -> Locator:
    return row(page, name).locator(".badge").first


def answer(page: Page, name: str) -> Locator:
    return page.locator(f"article[data-target='{name}']")


def choose(page: Page, *names: str) -> None:
    for box in page.get_by_role("group", name="Side by side").get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("value") in names)


def ask(page: Page, mode: str, prompt: str, max_tokens: int) -> None:
    page.get_by_role("radio", name=mode).check()
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Let go of files above the page, as a person with a mouse does."""
    content = [[name, data.hex()] for name, data in files.items()]
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, hex] of files) {
                const bytes = Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        content,
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("#upload", event, {"dataTransfer": transfer})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def model_of(address: str) -> str:
    return str(httpx.get(f"{address}/kasa/v1/model").json()["name"])


def test_adapters_are_listed_and_a_refused_one_says_why(page: Page, address: str) -> None:
    expect(page.get_by_role("status").first).to_have_text("connected")
    expect(page.locator("#model")).to_contain_text(model_of(address))
    expect(row(page, "one")).to_contain_text("4 + 4")
    expect(state(page, "broken")).to_have_text("quarantined")
    reason = httpx.get(f"{address}/kasa/v1/adapters/broken").json()["reason"]
    expect(page.locator("#more-broken .reason")).to_have_text(reason)
    assert "IA3" in reason
    assert not page.get_by_role("checkbox", name="broken").count()


def test_answers_stream_side_by_side_and_are_those_of_the_api(page: Page, address: str) -> None:
    names = [model_of(address), "one", "two"]
    choose(page, *names)
    ask(page, "Completion", PROMPT, 12)
    texts = []
    for name in names:
        expect(answer(page, name)).to_have_attribute("data-state", "done")
        body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        wanted = httpx.post(f"{address}/v1/completions", json=body).json()["choices"][0]
        turn = answer(page, name).locator(".turn")
        assert turn.evaluate("node => node.textContent") == wanted["text"]
        figures = rf"first token .+ m?s · [\d.]+ tokens/s · 12 tokens · {wanted['finish_reason']}"
        expect(answer(page, name).locator(".figures")).to_have_text(re.compile(figures))
        texts.append(wanted["text"])
    assert len(set(texts)) == 3
    expect(row(page, "one").locator("[data-label='First token']")).to_contain_text("s")
    expect(row(page, "one").locator("[data-label=Requests]")).to_have_text(re.compile(r"\d+"))


def test_a_conversation_goes_on_with_each_model_by_itself(page: Page) -> None:
    sent = []
    page.on("request", lambda r: r.method == "POST" and sent.append(json.loads(r.post_data or "")))
    choose(page, "one", "two")
    for prompt in ("hello", "again"):
        ask(page, "Chat", prompt, 4)
        for name in ("one", "two"):
            expect(answer(page, name)).to_have_attribute("data-state", "done")
    turns = {body["model"]: body["messages"] for body in sent}
    for name, messages in turns.items():
        shown = answer(page, name).locator(".turn")
        expect(shown).to_have_count(4)
        assert [m["role"] for m in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == shown.nth(1).evaluate("node => node.textContent")
    assert turns["one"][1] != turns["two"][1]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("article")).to_have_count(0)


def test_streams_can_be_stopped_one_and_all(page: Page, address: str) -> None:
    names = [model_of(address), "one", "two"]
    choose(page, *names)
    ask(page, "Completion", PROMPT, 120)
    page.get_by_role("button", name="Stop two").click()
    expect(answer(page, "two").locator(".figures")).to_contain_text("stopped")
    page.keyboard.press("Escape")
    for name in names:
        expect(answer(page, name)).to_have_attribute("data-state", "done")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    metrics = httpx.get(f"{address}/metrics").text
    assert "kasa_num_requests_running 0.0" in metrics


def test_what_the_server_refuses_is_shown_beside_the_other_answers(page: Page) -> None:
    choose(page, "one")
    ask(page, "Completion", PROMPT, 100_000)
    expect(answer(page, "one")).to_have_attribute("data-state", "failed")
    expect(answer(page, "one").locator(".reason")).to_contain_text("max_tokens")


def test_files_that_are_dropped_are_uploaded(page: Page, made: Path) -> None:
    drop(page, contents(made / "three"))
    expect(page.locator("#chosen-files li")).to_have_count(len(contents(made / "three")))
    page.get_by_label("Name", exact=True).fill("dropped")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload-note")).to_contain_text("dropped is there, version")
    expect(state(page, "dropped")).to_be_visible()
    choose(page, "dropped")
    ask(page, "Completion", PROMPT, 3)
    expect(answer(page, "dropped")).to_have_attribute("data-state", "done")


def test_a_refused_upload_says_why_and_may_be_tried_again(page: Page, made: Path) -> None:
    # A folder, by the picker, with a file in it that is no part of an adapter.
    (made / "other-kind" / "notes.txt").write_text("mine")
    page.locator("#folder").set_input_files(made / "other-kind")
    expect(page.locator("#upload-note")).to_have_text("Left out: notes.txt")
    expect(page.get_by_label("Name", exact=True)).to_have_value("other-kind")
    page.keyboard.press("Enter")
    expect(page.locator("#upload-note")).to_contain_text("'IA3'")
    expect(page.get_by_role("button", name="Upload")).to_be_enabled()
    assert not row(page, "other-kind").count()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#chosen")).to_be_hidden()


def test_an_adapter_is_merged_unmerged_pinned_and_unloaded(page: Page) -> None:
    page.get_by_role("button", name="Merge one").click()
    expect(state(page, "one")).to_have_text("merged")
    expect(page.locator("#notices")).to_contain_text("one is merged into the weights")
    page.get_by_role("button", name="Unmerge one").click()
    expect(state(page, "one")).not_to_have_text("merged")
    page.get_by_role("button", name="More of one").click()
    more = page.locator("#more-one")
    more.get_by_role("button", name="Pin").click()
    expect(row(page, "one").get_by_text("pinned")).to_be_visible()
    expect(state(page, "one")).to_have_text("in a slot")
    more.get_by_role("button", name="Unload").click()
    expect(row(page, "one").get_by_text("pinned")).to_be_hidden()
    expect(state(page, "one")).to_have_text(re.compile("ready"))


def test_an_adapter_is_rolled_back_and_deleted_when_that_is_meant(
    page: Page, made: Path, address: str
) -> None:
    versions = []
    for source in ("one", "three"):
        files = [("file", item) for item in contents(made / source).items()]
        answered = httpx.put(f"{address}/kasa/v1/adapters/mine", files=files)
        versions.append(answered.json()["version"])
    page.get_by_role("button", name="More of mine").click()
    page.get_by_role("button", name=f"Roll mine back to {versions[0][:12]}").click()
    expect(row(page, "mine").locator("th small")).to_have_text(versions[0][:12])
    expect(page.locator("#more-mine .versions .badge")).to_have_count(1)
    delete = page.locator("#more-mine").get_by_role("button", name="Delete")
    delete.click()
    expect(page.get_by_role("dialog")).to_contain_text("Delete mine?")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert httpx.get(f"{address}/kasa/v1/adapters/mine").status_code == 200
    delete.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row(page, "mine")).to_have_count(0)
    assert httpx.get(f"{address}/kasa/v1/adapters/mine").status_code == 404


def test_the_keyboard_is_enough(page: Page) -> None:
    def tab_to(label: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            name = focused.get_attribute("aria-label") or focused.text_content() or ""
            if name.startswith(label):
                return
        raise AssertionError(f"60 times Tab and no {label!r}")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("fox")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Completion")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Max tokens")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("8")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article[data-state=done]")).to_have_count(2)
    tab_to("Merge two")
    page.keyboard.press("Space")
    expect(state(page, "two")).to_have_text("merged")
    expect(page.get_by_role("button", name="Unmerge two")).to_be_focused()
    page.keyboard.press("Enter")
    expect(state(page, "two")).not_to_have_text("merged")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#more-two dl")).to_be_visible()
    expect(page.get_by_role("button", name="More of two")).to_have_attribute(
        "aria-expanded", "true"
    )


def test_nobody_is_asked_while_nobody_looks(page: Page) -> None:
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    with page.expect_request("**/kasa/v1/adapters"):
        pass
    look = "(state) => { Object.defineProperty(document, 'visibilityState', "
    look += "{ value: state, configurable: true }); "
    look += "document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(look, "hidden")
    page.wait_for_timeout(200)  # one may be under way
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    with page.expect_request("**/kasa/v1/adapters"):
        page.evaluate(look, "visible")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Browser, address: str, scheme: str) -> None:
    with opened(browser, address, color_scheme=scheme) as page:
        page.set_viewport_size({"width": 400, "height": 800})
        page.get_by_role("button", name="More of one").click()
        expect(page.locator("#more-one dl")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(18, 21, 28)") is (scheme == "dark")


# --- against a runtime that answers what it is told to --------------------------------------------


@contextmanager
def faked(config: ServerConfig) -> Iterator[tuple[str, FakeRuntime]]:
    """A server on a thread of its own, for this one belongs to the browser."""
    begun: Future[tuple[str, FakeRuntime]] = Future()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        edge = Edge(config)
        runtime = FakeRuntime(edge)
        async with Server(runtime, edge, config) as server:
            begun.set_result((f"http://127.0.0.1:{server.http_port}", runtime))
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()], name="server")
    thread.start()
    try:
        yield begun.result(30)
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def test_a_server_with_tokens_is_given_one(browser: Browser) -> None:
    token = tokens.new_token()
    line = tokens.line("alice", token, {Action.GENERATE: ["style"]})
    config = replace(CONFIG, access=AccessConfig(tokens=line))
    with faked(config) as (address, _), opened(browser, address) as page:
        expect(page.locator("#connection")).to_have_text("wants a token")
        page.get_by_label("Token", exact=True).fill(token)
        page.keyboard.press("Enter")
        expect(row(page, "style")).to_be_visible()
        assert not page.get_by_role("button", name="Merge").count()
        assert row(page, "broken").count() == 0
        choose(page, "style")
        ask(page, "Completion", "well said", 5)
        expect(answer(page, "style").locator(".turn")).to_have_text("well said ")
        page.reload()
        expect(row(page, "style")).to_be_visible()
        page.get_by_role("button", name="Forget").click()
        expect(page.locator("#connection")).to_have_text("wants a token")


def test_what_comes_from_others_is_shown_as_text(browser: Browser) -> None:
    hostile = "<img src=x onerror=alert(1)><b>&amp;"
    with faked(CONFIG) as (address, runtime), opened(browser, address) as page:
        runtime.answer = hostile
        runtime._adapters["style"] = replace(STYLE, target_modules=(hostile,))
        runtime._adapters["broken"] = replace(runtime._adapters["broken"], reason=hostile)
        expect(page.locator("#more-broken .reason")).to_have_text(hostile)
        page.get_by_role("button", name="More of style").click()
        expect(page.locator("#more-style dl")).to_contain_text(hostile)
        choose(page, "style")
        ask(page, "Chat", hostile, 50)
        expect(answer(page, "style").locator(".turn").last).to_have_text(hostile + " ")
        expect(answer(page, "style").locator(".turn").first).to_have_text(hostile)
        assert page.locator("main img").count() == 0
