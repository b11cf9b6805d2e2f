"""The site: built without a warning, every link inside it leads somewhere, and its search finds the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import save_file
from tests.docs.pages import ROOT, all_pages
from tests.e2e.browser import needs_chromium, started

import graftkit as gk


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every warning of mkdocs is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make site)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    build(config)
    return folder


def test_links_lead_somewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 90
    lost = {
        (str(page.relative_to(site)), link) for page in pages for link in links_of(page) if not leads(page, link)
    }
    assert {(page, link) for page, link in lost if page != "404.html"} == set()


def links_of(page: Path) -> set[str]:
    found = re.findall(r"""(?:href|src)=["']?([^"'\s>]+)""", page.read_text(encoding="utf-8"))
    return {unescape(link) for link in found if not urlsplit(link).scheme and "${" not in link}


def leads(page: Path, link: str) -> bool:
    """Whether a link leads to a file and, in a page, to something with that id."""
    parts = urlsplit(link)
    target = (page.parent / unquote(parts.path)) if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return False
    if not parts.fragment or target.name in ("matrix.html", "serving-table.html"):
        return True
    return re.search(rf"""\sid=["']?{re.escape(unquote(parts.fragment))}["'\s>]""", target.read_text()) is not None


def test_every_rule_and_every_page_is_in_the_search(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0].strip("/") for entry in index["docs"]}
    rules = {f"rules/{page.stem}" for page in (ROOT / "docs" / "rules").glob("GK*.md")}
    assert len(rules) > 70
    assert rules <= found
    written = {Path(page.path).stem for page in all_pages() if page.path not in ("README.md", "docs/index.md")}
    assert written <= found


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    missing = {name for name in gk.__all__ if f'id="graftkit.{name}"' not in page}
    assert missing == {"__version__"}


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(?:https?:)?//([^"'\s>]+)""", page.read_text()
        )
        assert fetched == [], page


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_the_search_finds_a_rule(address: str, width: int) -> None:
    trouble: list[str] = []
    with started() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark")
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.goto(f"{address}/")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if width < 1000:
            page.locator("label.md-header__button[for=__search]").click()
        page.get_by_role("textbox", name="Search").press_sequentially("GK202")
        found = page.locator(".md-search-result__link[href*='rules/GK202']").first
        found.wait_for()
        found.click()
        page.wait_for_url("**/rules/GK202/**")
        assert "GK202" in page.locator("h1").inner_text()
    assert trouble == []


@pytest.mark.install
def test_an_installed_release_leads_to_the_page_of_a_rule(address: str, tmp_path: Path) -> None:
    """The package is built from what the release workflow's script leaves, and asked for a finding's address."""
    checkout = tmp_path / "checkout"
    for name in git("ls-files", "src", ".github", "README.md", "LICENSE", "pyproject.toml").splitlines():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    done(sys.executable, ".github/address.py", address, "https://code.test/graftkit", cwd=checkout)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    done(*pip, "--target", tmp_path / "installed", checkout, cwd=tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}')
    a, b = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
    save_file({a: torch.ones(2, 4), b: torch.ones(4, 2)}, tmp_path / "adapter_model.safetensors")
    installed = str(tmp_path / "installed")
    start = f"import sys; sys.path.insert(0, {installed!r}); from graftkit.cli.main import main; main()"
    said = done(sys.executable, "-P", "-c", start, "check", tmp_path, "--json", cwd=tmp_path)
    pages = {finding["code"]: finding["url"] for finding in json.loads(said)["findings"]}
    assert len(pages) > 5
    for rule, page in pages.items():
        assert page.startswith(f"{address}/")
        with urlopen(page) as answer:
            assert re.search(rf"<h1[^>]*>{rule}", answer.read().decode())


def git(*arguments: str) -> str:
    return done("git", *arguments, cwd=ROOT)


def done(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site, served on this machine: a browser runs no search from files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
