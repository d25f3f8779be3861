"""Checks the built site: ``python docs/site/check.py build/site``.

Fails if a page or a style sheet loads anything from another server, or if a link within the site leads nowhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

# Elements that load what an attribute names. <a> does not: its links to other servers are not followed.
LOADED = {
    "audio": ["src"],
    "embed": ["src"],
    "iframe": ["src"],
    "img": ["src", "srcset"],
    "link": ["href"],
    "object": ["data"],
    "script": ["src"],
    "source": ["src", "srcset"],
    "use": ["href"],
    "video": ["src", "poster"],
}
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*['"]?\s*((?:https?:)?//[^'")\s]+)""")


class Page(HTMLParser):
    """What a page loads, where its links lead, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = IN_STYLES.findall(text)
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each element."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif tag == "a" and name == "href":
                self.links.append(value)
            elif name in LOADED.get(tag, []):
                # srcset is a list of addresses, each with a size behind it
                self.loaded += [part.split()[0] for part in value.split(", ")] if name == "srcset" else [value]


def elsewhere(address: str) -> bool:
    """Whether an address is on another server."""
    return bool(urlsplit(address).netloc)


def problems(site: Path) -> Iterator[str]:
    """What is wrong with a site, a line for each.

    Args:
        site: the folder of the built site.
    """
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: no pages"
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        yield from (f"{where} loads {address}" for address in page.loaded if elsewhere(address))
        for address in [*page.links, *page.loaded]:
            if urlsplit(address).scheme or elsewhere(address):
                continue
            file, anchor = urldefrag(address)
            target = (path.parent / unquote(urlsplit(file).path)).resolve() if file else path
            if not target.is_file():
                yield f"{where} has a link to {address}: there is no such file"
            elif target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{where} has a link to {address}: there is no such heading"
    for path in sorted(site.rglob("*.css")):
        for address in IN_STYLES.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)} loads {address}"


if __name__ == "__main__":
    found = sorted(set(problems(Path(sys.argv[1]))))
    print("\n".join(found) or f"{sys.argv[1]}: every link within the site works, and nothing is loaded from elsewhere")
    raise SystemExit(bool(found))
