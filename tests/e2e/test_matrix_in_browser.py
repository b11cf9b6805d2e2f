"""The matrix's page in a real browser: filters, addresses, keyboard, colours, phones, paper, and many cells."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import pytest
from tests.e2e.browser import needs_chromium, started

from graftkit.report.matrix_page import MatrixCell, MatrixFamily, MatrixKey, MatrixRun, render_matrix

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_chromium

DOCS = Path(__file__).parents[2] / "docs"
CHECKS = ("twin", "plan", "attach", "gradients", "merge", "reload", "checkpointing", "cache", "packing", "4-bit")
VERDICTS = ("proven", "failed", "refused", "unknown", "not-applicable")
KEY = MatrixKey(
    verdicts=dict.fromkeys(VERDICTS, "What it means."),
    checks=dict.fromkeys(CHECKS, "What it tries."),
    proof=CHECKS[:6],
    uncounted=("not-applicable",),
    released={"5.0.0": "2025-11-01", "5.9.0": "2025-12-30", "5.10.0": "2026-02-01"},
)
VERSIONS = {"graftkit": "1.0", "torch": "2.13.0"}
EVIL = "<img src=x onerror=alert(1)>"


def run_of(name: str, method: str, outcome: str = "proven", /, **verdicts: str) -> MatrixRun:
    """Return a run in which every check is proven but those that are named."""
    found = {check: verdicts.get(check, "proven") for check in CHECKS}
    cells = tuple(
        MatrixCell(
            check,
            verdict,
            f"graft matrix --families {name} --methods {method} --checks {check}",
            codes=("GK203",) if verdict == "failed" else (),
            message="It differs." if verdict == "failed" else "",
            evidence={"difference": 0.25} if verdict == "failed" else {},
            seconds=0.5,
            versions=VERSIONS,
        )
        for check, verdict in found.items()
    )
    return MatrixRun(method, outcome, cells)


FAMILIES = (
    MatrixFamily(
        "bert", "BertForMaskedLM", ("text",), (run_of("bert", "lora", cache="not-applicable"),), introduced="5.0.0"
    ),
    MatrixFamily(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        ("text", "image", "audio"),
        (run_of("gemma4", "lora"), run_of("gemma4", "dora"), run_of("gemma4", "oft", "refused", plan="refused")),
        introduced="5.10.0",
    ),
    MatrixFamily(
        "sam", "SamModel", ("image",), (run_of("sam", "lora", "failed", gradients="failed"),), introduced="5.0.0"
    ),
    MatrixFamily(
        "whisper",
        "WhisperForConditionalGeneration",
        ("audio",),
        (run_of("whisper", "lora", "unknown", merge="unknown"), run_of("whisper", "dora")),
        introduced="5.9.0",
    ),
)

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open a page of families; after the test, no page may have said anything or asked for anything."""
    contexts = []
    trouble: list[str] = []

    def opened(families: tuple[MatrixFamily, ...] = FAMILIES, address: str = "", **options: Any) -> Page:
        file = tmp_path / "matrix.html"
        file.write_text(render_matrix(families, KEY, "Generated.", docs="."), encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(5000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on("request", lambda request: trouble.append(request.url) if request.url != page_of(file) else None)
        page.goto(page_of(file) + address)
        return page if options.get("java_script_enabled") is False else ready(page)

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def page_of(file: Path) -> str:
    return file.as_uri()


def ready(page: Page) -> Page:
    """Wait until the data is unpacked."""
    page.locator("#filters").wait_for()
    return page


def shown(page: Page) -> list[str]:
    """Return the families that are on the page."""
    return page.locator("#grid .body .row:visible .family b").all_text_contents()


def state(page: Page) -> dict[str, str]:
    """Return what the address says."""
    fragment = urlparse(page.url).fragment
    return {key: unquote(value) for key, value in (part.split("=") for part in fragment.split("&") if part)}


def opened_path(page: Page) -> str:
    """Return what the panel is about, as it is read out."""
    return str(page.get_by_role("dialog").get_attribute("aria-label"))


def cell(page: Page, family: str, check: str) -> Any:
    return page.get_by_role("gridcell", name=f"{family}, {check}: ")


# ---- filters and addresses


@pytest.mark.parametrize(
    ("address", "families"),
    [
        pytest.param("", ["bert", "gemma4", "sam", "whisper"], id="no filter"),
        pytest.param("#q=conditional", ["gemma4", "whisper"], id="part of a class's name"),
        pytest.param("#q=gk203", ["sam"], id="a code"),
        pytest.param("#q=conditional%20gem", ["gemma4"], id="two words"),
        pytest.param("#modality=audio", ["gemma4", "whisper"], id="modality"),
        pytest.param("#modality=audio,image", ["gemma4"], id="all modalities"),
        pytest.param("#method=dora", ["gemma4", "whisper"], id="method"),
        pytest.param("#verdict=proven", ["bert", "gemma4"], id="outcome"),
        pytest.param("#verdict=failed,unknown", ["sam", "whisper"], id="either verdict"),
        pytest.param("#verdict=failed&in=gradients", ["sam"], id="verdict of a check"),
        pytest.param("#verdict=failed&in=merge", [], id="verdict that this check has nowhere"),
        pytest.param("#verdict=not-applicable&in=any", ["bert"], id="verdict of any check"),
        pytest.param("#method=*&verdict=refused", ["gemma4"], id="verdict of any method"),
        pytest.param("#since=5.9.0", ["gemma4", "whisper"], id="releases are not compared as text"),
        pytest.param(
            "#method=no-such&since=9&verdict=x", ["bert", "gemma4", "sam", "whisper"], id="unknown values"
        ),
    ],
)
def test_an_address_holds_the_filters(address: str, families: list[str], open_page: Open) -> None:
    page = open_page(address=address)
    assert shown(page) == families
    assert page.locator("#none").is_visible() == (not families)


def test_controls_change_what_is_shown_and_the_address(open_page: Open) -> None:
    page = open_page()
    page.locator("#q").fill("a")
    page.get_by_role("button", name="image", exact=True).click()
    page.get_by_role("button", name="failed", exact=True).click()
    page.locator("#where").select_option("gradients")
    assert shown(page) == ["sam"]
    assert state(page) == {"q": "a", "modality": "image", "verdict": "failed", "in": "gradients"}
    page.reload()
    ready(page)
    assert shown(page) == ["sam"]
    assert page.locator("#q").input_value() == "a"
    page.get_by_role("button", name="Clear filters").click()
    assert len(shown(page)) == len(FAMILIES)
    assert state(page) == {}


def test_columns_count_what_is_shown(open_page: Open) -> None:
    page = open_page(address="#q=s")
    assert shown(page) == ["bert", "sam", "whisper"]
    counts = {check: tuple(rest) for check, *rest in (each.inner_text().split() for each in heads_of(page))}
    assert counts["twin"] == ("3/3",)
    assert counts["gradients"] == ("2/3",)
    assert counts["cache"] == ("2/2",)
    page.locator("#q").fill("bert")
    counts = {check: tuple(rest) for check, *rest in (each.inner_text().split() for each in heads_of(page))}
    assert counts["gradients"] == ("1/1",)
    assert counts["cache"] == ()


def heads_of(page: Page) -> list[Any]:
    return page.locator("#grid .head > :not(.corner)").all()


def test_summary_links_filter(open_page: Open) -> None:
    page = open_page()
    page.locator(".share a", has_text="dora").click()
    assert shown(page) == ["gemma4", "whisper"]
    assert page.locator(".share a[aria-current=true] .name", has_text="dora").count() == 1


def test_all_methods_are_columns(open_page: Open) -> None:
    page = open_page(address="#method=*")
    assert [each.inner_text().split()[0] for each in heads_of(page)] == ["lora", "dora", "oft"]
    assert "refused" in cell(page, "gemma4", "oft").get_attribute("class")
    assert "none" in cell(page, "whisper", "oft").get_attribute("class")
    assert shown(page) == ["gemma4", "whisper"]


# ---- evidence


def test_a_cell_opens_its_evidence(open_page: Open) -> None:
    page = open_page()
    cell(page, "sam", "gradients").click()
    panel = page.get_by_role("dialog")
    text = panel.inner_text()
    for said in ("It differs.", "GK203", "0.25", "0.5 s", "2.13.0"):
        assert said in text
    assert state(page)["cell"] == "sam/lora/gradients"
    page.reload()
    ready(page)
    assert opened_path(page) == "sam, lora, gradients"
    panel.get_by_role("link", name="merge: proven").click()
    assert opened_path(page) == "sam, lora, merge"
    page.go_back()
    assert opened_path(page) == "sam, lora, gradients"
    panel.get_by_role("button", name="Close").click()
    assert not panel.is_visible()
    assert "cell" not in state(page)


def test_a_family_shows_all_its_methods(open_page: Open) -> None:
    page = open_page(address="#cell=gemma4")
    panel = page.get_by_role("dialog")
    panel.get_by_role("link", name="oft, plan: refused").click()
    assert opened_path(page) == "gemma4, oft, plan"
    panel.get_by_role("link", name="oft", exact=True).click()
    assert opened_path(page) == "gemma4, oft"
    assert panel.locator(".badge").inner_text().endswith("refused")


@pytest.mark.parametrize("address", ["#cell=none", "#cell=bert/oft", "#cell=bert/lora/none", "#cell=//"])
def test_a_cell_that_is_not_there_opens_nothing(address: str, open_page: Open) -> None:
    page = open_page(address=address)
    assert not page.locator("#panel").is_visible()
    assert len(shown(page)) == len(FAMILIES)


def test_the_command_is_copied_as_it_is(open_page: Open) -> None:
    page = open_page(address="#cell=gemma4/dora/4-bit", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    command = "graft matrix --families gemma4 --methods dora --checks 4-bit"
    assert page.evaluate("navigator.clipboard.readText()") == command


def test_every_link_has_a_target(open_page: Open) -> None:
    page = open_page(address="#cell=sam/lora/gradients")
    page.locator("details").evaluate("element => element.open = true")
    links = page.locator("a[href]").evaluate_all("all => all.map(each => each.getAttribute('href'))")
    outside = {link for link in links if not link.startswith("#")}
    assert outside == {"./rules/GK203.md", "./rules/README.md", "./matrix.md"}
    assert [link for link in outside if not (DOCS / link).is_file()] == []
    for link in sorted({link for link in links if link.startswith("#") and "=" in link}):
        page.evaluate("hash => { location.hash = hash; }", link)
        page.wait_for_function("hash => location.hash === hash", arg=link)
        assert shown(page), link


def test_texts_are_never_read_as_html(open_page: Open) -> None:
    run = MatrixRun("lora", "failed", (MatrixCell("twin", "failed", EVIL, (EVIL,), EVIL, {EVIL: EVIL}),))
    page = open_page((MatrixFamily(EVIL, EVIL, (EVIL,), (run,)),))
    page.get_by_role("gridcell").first.click()
    assert EVIL in page.get_by_role("dialog").inner_text()
    assert page.locator("img").count() == 0


# ---- keyboard


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id")


def test_the_keyboard_is_enough(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("/")
    assert focused(page) == "q"
    page.keyboard.type("er")
    assert shown(page) == ["bert", "gemma4", "whisper"]
    page.keyboard.press("Escape")
    assert len(shown(page)) == len(FAMILIES)
    page.get_by_role("gridcell").first.focus()
    for key, found in [
        ("ArrowRight", "bert, plan: proven"),
        ("ArrowDown", "gemma4, plan: proven"),
        ("End", "gemma4, 4-bit: proven"),
        ("PageDown", "whisper, 4-bit: proven"),
        ("ArrowDown", "whisper, 4-bit: proven"),
        ("ArrowUp", "sam, 4-bit: proven"),
        ("Control+Home", ""),
        ("ArrowRight", "bert, twin: proven"),
    ]:
        page.keyboard.press(key)
        assert focused(page) == found, key
        assert page.locator("#grid [tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    assert focused(page) == "bert, lora, twin"
    page.keyboard.press("Escape")
    assert focused(page) == "bert, twin: proven"
    assert not page.locator("#panel").is_visible()


def test_tab_stops_once_in_the_grid_and_passes_over_hidden_rows(open_page: Open) -> None:
    page = open_page(address="#q=sam")
    stops = page.locator("#grid [tabindex='0']")
    assert stops.count() == 1
    assert stops.get_attribute("aria-label").startswith("sam, ")
    page.get_by_role("button", name="Clear filters").focus()
    page.keyboard.press("Tab")
    assert focused(page).startswith("sam, ")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_first_tab_leads_past_everything_else(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert focused(page) == "skip"
    page.keyboard.press("Enter")
    assert focused(page) == "bert, twin: proven"
    assert state(page) == {}


def test_roles_are_those_of_a_grid(open_page: Open) -> None:
    page = open_page()
    grid = page.get_by_role("grid")
    assert grid.get_attribute("aria-colcount") == str(len(CHECKS) + 1)
    assert grid.get_attribute("aria-rowcount") == str(len(FAMILIES) + 1)
    assert grid.get_by_role("rowheader").count() == len(FAMILIES)
    assert grid.get_by_role("columnheader").count() == len(CHECKS) + 1


# ---- colours, phones, paper


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(scheme: str, open_page: Open) -> None:
    page = open_page(color_scheme=scheme)
    style = """(selector) => {
      const found = getComputedStyle(document.querySelector(selector));
      return [found.color, found.backgroundColor];
    }"""
    ink, ground = page.evaluate(style, "body")
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    assert contrast(ink, ground) > 7
    for selector in (".proven", ".failed", ".unknown"):
        colours = page.evaluate(style, f"#grid .cell{selector}")
        assert contrast(*colours) >= 4.5, selector
    for selector in (".modalities", ".cell.not-applicable"):
        dim, _ = page.evaluate(style, f"#grid {selector}")
        assert contrast(dim, ground) >= 4.5, selector


PHONE = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("address", ["", "#method=*", "#cell=gemma4", "#cell=sam/lora/gradients"])
def test_nothing_sticks_out_on_a_phone(address: str, open_page: Open) -> None:
    long = MatrixFamily("a_family_whose_name_" + "goes_on_" * 8, "C" * 80, ("text",), (run_of("long", "lora"),))
    many = MatrixFamily("many", "Many", ("text",), tuple(run_of("many", f"method-{at}") for at in range(30)))
    page = open_page((*FAMILIES, long, many), address, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    size = page.locator("#grid .cell:visible").first.bounding_box()
    assert size is not None
    assert min(size["width"], size["height"]) >= 24


def test_a_sheet_leaves_the_cell_in_sight(open_page: Open) -> None:
    families = tuple(MatrixFamily(f"f{at:02}", "C", ("text",), (run_of(f"f{at:02}", "lora"),)) for at in range(60))
    page = open_page(families, "#cell=f40/lora/merge", **PHONE)
    own = cell(page, "f40", "merge").bounding_box()
    sheet = page.locator("#panel").bounding_box()
    assert own is not None
    assert sheet is not None
    assert own["y"] > 0
    assert own["y"] + own["height"] <= sheet["y"]


def test_without_a_script_there_is_a_table(open_page: Open) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator(".static tbody tr").count() == len(FAMILIES)
    assert page.locator(".static td.failed").inner_text() == "failed"
    assert page.locator(".figure").inner_text() == "2 of 4"
    assert not page.locator("#filters").is_visible()


def test_paper_shows_the_matrix_alone(open_page: Open) -> None:
    page = open_page(address="#cell=sam/lora/gradients")
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible()
    assert not page.locator("#panel").is_visible()
    assert shown(page) == [family.model_type for family in FAMILIES]


# ---- many cells

METHODS = ("lora", *(f"method-{at}" for at in range(29)))


@pytest.fixture(scope="module")
def many() -> tuple[MatrixFamily, ...]:
    """560 families with one method, 100 of them with 30: 35,000 cells."""
    draw = random.Random(0)

    def cells(name: str, method: str) -> MatrixRun:
        found = [draw.choices(VERDICTS, (90, 4, 2, 2, 2))[0] for _ in CHECKS]
        return MatrixRun(
            method,
            found[0],
            tuple(
                MatrixCell(
                    check,
                    verdict,
                    f"graft matrix --families {name} --methods {method} --checks {check}",
                    codes=("GK203",) if verdict == "failed" else (),
                    message=f"{draw.randrange(99)} sites",
                    evidence={"difference": draw.random(), "tolerance": 1e-4, "tensors": draw.randrange(99)},
                    seconds=draw.random(),
                    versions=VERSIONS,
                )
                for check, verdict in zip(CHECKS, found, strict=True)
            ),
        )

    return tuple(
        MatrixFamily(
            f"family{at:03}",
            "LargeForConditionalGeneration",
            ("text", "image") if at % 3 else ("audio",),
            tuple(cells(f"family{at:03}", method) for method in (METHODS if at < 100 else METHODS[:1])),
        )
        for at in range(560)
    )


# Milliseconds from the change to a page that is laid out again.
TIMED = """([id, value]) => {
  const began = performance.now();
  const control = document.getElementById(id);
  control.value = value;
  control.dispatchEvent(new Event(id === "q" ? "input" : "change"));
  document.body.getBoundingClientRect();
  return performance.now() - began;
}"""


def test_many_cells_are_filtered_at_once(many: tuple[MatrixFamily, ...], open_page: Open) -> None:
    assert len(render_matrix(many, KEY, "Generated.").encode()) < 700_000
    page = open_page(many)
    assert page.evaluate(TIMED, ["q", "y12"]) < 250
    assert shown(page) == [f"family12{digit}" for digit in range(10)]
    assert page.evaluate(TIMED, ["q", ""]) < 250
    assert page.evaluate(TIMED, ["method", "*"]) < 2000
    assert page.evaluate(TIMED, ["q", "y01"]) < 500
    assert shown(page) == [f"family01{digit}" for digit in range(10)]


# ---- the page in docs


def test_the_page_in_docs_opens_every_failure_with_links_that_lead_somewhere(browser: Browser) -> None:
    context = browser.new_context()
    context.set_default_timeout(5000)
    page, trouble = context.new_page(), []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(page_of(DOCS / "matrix.html") + "#verdict=failed,refused,unknown&in=any")
    ready(page)
    for each in page.locator("#grid .row:visible .cell:is(.failed, .refused, .unknown)").all()[:40]:
        each.click()
        links = page.locator("#panel a[href]").evaluate_all("all => all.map(each => each.getAttribute('href'))")
        outside = [link for link in links if not link.startswith("#")]
        assert [link for link in outside if not (DOCS / link).is_file()] == []
        assert page.locator("#panel pre").inner_text().startswith("graft matrix --families ")
    context.close()
    assert trouble == []
