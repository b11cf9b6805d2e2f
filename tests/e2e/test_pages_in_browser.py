"""The pages of commands and of a run, as people see them: on a phone, in the dark, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.cli.running import graft, graft_each
from tests.e2e.browser import needs_chromium, pictures, started
from tests.training.small import save_model, word_tokenizer, write_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_chromium

E2B = "google/gemma-4-E2B-it"
COMMANDS = {
    "survey": ("survey", E2B),
    "plan": ("plan", E2B, "--scope", "language,vision"),
    "verify": ("verify", "llama", "--twin"),
    "refused": ("doctor", "llama", "--recipe", "wrong.yaml"),
}
# A recipe with findings of every severity on its page.
WRONG = "model: llama\ndata: {path: gone.jsonl}\nargs: {learning_rat: 1, packing: true}\n"
NAMES = (*COMMANDS, "training")
TRAINING = """\
model: base
adapter: {targets: attention, r: 4}
data: {path: rows.jsonl, eval_share: 0.2}
args:
  output_dir: out
  bf16: false
  use_cpu: true
  max_steps: 30
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 10
"""
# WCAG 2.2, 1.4.3: contrast of text; less is enough for large text.
CONTRAST, CONTRAST_OF_LARGE = 4.5, 3.0
# Each text that can be seen, with its contrast against what lies behind it, painted as the browser paints.
MEASURE = """([least, leastLarge]) => {
  const brush = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const paint = colors => {
    brush.fillStyle = "white"; brush.fillRect(0, 0, 1, 1);
    for (const color of colors) { brush.fillStyle = color; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || !element.getClientRects().length || style.visibility !== "visible") continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(paint(behind)), light(paint([...behind, ink]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push({text: node.data.trim().slice(0, 40), ratio, enough: ratio >= (large ? leastLarge : least)});
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages by name, as their commands write them."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "wrong.yaml").write_text(WRONG)
    written = graft_each([[*words, "--format", "html"] for words in COMMANDS.values()], folder)
    texts = {name: done.stdout for name, done in zip(COMMANDS, written, strict=True)}
    texts["training"] = trained(folder)
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def trained(folder: Path) -> str:
    """Train a small model on sums, and return the page of that run."""
    save_model(folder / "base", word_tokenizer([*map(str, range(11)), "+", "="]))
    write_rows(folder / "rows.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(9)])
    (folder / "training.yaml").write_text(TRAINING)
    done = graft("train", "training.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(params=NAMES)
def file(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


class Viewer:
    """Opens pages, and collects what they complain about."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.complaints: list[str] = []

    def see(self, file: Path, media: str = "screen", **options: Any) -> Page:
        page = self.browser.new_context(**options).new_page()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.emulate_media(media=media)
        page.goto(file.as_uri())
        return page


@pytest.fixture
def viewer(browser: Browser) -> Iterator[Viewer]:
    """No page may have said anything."""
    viewer = Viewer(browser)
    yield viewer
    for context in browser.contexts:
        context.close()
    assert viewer.complaints == []


def too_faint(page: Page) -> list[dict[str, Any]]:
    texts = page.evaluate(MEASURE, [CONTRAST, CONTRAST_OF_LARGE])
    assert len(texts) > 10, "the page is nearly empty"
    return [text for text in texts if not text["enough"]]


def sticking_out(page: Page) -> int:
    """Return by how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_texts_are_readable_and_nothing_sticks_out(
    scheme: Any, width: int, file: Path, viewer: Viewer, album: Path
) -> None:
    page = viewer.see(file, color_scheme=scheme, viewport={"width": width, "height": 844})
    page.screenshot(path=album / f"{file.stem}-{width}-{scheme}.png", full_page=True)
    assert sticking_out(page) == 0
    assert too_faint(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_white(scheme: Any, file: Path, viewer: Viewer, album: Path) -> None:
    page = viewer.see(file, media="print", color_scheme=scheme, viewport={"width": 794, "height": 1123})
    page.screenshot(path=album / f"{file.stem}-print-{scheme}.png", full_page=True)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert too_faint(page) == []
    assert sticking_out(page) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_says_which_command_wrote_it(name: str, pages: dict[str, Path], viewer: Viewer) -> None:
    page = viewer.see(pages[name])
    assert page.locator("pre").last.inner_text().split() == ["graft", *COMMANDS[name], "--format", "html"]


def test_a_faint_text_and_a_wide_page_would_be_seen(viewer: Viewer, tmp_path: Path) -> None:
    file = tmp_path / "faint.html"
    texts = "<p>dark</p>" * 11 + "<p style='color: #aaa'>faint</p><pre style='width: 2000px'>wide</pre>"
    file.write_text(f"<!doctype html><body style='background: #fff'>{texts}")
    page = viewer.see(file)
    assert [text["text"] for text in too_faint(page)] == ["faint"]
    assert sticking_out(page) > 0


def test_what_is_ok_is_folded_on_a_screen_and_whole_on_paper(pages: dict[str, Path], viewer: Viewer) -> None:
    for media, sees in (("screen", False), ("print", True)):
        page = viewer.see(pages["training"], media)
        held, told = page.locator("details .verdict.ok"), page.locator(".verdict.unknown")
        assert held.count() > 10
        assert told.count() > 0
        assert told.first.is_visible()
        assert held.first.evaluate("cell => cell.checkVisibility({contentVisibilityAuto: true})") is sees
        if not sees:
            page.get_by_role("group").locator("summary").press("Enter")
            assert held.first.is_visible()
