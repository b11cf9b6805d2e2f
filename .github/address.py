"""Write the addresses that a release is published under into what its index shows: ``address.py SITE REPOSITORY``.

In a checkout the README's links lead to files beside it, and findings name the path of a rule's page. An index has
neither: there the README links to the documentation site, and the package's metadata names it (``graft`` and SARIF
then link to the rules' pages).
"""

import re
import sys
from pathlib import Path

_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
_BEFORE = "[project.optional-dependencies]"


def linked(target: str, site: str, repository: str) -> str:
    """Return the address of a file of the checkout: the page that is made of it, or the file in the repository."""
    if not target.startswith("docs/"):
        return f"{repository}/blob/HEAD/{target}"
    path = target.removeprefix("docs/")
    if path.endswith(".md"):
        path = path.removesuffix(".md").removesuffix("README").rstrip("/") + "/"
    return f"{site}/{path}"


def main(site: str, repository: str) -> None:
    site, repository = site.rstrip("/"), repository.rstrip("/")
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    readme.write_text(_LINK.sub(lambda found: f"]({linked(found[1], site, repository)})", text), encoding="utf-8")
    project = Path("pyproject.toml")
    before, after = project.read_text(encoding="utf-8").split(_BEFORE)
    urls = f'[project.urls]\nDocumentation = "{site}/"\nSource = "{repository}"\n\n'
    project.write_text(before + urls + _BEFORE + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
