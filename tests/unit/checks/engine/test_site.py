"""The addresses of the rules' pages are those of the site that the installed package names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import graftkit as gk
from graftkit.checks.engine.site import _site, address_of_rule
from graftkit.report.sarif import to_sarif

METADATA = "Metadata-Version: 2.4\nName: graftkit\nVersion: 9\n"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that is found first, as an index would have given it."""
    folder = tmp_path / "graftkit-9.dist-info"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    _site.cache_clear()
    yield folder / "METADATA"
    _site.cache_clear()


def test_a_published_package_links_to_its_site(published: Path) -> None:
    links = "Project-URL: Source, https://code.test/g\nProject-URL: Documentation, https://docs.test/graftkit/\n"
    published.write_text(METADATA + links)
    assert address_of_rule("GK101") == "https://docs.test/graftkit/rules/GK101/"
    report = gk.doctor("llama")
    (log,) = to_sarif(report)["runs"]
    rules = log["tool"]["driver"]["rules"]
    assert {rule["helpUri"] for rule in rules} == {f"https://docs.test/graftkit/rules/{f.code}/" for f in report}


def test_without_a_site_it_is_the_page_in_the_repository(published: Path) -> None:
    published.write_text(METADATA)
    assert address_of_rule("GK101") == "docs/rules/GK101.md"
    (log,) = to_sarif(gk.doctor("llama"))["runs"]
    assert not any("helpUri" in rule for rule in log["tool"]["driver"]["rules"])
