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

from graftkit.matrix.cell import PROOF, Check
from graftkit.matrix.prove import prove
from graftkit.matrix.wanted import wanted

GAPS = read_gaps(TABLE.read_text(encoding="utf-8"))
# To see that a class still has no twin takes a search of up to a minute.
WITHOUT_TWIN = {name for name, gap in GAPS.items() if gap.check is Check.TWIN and gap.section != "alone"}


@pytest.mark.filterwarnings(
    "ignore"
)  # 500 architectures warn about 500 things; what is asserted here is the outcome
@pytest.mark.parametrize("model_type", in_turns(CONFIG_MAPPING, always=wanted(), seldom=WITHOUT_TWIN))
def test_what_happens_is_what_the_table_says(model_type: str) -> None:
    cells = prove(model_type, checks=PROOF)
    found, expected = found_gap(cells), GAPS.get(model_type)
    said = "\n".join(f"{cell.check} {cell.verdict}: {cell.message}" for cell in cells)
    if expected is None or found is None:
        assert found is expected, said
    else:
        assert expected.fits(found), f"{found}\n{expected}\n{said}"
