"""``graft matrix``: what is tried, what is shown, and the exit status."""

from __future__ import annotations

from pathlib import Path

from tests.cli.running import fields_of, forked, graft, refused
from tests.unit.matrix.cells import cell, proof

from graftkit.matrix.cell import Check, Verdict
from graftkit.matrix.store import Store


def test_a_family_is_tried_once_and_then_known(tmp_path: Path) -> None:
    store = tmp_path / "matrix.jsonl"
    request = ("matrix", "--families", "llama", "--checks", "twin,plan", "--store", store, "--json")
    first, second = forked(*request), forked(*request)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert fields_of(first) == fields_of(second)
    cells = fields_of(first)["cells"]
    assert [(c["model_type"], c["check"], c["verdict"]) for c in cells] == [
        ("llama", "twin", "proven"),
        ("llama", "plan", "proven"),
    ]
    assert cells[1]["command"] == "graft matrix --families llama --methods lora --checks plan"
    assert [found.to_dict() for found in Store(store).cells] == cells


def test_without_families_the_store_is_shown_and_a_failed_cell_is_status_1(tmp_path: Path) -> None:
    store = Store(tmp_path / "matrix.jsonl")
    store.add([*proof("llama"), *proof("bert", Check.MERGE)])
    page = tmp_path / "matrix.html"
    done = graft("matrix", "--store", store.path, "--html", page, "--json")
    assert done.returncode == 1
    fields = fields_of(done)
    assert (fields["families"], fields["methods"][0]["proven"]) == (2, 1)
    assert "bert" in page.read_text(encoding="utf-8")
    assert graft("matrix", "--store", store.path, "--checks", "twin").returncode == 0


def test_two_stores_are_compared(tmp_path: Path) -> None:
    old, new = Store(tmp_path / "old.jsonl"), Store(tmp_path / "new.jsonl")
    old.add(proof("llama"))
    new.add([*proof("llama", Check.RELOAD), cell("bert", verdict=Verdict.REFUSED)])
    fields = fields_of(forked("matrix", "--store", new.path, "--compare", old.path, "--json"))
    assert [change["model_type"] for change in fields["broke"]] == ["llama"]
    assert [change["model_type"] for change in fields["new"]] == ["bert"]


def test_what_cannot_be_tried_is_an_error_with_a_code(tmp_path: Path) -> None:
    store = ("--store", tmp_path / "matrix.jsonl")
    codes = {
        arguments: refused("matrix", *arguments, *store)["code"]
        for arguments in (
            ("--families", "lama"),
            ("--families", "llama", "--methods", "lara"),
            ("--families", "llama", "--checks", "merging"),
            ("--wanted", "--all"),
            ("--new-since", "4.0"),
            (),
        )
    }
    assert list(codes.values()) == [
        "model-type-unknown",
        "method-unknown",
        "check-unknown",
        "usage",
        "release-unknown",
        "matrix-store",
    ]
