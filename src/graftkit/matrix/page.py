"""From cells to the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from itertools import groupby

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.matrix.introduced import introduced
from graftkit.report.matrix_page import MatrixCell, MatrixFamily, MatrixKey, MatrixRun, render_matrix

_VERDICTS = {
    Verdict.PROVEN: "the check ran and holds",
    Verdict.REFUSED: "graftkit or PEFT refuses clearly: the method cannot do that to this family",
    Verdict.UNKNOWN: "it could not be decided",
    Verdict.FAILED: "something that should hold does not",
    Verdict.NOT_APPLICABLE: "the family has nothing that the check is about",
}
_CHECKS = {
    Check.TWIN: "a tiny model of the architecture can be built, and a batch runs on it",
    Check.PLAN: "the targets make a configuration of PEFT",
    Check.ATTACH: "PEFT attaches exactly what was planned, and the fresh adapter changes nothing",
    Check.GRADIENTS: "every tensor of the adapter gets a gradient",
    Check.MERGE: "merged equals adapted, and unmerging restores the base",
    Check.RELOAD: "the saved adapter loads in stock PEFT and computes the same",
    Check.CHECKPOINTING: "recomputing activations leaves the gradients as they are",
    Check.CACHE: "with the adapter, the next token's logits from the cache are those of a full pass",
    Check.PACKING: "samples packed in one row do not see each other",
    Check.FOUR_BIT: "attach, gradients and reload on a base that bitsandbytes quantized to 4 bits",
}


def page(cells: Iterable[Cell]) -> str:
    """Return the HTML of these cells; every method is offered, LoRA first."""
    listed = sorted(cells, key=lambda cell: (cell.model_type, cell.method))
    families = [
        _family(model_type, tuple(of)) for model_type, of in groupby(listed, key=lambda cell: cell.model_type)
    ]
    key = MatrixKey(
        verdicts={str(verdict): said for verdict, said in _VERDICTS.items()},
        checks={str(check): said for check, said in _CHECKS.items()},
        proof=tuple(map(str, PROOF)),
        uncounted=(str(Verdict.NOT_APPLICABLE),),
        methods=("lora",),
    )
    return render_matrix(families, key, date.today().isoformat())


def _family(model_type: str, cells: tuple[Cell, ...]) -> MatrixFamily:
    runs = tuple(
        MatrixRun(method, str(_outcome(tuple(of))), tuple(map(_cell, of)))
        for method, of in ((name, list(group)) for name, group in groupby(cells, key=lambda cell: cell.method))
    )
    release = introduced().release_of.get(model_type)
    return MatrixFamily(
        model_type, cells[0].model_class, cells[0].modalities, runs, None if release is None else str(release)
    )


def _outcome(cells: tuple[Cell, ...]) -> Verdict:
    """Return the worst verdict of the proof; what was not tried is unknown."""
    found = {cell.check: cell.verdict for cell in cells if cell.check in PROOF}
    verdicts = {found.get(check, Verdict.UNKNOWN) for check in PROOF}
    return next(verdict for verdict in Verdict if verdict in verdicts)


def _cell(cell: Cell) -> MatrixCell:
    return MatrixCell(
        str(cell.check),
        str(cell.verdict),
        cell.command,
        cell.codes,
        cell.message,
        cell.evidence,
        cell.seconds,
        cell.versions,
        cell.seed,
    )
