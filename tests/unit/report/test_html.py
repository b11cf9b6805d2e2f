from __future__ import annotations

import copy
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from graftkit.errors import OutputError
from graftkit.report import chart
from graftkit.report.chart import draw_curves
from graftkit.report.histogram import HistogramPlot, draw_histogram
from graftkit.report.html import render_report, write_report
from graftkit.report.tower_grid import draw_towers

FULL: dict[str, Any] = {
    "title": "A report",
    "subtitle": "What it is about",
    "summary": ["First.", "Second."],
    "figures_title": "Held-out accuracy",
    "figures": [
        {"label": "language only", "value": "81.4 %", "share": 0.814, "baseline": 0.1, "note": "30 weights"},
        {"label": "language + vision", "value": "94.7 %", "share": 0.947},
    ],
    "figures_note": "360 digits",
    "quote": {"title": "Stock PEFT", "text": "ValueError: <no> & such", "command": "run", "explanation": "Why."},
    "towers": [
        {
            "name": "language",
            "caption": "reads and writes",
            "sites": [
                {"path": "model.layers.0.q_proj", "state": "adapted", "params": 300},
                {"path": "model.layers.1.q_proj", "state": "possible", "params": 100, "reason": "not asked for"},
                {"path": "model.norm", "state": "impossible", "params": 0, "reason": "a norm"},
            ],
        },
        {
            "name": "vision",
            "sites": [{"path": "vision.layers.0.q_proj.linear", "state": "adapted", "params": 50}],
        },
    ],
    "charts": [
        {
            "title": "Training loss",
            "unit": "loss",
            "curves": [
                {"label": "language only", "points": [(5, 2.3), (200, 0.4)]},
                {"label": "both", "points": [(5, 2.2), (200, 0.1)]},
            ],
        }
    ],
    "histograms": [
        {
            "title": "Length of the rows",
            "unit": "tokens",
            "width": 50,
            "counts": [3, 0, 2],
            "limit": 120,
            "limit_label": "max_length 120",
            "note": "5 rows",
        }
    ],
    "samples": [
        {
            "pixels": [[0, 255], [17, 0]],
            "expected": "3",
            "answers": [{"run": "language", "text": "8"}, {"run": "both", "text": "3"}],
        }
    ],
    "checks": [
        {"code": "GK201", "title": "attached", "verdict": "ok", "evidence": "44 of 44"},
        {"code": "GK202", "title": "merged", "verdict": "failed", "evidence": "off by 0.4"},
        {"code": "GK203", "title": "served", "verdict": "unknown", "evidence": "no vllm"},
    ],
    "files": [{"path": "out/adapter.safetensors", "size": 364512, "note": "weights"}, {"path": "out/page.html"}],
    "versions": {"torch": "2.13.0"},
    "command": "graft demo --out out",
}

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_section_is_shown() -> None:
    page = Page(render_report(FULL))
    for words in ("81.4 %", "94.7 %", "ValueError: <no> & such", "GK202", "off by 0.4", "365 kB", "2.13.0"):
        assert words in page.text
    assert {a["id"] for a in page.all("h2")} == {a["aria-labelledby"] for a in page.all("section")}
    assert len(page.all("section")) == 10


def sections(data: Any) -> set[str | None]:
    return {section["aria-labelledby"] for section in Page(render_report(data)).all("section")}


def test_title_alone_is_a_page() -> None:
    page = Page(render_report({"title": "Only this"}))
    assert page.all("section") == []
    assert "Only this" in page.text


SECTIONS = {
    **{key: key for key in ("summary", "figures", "quote", "samples", "checks", "files")},
    "towers": "model",
    "charts": "chart-1",
    "histograms": "histogram-1",
}


@pytest.mark.parametrize(("key", "section"), SECTIONS.items(), ids=SECTIONS)
def test_missing_data_leaves_its_section_out(key: str, section: str) -> None:
    without = {name: value for name, value in FULL.items() if name != key}
    every = sections(FULL)
    assert section in every
    assert sections(without) == sections(without | {key: []}) == every - {section}


def test_nothing_is_loaded_from_outside() -> None:
    text = render_report(FULL)
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_accessible_structure() -> None:
    page = Page(render_report(FULL))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("header")) == 1
    assert page.all("svg")
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg.get("aria-label")
    assert {cell["scope"] for cell in page.all("th")} == {"col"}


def test_everything_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            # "vision" and the states are a closed set of words
            return {k: v if k in {"state", "verdict"} else poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return evil if isinstance(value, str) else value

    page = Page(render_report(poison(copy.deepcopy(FULL))))
    assert page.all("script") == []


def test_tower_picture_has_a_row_a_kind_and_a_column_a_layer() -> None:
    ((vision,), (language,)) = draw_towers(FULL["towers"])
    first, second, norm = language.cells
    assert (vision.name, language.name) == ("vision", "language")
    assert first.y == second.y < norm.y
    assert first.x == norm.x < second.x
    assert [label for _, label in language.rows] == ["q_proj", "norm"]
    assert language.counts == {"adapted": 1, "possible": 1, "impossible": 1}
    assert language.shares == {"adapted": 75.0, "possible": 25.0, "impossible": 0.0}
    assert language.reasons == (("a norm", 1), ("not asked for", 1))


def test_many_layers_get_every_fifth_number() -> None:
    sites = [{"path": f"m.layers.{i}.q", "state": "adapted", "params": 1} for i in range(35)]
    ((block,),) = draw_towers([{"name": "language", "sites": sites}])
    assert [label for _, label in block.columns] == ["0", "5", "10", "15", "20", "25", "30"]


@pytest.mark.parametrize(
    ("maximum", "expected"),
    [
        (200, (0, 50, 100, 150, 200)),
        (2.31, (0, 0.5, 1, 1.5, 2, 2.5)),
        (4.6, (0, 1, 2, 3, 4, 5)),
        (7, (0, 2, 4, 6, 8)),
    ],
    ids=str,
)
def test_ticks_are_round_and_reach_the_maximum(maximum: float, expected: tuple[float, ...]) -> None:
    ticks = chart.ticks(0.0, maximum)
    assert ticks[-1] >= maximum
    assert ticks == pytest.approx(expected)


def test_a_curve_of_zeros_can_be_drawn() -> None:
    assert draw_curves([{"label": "flat", "points": [(0, 0.0)]}]).lines[0].last == "0.00"


def test_curves_below_zero_stay_inside_the_axes() -> None:
    picture = draw_curves([{"label": "margin", "points": [(0, -2.0), (10, 3.0)]}])
    heights = [float(n) for n in re.findall(r"[\d.]+", picture.lines[0].path)[1::2]]
    assert len(heights) == 2
    assert all(picture.top <= y <= picture.bottom for y in heights)
    assert "0" in {label for _, label in picture.y_ticks}


def test_curves_stay_inside_the_axes_and_skip_what_is_no_number() -> None:
    picture = draw_curves([{"label": "a", "points": [(1, 5.0), (2, float("nan")), (3, 0.1)]}])
    numbers = [float(n) for n in re.findall(r"[\d.]+", picture.lines[0].path)]
    assert len(numbers) == 4
    assert all(picture.left <= x <= picture.right for x in numbers[::2])
    assert all(picture.top <= y <= picture.bottom for y in numbers[1::2])


def histogram(counts: list[int], limit: int | None) -> HistogramPlot:
    return draw_histogram({**FULL["histograms"][0], "counts": counts, "limit": limit})


def test_bars_are_as_high_as_their_counts_and_stop_at_the_axes() -> None:
    plot = histogram([3, 0, 2], 120)
    assert [bar.label for bar in plot.bars] == ["0 to 49 tokens: 3", "100 to 149 tokens: 2"]
    high, low = plot.bars
    assert high.height / low.height == pytest.approx(1.5, abs=0.01)
    assert all(plot.top <= bar.y and bar.y + bar.height == pytest.approx(plot.bottom) for bar in plot.bars)
    assert low.x + low.width <= plot.right
    assert plot.limit is not None
    assert low.x < plot.limit < low.x + low.width
    assert plot.limit == pytest.approx(low.x + low.width * 20 / 50, abs=0.2)


def test_a_limit_far_beyond_the_bars_is_not_drawn() -> None:
    assert histogram([3], 1024).limit is None
    assert histogram([3], None).limit is None
    assert "limit" not in {
        line.get("class") for line in Page(render_report({**FULL, "histograms": []})).all("line")
    }
    assert "limit" in {line.get("class") for line in Page(render_report(FULL)).all("line")}


BAD = {
    "empty-histogram": ({"histograms": [{**FULL["histograms"][0], "counts": []}]}, "Length of the rows"),
    "state": ({"towers": [{"name": "x", "sites": [{"path": "p", "state": "odd", "params": 1}]}]}, "odd"),
    "verdict": ({"checks": [{"code": "C", "title": "t", "verdict": "fine", "evidence": ""}]}, "fine"),
    "empty-curve": (
        {"charts": [{"title": "t", "unit": "u", "curves": [{"label": "flat", "points": []}]}]},
        "flat",
    ),
}


@pytest.mark.parametrize(("part", "word"), BAD.values(), ids=BAD)
def test_words_outside_the_closed_sets_are_refused(part: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        render_report({"title": "t", **part})


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    assert write_report(target, FULL) == target
    first = target.read_text(encoding="utf-8")
    write_report(str(target), {"title": "Another"})
    assert "Another" in target.read_text(encoding="utf-8") != first
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "report.html").mkdir()
    return tmp_path / "report.html"


def _under_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "report.html"


def _read_only_file(tmp_path: Path) -> Path:
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "report.html").chmod(0o444)
    return tmp_path / "report.html"


def _in_read_only_folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir(mode=0o555)
    return tmp_path / "folder" / "report.html"


PLACES = {
    "a-folder": _folder,
    "under-a-file": _under_a_file,
    "read-only-file": _read_only_file,
    "read-only-folder": _in_read_only_folder,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_place_that_cannot_be_written_is_an_output_error(place: Any, tmp_path: Path) -> None:
    target = place(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as caught:
        write_report(target, FULL)
    assert caught.value.code == "output-not-writable"
    assert caught.value.where == str(target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_failure_halfway_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(target, FULL)
    with pytest.raises(KeyError):
        write_report(
            target, {"title": "t", "charts": [{"title": "c", "unit": "u", "curves": [{"label": "no points"}]}]}
        )
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
