"""The file of cells: nothing that was added is lost, the last line on a cell counts, a broken line is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.matrix.cells import cell

from graftkit.errors import GraftError
from graftkit.matrix.cell import Cell, Check, Verdict
from graftkit.matrix.store import Store

FIGURES = st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text() | st.none()
CELLS = st.builds(
    cell,
    model_type=st.sampled_from(["llama", "gemma4"]),
    check=st.sampled_from(Check),
    verdict=st.sampled_from(Verdict),
    message=st.text(),
    evidence=st.dictionaries(st.text(), FIGURES, max_size=3),
    seconds=st.floats(0, 1e6),
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(CELLS, max_size=4), max_size=5), data=st.data())
def test_what_was_added_is_there_and_the_last_one_counts(
    batches: list[list[Cell]], data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "matrix.jsonl"
    path.unlink(missing_ok=True)
    for batch in batches:
        Store(path).add(batch)  # a new store for each: what counts is on the disk
        if data.draw(st.booleans()):
            Store(path).compact()
    expected = {added.key: added for batch in batches for added in batch}
    assert {found.key: found for found in Store(path).cells} == expected


def test_cells_are_sorted_by_family_method_and_the_order_of_checks(tmp_path: Path) -> None:
    store = Store(tmp_path / "matrix.jsonl")
    store.add([cell("vit", Check.TWIN), cell("bert", Check.MERGE), cell("bert", Check.PLAN, method="dora")])
    store.add([cell("bert", Check.PLAN)])
    assert [(c.model_type, c.method, c.check) for c in store.cells] == [
        ("bert", "dora", Check.PLAN),
        ("bert", "lora", Check.PLAN),
        ("bert", "lora", Check.MERGE),
        ("vit", "lora", Check.TWIN),
    ]


def test_a_half_written_last_line_is_no_cell_and_the_next_one_replaces_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "matrix.jsonl")
    store.add([cell(check=Check.TWIN)])
    whole = store.path.read_text()
    store.path.write_text(whole + whole[: len(whole) // 2])
    again = Store(store.path)
    assert [found.check for found in again.cells] == [Check.TWIN]
    again.add([cell(check=Check.PLAN)])
    assert [found.check for found in Store(store.path).cells] == [Check.TWIN, Check.PLAN]


@pytest.mark.parametrize(
    "broken", ["{", "[]", "{}", '{"schema_version": 2}', None], ids=["json", "list", "empty", "schema", "verdict"]
)
def test_a_broken_line_is_an_error_that_names_it(tmp_path: Path, broken: str | None) -> None:
    good = json.dumps(cell().to_dict())
    line = good.replace('"proven"', '"fine"') if broken is None else broken
    path = tmp_path / "matrix.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(GraftError) as error:
        Store(path)
    assert (error.value.code, error.value.where) == ("matrix-store", f"{path}:2")


def test_a_packed_store_is_the_same_and_takes_no_cells(tmp_path: Path) -> None:
    store = Store(tmp_path / "matrix.jsonl")
    store.add([cell(check=check) for check in Check])
    packed = [tmp_path / "one.jsonl.gz", tmp_path / "two.jsonl.gz"]
    for path in packed:
        store.pack(path)
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert gzip.decompress(packed[0].read_bytes()) == store.path.read_bytes()
    assert Store(packed[0]).cells == store.cells
    with pytest.raises(GraftError) as error:
        Store(packed[0]).add([cell()])
    assert error.value.code == "matrix-store"


def test_figures_that_json_lacks_are_refused_rather_than_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "matrix.jsonl")
    with pytest.raises(ValueError):
        store.add([cell(evidence={"difference": float("nan")})])
    assert not store.path.exists()
