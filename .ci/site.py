"""Is the built site whole? No request to the outside, no dead link, no picture without words: python .ci/site.py FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

# What a browser fetches by itself when a page is opened. A link is fetched only by a click.
FETCHED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
}


class Page(HTMLParser):
    """The anchors, links, fetched addresses and pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.without_words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag refers to."""
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        address = found.get(FETCHED.get(tag, ""), "")
        # The address of a page itself, which is no file to fetch.
        if address and found.get("rel") != "canonical":
            self.fetched.append(address)
        # Sphinx puts the name of the file where a picture has no words.
        if tag == "img" and found.get("alt", "") in ("", found.get("src")):
            self.without_words.append(found.get("src", "?"))


def read(path: Path) -> Page:
    """A page, parsed."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def faults(folder: Path) -> Iterator[str]:
    """Every fault of a built site, in words."""
    pages = {path.resolve(): read(path) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        yield from (f"{where}: fetches {address}" for address in page.fetched if not _beside(path, address))
        yield from (f"{where}: dead link {link}" for link in page.links if _is_dead(path, link, pages))
        yield from (f"{where}: picture without words {picture}" for picture in page.without_words)
    for style in sorted(folder.rglob("*.css")):
        text = style.read_text(encoding="utf-8")
        if "url(http" in text or "url(//" in text or "@import url(" in text:
            yield f"{style.relative_to(folder)}: fetches from outside"


def _beside(page: Path, address: str) -> bool:
    """Whether what is fetched is in the page itself, or lies beside it."""
    parts = urlsplit(address)
    if parts.scheme == "data":
        return True
    return not parts.scheme and not parts.netloc and _target(page, address)[0].exists()


def _is_dead(page: Path, link: str, pages: Mapping[Path, Page]) -> bool:
    """Whether a link within the site leads nowhere; links to elsewhere are not followed."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target, anchor = _target(page, link)
    return not target.exists() or bool(anchor and target in pages and anchor not in pages[target].anchors)


def _target(page: Path, address: str) -> tuple[Path, str]:
    path, anchor = urldefrag(address)
    place = unquote(urlsplit(path).path)
    target = (page.parent / place).resolve() if place else page
    return (target / "index.html" if target.is_dir() else target), unquote(anchor)


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1])))
    sys.stdout.write("".join(f"{fault}\n" for fault in found))
    sys.exit(1 if found else 0)
