"""Where the documentation is on the web: the address that the installed package was published with."""

from __future__ import annotations

from functools import cache

_PACKAGE = "graftkit"
# The label of the address among the package's links (``project.urls`` in pyproject.toml).
_LABEL = "Documentation"
# The folder of the rules' pages in the repository, and beneath the site's address; pages.py writes them.
PAGES = "docs/rules"
_ON_SITE = "rules"


def address_of_rule(code: str) -> str:
    """Return the web address of a rule's page; its path in the repository where the package names no site."""
    site = _site()
    return f"{site.rstrip('/')}/{_ON_SITE}/{code}/" if site else f"{PAGES}/{code}.md"


@cache
def _site() -> str | None:
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        links = metadata(_PACKAGE).get_all("Project-URL") or []
    except PackageNotFoundError:  # run from its source, without being installed
        return None
    labelled = dict(link.split(", ", 1) for link in links)
    return labelled.get(_LABEL)
