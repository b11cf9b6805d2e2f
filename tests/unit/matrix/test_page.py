"""The page is made from the matrix's file alone, and a family's outcome is the worst of its proof."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.matrix.introduced import Introduced
from graftkit.matrix.page import KEY, families_of, main, outcome_of, page
from graftkit.matrix.store import Store

VERDICTS = st.sampled_from(Verdict)


def cell(check: Check, verdict: Verdict = Verdict.PROVEN, model_type: str = "llama", method: str = "lora") -> Cell:
    return Cell(model_type, "LlamaForCausalLM", ("text",), method, check, verdict, "It held.")


@given(st.dictionaries(st.sampled_from(Check), VERDICTS))
def test_a_family_is_proven_only_where_all_of_its_proof_is(found: dict[Check, Verdict]) -> None:
    outcome = outcome_of(cell(check, verdict) for check, verdict in found.items())
    assert (outcome is Verdict.PROVEN) == all(found.get(check) is Verdict.PROVEN for check in PROOF)
    assert outcome is not Verdict.PROVEN or len(found) >= len(PROOF)


@given(st.dictionaries(st.sampled_from(Check), VERDICTS))
def test_a_failure_is_never_hidden(found: dict[Check, Verdict]) -> None:
    outcome = outcome_of(cell(check, verdict) for check, verdict in found.items())
    failed = any(found.get(check) is Verdict.FAILED for check in PROOF)
    assert (outcome is Verdict.FAILED) == failed


def test_every_verdict_and_check_has_a_meaning() -> None:
    assert set(KEY.verdicts) == set(Verdict)
    assert list(KEY.checks) == list(Check)
    assert KEY.best is Verdict.PROVEN


def test_cells_become_families_methods_and_releases() -> None:
    cells = [
        cell(Check.TWIN),
        cell(Check.TWIN, method="oft"),
        cell(Check.PLAN, Verdict.FAILED),
        cell(Check.TWIN, model_type="Bert"),
    ]
    first, later = Version("4.57.1"), Version("5.0.0")
    table = Introduced({first: date(2025, 10, 14), later: date(2026, 1, 26)}, {"Bert": first, "llama": later})
    bert, llama = families_of(cells, table)
    # What the table's first release knew may be older.
    assert (bert.model_type, bert.introduced) == ("Bert", None)
    assert (llama.model_type, llama.introduced) == ("llama", "5.0.0")
    assert {run.method: [c.check for c in run.cells] for run in llama.runs} == {
        "lora": [Check.TWIN, Check.PLAN],
        "oft": [Check.TWIN],
    }
    assert [run.outcome for run in llama.runs] == [Verdict.FAILED, Verdict.UNKNOWN]
    assert llama.runs[0].cells[0].command == cells[0].command


def test_a_stale_page_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, target = Store(tmp_path / "matrix.jsonl"), tmp_path / "matrix.html"
    arguments = [str(store.path), str(target)]
    store.add([cell(check) for check in PROOF])
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    store.add([cell(Check.MERGE, Verdict.FAILED)])
    assert main([*arguments, "--check"]) == 1
    assert "matrix.html" in capsys.readouterr().err


def test_codes_are_links_only_where_their_pages_are(tmp_path: Path) -> None:
    cells = [cell(Check.TWIN)]
    assert "README.md" not in page(cells, tmp_path / "matrix.html")
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "README.md").touch()
    assert 'href="./rules/README.md"' in page(cells, tmp_path / "matrix.html")
