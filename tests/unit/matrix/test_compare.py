"""Two stores: what is new, what broke, what got well."""

from __future__ import annotations

from tests.unit.matrix.cells import cell, proof

from graftkit.matrix.cell import Check, Verdict
from graftkit.matrix.compare import compare

OLD = [
    *proof("stays"),
    *proof("breaks"),
    *proof("heals", Check.GRADIENTS),
    *proof("still", Check.MERGE),
    *proof("other", Check.MERGE),
    *proof("leaves"),
]
NEW = [
    *proof("stays"),
    *proof("breaks", Check.RELOAD),
    *proof("heals"),
    *proof("still", Check.MERGE),
    *proof("other", Check.TWIN),
    *proof("comes", Check.PLAN),
]


def test_every_family_is_in_the_group_that_it_belongs_to() -> None:
    changes = compare(OLD, NEW, known=["stays", "breaks", "heals", "still", "other", "comes"])
    groups = {
        name: [change.model_type for change in getattr(changes, name)]
        for name in ("new", "broke", "got_well", "other")
    }
    assert groups == {"new": ["comes"], "broke": ["breaks"], "got_well": ["heals"], "other": ["other"]}
    assert changes.gone == ("leaves",)


def test_a_family_that_was_not_tried_again_is_not_gone_while_transformers_knows_it() -> None:
    assert compare(proof("a"), [], known=["a"]).gone == ()


def test_a_proof_of_which_a_part_was_not_tried_is_no_proof() -> None:
    changes = compare(proof("a"), proof("a")[:3])
    assert [change.model_type for change in changes.broke] == ["a"]


def test_checks_outside_the_proof_are_compared_cell_by_cell() -> None:
    before = [cell(check=Check.CACHE), cell(check=Check.PACKING)]
    after = [cell(check=Check.CACHE, verdict=Verdict.FAILED), cell(check=Check.PACKING)]
    assert [new.check for _, new in compare(before, after).cells] == [Check.CACHE]


def test_versions_that_differ_are_named() -> None:
    newer = proof("a", versions={"graftkit": "1", "transformers": "5.1"})
    assert compare(proof("a"), newer).versions == {"transformers": ("5.0", "5.1")}
