"""What mkdocs does not do by itself: pages that are no Markdown are copied as they are, with links to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Generated for a folder of Markdown files, where they are read, too.
_COPIED = {
    "matrix.html": {
        "/matrix.md": "/matrix/",
        "/rules/README.md": "/rules/",
        "/rules/${code}.md": "/rules/${code}/",
    },
    "serving-table.html": {},
}


def on_post_build(config: Any, **_: Any) -> None:
    """Let the copied pages link to the site's addresses.

    Raises:
        ValueError: a page no longer has one of these links.
    """
    for name, links in _COPIED.items():
        page = Path(config.site_dir, name)
        text = page.read_text(encoding="utf-8")
        for link, address in links.items():
            if link not in text:
                raise ValueError(f"{name} has no link that ends in {link}")
            text = text.replace(link, address)
        page.write_text(text, encoding="utf-8")
