"""The pictures of docs/page.md: the page of a real server, in a headless Chromium (`make browser`).

python tools/screenshots.py [--model M] [--adapters DIR] [--out DIR]

The adapters are copied first; one of them in a form that is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.dashboard import served  # noqa: E402
from tools.chromium import chromium  # noqa: E402

ADAPTERS = ("e2e", "snips", "tickets")
ASKED = ("snips", "tickets")
PROMPT = "Hello, FormFlow crashes when I open it, please help today. The case is CS-1042. =>"
TIMEOUT_MS = 200_000
SETTLE_MS = 2000  # a refresh shows the latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapters", type=Path, default=ROOT / "adapters")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    expect.set_options(timeout=TIMEOUT_MS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(options.model, copied(options.adapters, Path(scratch)), "--pin", "e2e") as (_, http),
        chromium() as browser,
    ):
        for scheme, width in (("light", 1240), ("dark", 1240)):
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": 900}
            )
            page = context.new_page()
            page.goto(f"http://{http}")
            ask(page)
            if scheme == "dark":
                page.get_by_role("button", name="More of tickets").click()
            page.wait_for_timeout(SETTLE_MS)
            page.screenshot(path=options.out / f"page-{scheme}.png", full_page=True)


def copied(adapters: Path, scratch: Path) -> Path:
    for name in ADAPTERS:
        shutil.copytree(adapters / name, scratch / name)
    refused = shutil.copytree(adapters / ADAPTERS[0], scratch / "torn")
    config = refused / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    return scratch


def ask(page: Page) -> None:
    """Twice: the first time, adapters may have to be read."""
    for name in ADAPTERS:
        expect(page.get_by_role("checkbox", name=name)).to_be_visible()
    page.get_by_role("radio", name="Completion").check()
    for box in page.get_by_role("group", name="Side by side").get_by_role("checkbox").all():
        name = box.get_attribute("value")
        box.set_checked(name in ASKED or name not in ADAPTERS)
    page.get_by_label("Max tokens").fill("48")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    for _ in range(2):
        page.keyboard.press("Control+Enter")
        expect(page.locator("article[data-state=done]")).to_have_count(len(ASKED) + 1)


if __name__ == "__main__":
    main()
