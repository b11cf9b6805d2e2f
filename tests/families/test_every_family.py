"""Every model type that transformers knows is proven, or in the table of gaps with its cause.

The proof is ``prove`` of ``graftkit.matrix``: a twin, a plan for every linear and every expert, attachment of
exactly that, and the contract checks (gradients, identity, merge, reload, unmerge). A usual run has those that
people ask for and a tenth of the others (turns.py); ``make test-families`` has all.
"""

from __future__ import annotations

import pytest
from tests.families.gaps import TABLE, found_gap, read_gaps
from tests.families.turns import in_turns
from transformers import CONFIG_MAPPING

from graftkit.matrix.cell import PROOF
from graftkit.matrix.prove import prove
from graftkit.matrix.wanted import wanted

GAPS = read_gaps(TABLE.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings(
    "ignore"
)  # 500 architectures warn about 500 things; what is asserted here is the outcome
@pytest.mark.parametrize("model_type", in_turns(CONFIG_MAPPING, always=wanted()))
def test_what_happens_is_what_the_table_says(model_type: str) -> None:
    cells = prove(model_type, checks=PROOF)
    found, expected = found_gap(cells), GAPS.get(model_type)
    said = "\n".join(f"{cell.check} {cell.verdict}: {cell.message}" for cell in cells)
    if expected is None or found is None:
        assert found is expected, said
    else:
        assert expected.fits(found), f"{found}\n{expected}\n{said}"
