"""The table of model types that are not proven, each with the cause that somebody found.

``python -m tests.families.gaps STORE`` compares it with a matrix's file: types that are proven are taken out, and
those that are not, or not in that way, are put in without a cause. A test fails until each has one.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from graftkit.files import write_text
from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.matrix.store import Store

TABLE = Path(__file__).with_name("gaps.toml")
_HEAD = """\
# Model types that do not pass the proof of tests/families, each with its cause. A test compares this table with
# what happens; `python -m tests.families.gaps docs/matrix.jsonl.gz` takes out what is proven and puts in what is
# not, but no cause: that is for a person to find. `check` is the first that is not proven, `codes` are those of
# all that are not. Codes under `sometimes` depend on rounding: a rank or a length that is decided by a hair.
"""
# Section -> what its types have in common.
SECTIONS: Mapping[str, str] = {
    "alone": "Parts of other models that no auto class of transformers maps: nobody loads them alone.",
    "unbuildable": "No model is built from the default configuration: the proof has nothing to begin with.",
    "studied": "Everything else: a model is built, and something about it does not hold.",
}


@dataclass(frozen=True)
class Gap:
    """Why a model type is not proven.

    Attributes:
        section: one of ``SECTIONS``.
        check: the first that is not proven.
        codes: of all checks that are not, sorted.
        sometimes: codes that are there in some runs and not in others.
    """

    section: str
    check: Check
    codes: tuple[str, ...]
    cause: str = ""
    sometimes: tuple[str, ...] = ()

    def fits(self, found: Gap) -> bool:
        """Check whether this is what was found, but for the codes that are there only sometimes."""
        rare = set(self.sometimes)
        return self.check is found.check and set(self.codes) - rare == set(found.codes) - rare


def found_gap(cells: Iterable[Cell]) -> Gap | None:
    """Return what the cells of a proof came to, or None where every check is proven."""
    of_check = {cell.check: cell for cell in cells}
    missed = [of_check[check] for check in PROOF if of_check[check].verdict is not Verdict.PROVEN]
    if not missed:
        return None
    codes = sorted({code for cell in missed for code in cell.codes})
    return Gap("studied", missed[0].check, tuple(codes))


def read_gaps(text: str) -> dict[str, Gap]:
    """Read the table: model type -> its gap.

    Raises:
        ValueError: a type is there twice.
    """
    found: dict[str, Gap] = {}
    for section in SECTIONS:
        for group in tomllib.loads(text).get(section, ()):
            for model_type in group["types"]:
                if model_type in found:
                    raise ValueError(f"{model_type} has two causes")
                found[model_type] = _read(section, group)
    return found


def _read(section: str, group: Mapping[str, Any]) -> Gap:
    codes, sometimes = tuple(group["codes"]), tuple(group.get("sometimes", ()))
    return Gap(section, Check(group["check"]), codes, group["cause"], sometimes)


def written(gaps: Mapping[str, Gap]) -> str:
    """Return the table as TOML: types with the same cause together."""
    parts = [_HEAD]
    for section, said in SECTIONS.items():
        own = sorted((_key(gap), name) for name, gap in gaps.items() if gap.section == section)
        parts.append(f"# {said}\n")
        for _, group in groupby(own, key=lambda pair: pair[0]):
            names = [name for _, name in group]
            parts.append(_group(gaps[names[0]], names))
    return "\n".join(parts)


def _key(gap: Gap) -> tuple[int, str, tuple[str, ...], tuple[str, ...]]:
    return PROOF.index(gap.check), gap.cause, gap.codes, gap.sometimes


def _group(gap: Gap, names: list[str]) -> str:
    fields: dict[str, Any] = {"check": gap.check, "codes": gap.codes}
    if gap.sometimes:
        fields["sometimes"] = gap.sometimes
    fields["cause"] = gap.cause
    lines = [f"[[{gap.section}]]", *(f"{name} = {_toml(value)}" for name, value in fields.items())]
    return "\n".join([*lines, "types = [", *(f"  {_toml(name)}," for name in names), "]", ""])


def _toml(value: str | tuple[str, ...]) -> str:
    """Return a text, or a list of texts, as TOML has it: as JSON, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def updated(gaps: Mapping[str, Gap], cells: Iterable[Cell]) -> dict[str, Gap]:
    """Return the table as these cells have it; a cause is kept where what was found is what the table says."""
    new = dict(gaps)
    ours = sorted((c for c in cells if c.method == "lora" and c.check in PROOF), key=lambda c: c.model_type)
    for model_type, group in groupby(ours, key=lambda cell: cell.model_type):
        of_type = tuple(group)
        if len(of_type) < len(PROOF):
            continue
        found = found_gap(of_type)
        old = new.pop(model_type, None)
        if found is not None:
            new[model_type] = old if old is not None and old.fits(found) else found
    return new


def main(arguments: list[str]) -> int:
    """Bring the table up to date with a matrix's file, and name the types that lack a cause."""
    new = updated(read_gaps(TABLE.read_text(encoding="utf-8")), Store(arguments[0]).cells)
    write_text(TABLE, written(new))
    for model_type in sorted(name for name, gap in new.items() if not gap.cause):
        print(f"{model_type}: {new[model_type].check} {', '.join(new[model_type].codes)}: no cause is known")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
