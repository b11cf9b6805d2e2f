"""The files must be ones that can be loaded without running or trusting what is in them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from graftkit.adapters.file import PICKLES, WEIGHTS_NAME
from graftkit.checks.facts import Facts
from graftkit.checks.rule import Observation, Rule, failed, held
from graftkit.checks.saved import LONGEST_NAME, some
from graftkit.findings import Severity


def _check(facts: Facts) -> Observation:
    assert facts.folder is not None
    if facts.refusal is not None:
        seen = facts.refusal
        why = f": {seen.why}" if seen.why else ""
        return failed(f"{seen.what}{why}", where=seen.where, help=seen.help, refusal=seen.code)
    assert facts.adapter is not None
    strange = [name for name in facts.adapter.tensors if _is_strange(name)]
    if strange:
        return failed(f"{len(strange)} tensors have names that no module has: {some(strange)}", names=len(strange))
    twice = _twice(facts.adapter.weights_path)
    if twice:
        return failed(
            f"the header names {len(twice)} tensors twice: {some(twice)}", where=twice[0], twice=len(twice)
        )
    pickles = [name for name in PICKLES if (facts.folder / name).is_file()]
    if pickles:
        message = f"there is a pickle of weights beside {WEIGHTS_NAME}: {some(pickles)}"
        return Observation(Severity.WARNING, message, pickles[0], "delete it: loading it can run code")
    return held("safetensors with a sound header, and no pickle of weights beside it")


def _is_strange(name: str) -> bool:
    tricks = not name.isprintable() or not name or any(mark in name for mark in ("/", "\\", "..", " "))
    return tricks or len(name) > LONGEST_NAME


def _twice(weights: Path) -> list[str]:
    """Keys that the header holds more than once: readers disagree about which one counts."""
    if not weights.is_file():
        return []
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        counted = Counter(name for name, _ in items)
        repeated.extend(name for name, times in counted.items() if times > 1)
        return dict(items)

    with weights.open("rb") as file:
        # The length was checked when the header was read.
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=pairs)
    return repeated


RULE = Rule(
    code="GK505",
    title="the adapter's files are well-formed and safe to load",
    severity=Severity.ERROR,
    needs=("folder",),
    check=_check,
    why="a pickle runs code when it is loaded, and a malformed header makes readers see different tensors",
    example=(
        "A download stops half-way: the header describes more data than the file has. Or the folder holds "
        "`adapter_model.bin`, a pickle, and nothing else."
    ),
    help="fetch the files again from a source you trust, as safetensors",
    safety="graftkit never loads a pickle. Converting one means loading it: do that in a sandbox.",
    since="0.1.0",
    sources=(
        "https://huggingface.co/docs/safetensors/index#format",
        "https://docs.python.org/3/library/pickle.html",
    ),
)
