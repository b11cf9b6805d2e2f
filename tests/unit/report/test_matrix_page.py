"""The page of the matrix holds every cell it is given, counts them, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.report.matrix_page import MatrixCell, MatrixFamily, MatrixKey, MatrixRun, data_of, render_matrix

KEY = MatrixKey(
    verdicts={
        "proven": "It held.",
        "failed": "It did not.",
        "unknown": "Undecided.",
        "not-applicable": "Nothing.",
    },
    checks={"twin": "Is one built?", "merge": "Does it merge?", "packing": "Is it packed?"},
    proof=("twin", "merge"),
    uncounted=("not-applicable",),
    released={"5.20.0": "2026-08-01"},
)
VERSIONS = {"peft": "0.21.2", "torch": "2.13.0"}


def cell(check: str, verdict: str = "proven", **given_fields: Any) -> MatrixCell:
    given_fields.setdefault("command", f"graft matrix --families llama --checks {check}")
    return MatrixCell(check, verdict, versions=VERSIONS, **given_fields)


def family(name: str, *runs: MatrixRun, modalities: tuple[str, ...] = ("text",)) -> MatrixFamily:
    return MatrixFamily(name, "LlamaForCausalLM", modalities, runs)


LLAMA = family(
    "llama",
    MatrixRun("lora", "proven", (cell("twin"), cell("merge", seconds=1.25), cell("packing", "not-applicable"))),
    MatrixRun("oft", "failed", (cell("twin"), cell("merge", "failed", codes=("GK601",), evidence={"by": 0.25}))),
)
VIT = family("vit", MatrixRun("lora", "unknown", (cell("twin", "unknown"),)), modalities=("image",))


def embedded(page: str) -> dict[str, Any]:
    return data_of(page)[1]


def page_of(*families: MatrixFamily) -> str:
    return render_matrix(families, KEY, "Generated.")


def test_every_cell_is_in_the_data() -> None:
    data = embedded(page_of(LLAMA, VIT))
    names, checks = data["verdicts"], [check for check, _ in data["checks"]]
    found = {
        (model_type, data["methods"][run[0]], check): names[int(digit)]
        for model_type, _, _, _, runs in data["families"]
        for run in runs
        for check, digit in zip(checks, run[2], strict=True)
        if digit != "."
    }
    assert found == {
        (each.model_type, run.method, c.check): c.verdict
        for each in (LLAMA, VIT)
        for run in each.runs
        for c in run.cells
    }


def test_what_a_cell_says_is_in_the_data() -> None:
    data = embedded(page_of(LLAMA))
    [_, _, _, _, runs] = data["families"][0]
    extras = runs[1][5]
    assert [data["codes"][code] for code in extras["codes"]["1"]] == ["GK601"]
    names, *values = extras["figures"]["1"]
    assert (data["figures"][names], values) == (["by"], [0.25])
    assert data["versions"] == [VERSIONS]
    assert runs[0][3][1] == 1.2
    assert data["commands"] == ["graft matrix --families {family} --checks {check}"]


def test_totals_leave_out_what_does_not_count() -> None:
    page = page_of(LLAMA, VIT)
    counts = dict(re.findall(r'class="name">([^<]+)</span>.*?class="count">([^<]+)<', page))
    assert counts["twin"] == "1/2"
    assert counts["packing"] == "0/0"
    assert counts["text"] == "1/1"
    assert counts["oft"] == "0/1"


def test_no_text_can_leave_its_place() -> None:
    evil = '</script><img src="x" onerror="alert(1)"><!--'
    run = MatrixRun(evil, "failed", (cell("twin", "failed", message=evil, codes=(evil,), evidence={evil: evil}),))
    page = page_of(MatrixFamily(evil, evil, (evil,), (run,)))
    assert evil not in page
    assert "<img" not in page
    assert embedded(page)["messages"] == [evil]


def test_the_page_may_run_its_own_script_and_loads_nothing() -> None:
    page = page_of(LLAMA)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|<img|@import|url\(", page)


def test_how_the_data_is_packed_makes_no_difference() -> None:
    page = page_of(LLAMA)
    rest, data = data_of(page)
    packed = base64.b64encode(zlib.compress(json.dumps(data).encode(), 1)).decode()
    other = re.sub(r'(id="data">)[^<]*', lambda found: found.group(1) + packed, page)
    assert other != page
    assert data_of(other) == (rest, data)


def test_the_same_cells_make_the_same_page() -> None:
    assert page_of(LLAMA, VIT) == page_of(LLAMA, VIT)
    assert page_of(LLAMA, VIT) != page_of(LLAMA, replace(VIT, introduced="5.20.0"))


def test_a_matrix_without_families_has_no_page() -> None:
    with pytest.raises(ValueError, match="families"):
        page_of()


def test_what_the_key_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="splendid"):
        page_of(family("llama", MatrixRun("lora", "proven", (cell("twin", "splendid"),))))
    with pytest.raises(ValueError, match=r"5\.21\.0"):
        page_of(replace(VIT, introduced="5.21.0"))


FIGURES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), FIGURES, max_size=3))
def test_any_figure_can_be_shown(evidence: dict[str, Any]) -> None:
    run = MatrixRun("lora", "proven", (cell("twin", evidence=evidence),))
    extras = embedded(page_of(family("llama", run)))["families"][0][4][0][5]
    if not evidence:
        assert "figures" not in extras
        return
    shown = extras["figures"]["0"][1:]
    assert all(isinstance(value, int | float | str) for value in shown)
    for value, figure in zip(evidence.values(), shown, strict=True):
        if isinstance(value, float) and math.isfinite(value):
            assert figure == pytest.approx(value, rel=1e-2)
