"""Hooks of `mkdocs build`: pages whose sources lie outside docs/, links between them, and the check
that no page loads anything from another host."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from proto_reference import wire_reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "adapters/README.md": "adapter-format.md",
    "proto/kasa/v1": "reference/wire.md",
}
MAY_BE_ABSENT = {"configuration.md", "security.md"}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^ *(```|~~~)")
# Attributes that a browser follows without being asked.
LOADING = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
    "embed": "src",
}
FOLLOWED_BY_HAND = {"canonical", "next", "prev", "alternate", "author", "license"}


def on_config(config: Any) -> Any:
    """Make the navigation that of this checkout."""
    config.nav = list(_navigation(config.nav))
    return config


def _navigation(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Leaves out the pages that a checkout may lack. A folder stands for its pages."""
    for entry in entries:
        [(title, target)] = entry.items()
        if isinstance(target, list):
            yield {title: list(_navigation(target))}
        elif target.endswith("/"):
            pages = sorted((ROOT / "docs" / target).glob("*.md"))
            if pages:
                yield {title: [target + page.name for page in pages]}
        elif target not in MAY_BE_ABSENT or (ROOT / "docs" / target).exists():
            yield entry


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose sources lie outside docs/."""
    for source, page in PAGES.items():
        path = ROOT / source
        content = wire_reference(path) if path.is_dir() else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages, and those to files that are
    no pages into plain text."""
    uri = page.file.src_uri
    if uri == PAGES["proto/kasa/v1"]:
        return markdown
    folder = os.path.dirname(SOURCES.get(uri, f"docs/{uri}"))
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= bool(FENCE.match(line))
        lines.append(line if fenced else LINK.sub(lambda m: _link(m, folder, uri), line))
    return "\n".join(lines)


def _link(match: re.Match[str], folder: str, uri: str) -> str:
    """`folder`: of the page's source, from the root. `uri`: of the page, from docs/."""
    image, text, target, anchor = match.groups()
    if ":" in target:
        return match[0]
    path = os.path.normpath(os.path.join(folder, target))
    inside = path.startswith("docs/")
    if path not in PAGES and not inside and (ROOT / path).exists():
        return text
    if path in PAGES or inside:
        wanted = PAGES.get(path, path.removeprefix("docs/"))
        target = os.path.relpath(wanted, os.path.dirname(uri) or ".")
    return f"{image}[{text}]({target}{anchor or ''})"


def on_post_build(config: Any) -> None:
    """Refuse a site with a page that loads something from another host."""
    found = [
        f"{path.relative_to(config.site_dir)}: {url}"
        for path in sorted(Path(config.site_dir).rglob("*"))
        if path.suffix in (".html", ".css")
        for url in _loaded(path)
        if re.match(r"(https?:)?//", url)
    ]
    if found:
        raise PluginError("loaded from other hosts:\n" + "\n".join(found))


def _loaded(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    yield from re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", text)
    if path.suffix == ".html":
        parser = _Loads()
        parser.feed(text)
        yield from parser.urls


class _Loads(HTMLParser):
    """Collects what a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        url = values.get(LOADING.get(tag, ""))
        if url and not FOLLOWED_BY_HAND & set((values.get("rel") or "").split()):
            self.urls.append(url)
