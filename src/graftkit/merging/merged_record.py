"""What a merged checkpoint says of itself: the record of its adapter, for the model that was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftkit.adapters.record import AdapterRecord, Expected, ExpectedPrompt, MergedRecord, read_record
from graftkit.errors import AdapterError

# Factors on an adapter's update for which a record has the answers.
_KNOWN_WEIGHTS = {1.0: "adapter", 0.5: "half", 2.0: "double"}


def merged_record(adapters: Sequence[tuple[Path, float]]) -> AdapterRecord | None:
    """Return the record of a checkpoint that these adapters were merged into; None where none of them has one.

    What it should answer is known where one adapter was merged, with a weight of 1, 0.5 or 2.

    Args:
        adapters: folder and weight of each.
    """
    merged = MergedRecord(weights=tuple(weight for _, weight in adapters))
    found = [_read(folder) for folder, _ in adapters]
    if not any(found):
        return None
    if len(found) > 1 or found[0] is None:
        return AdapterRecord(merged=merged, unknown={"expected": "several adapters were merged"})
    return _of_one(found[0], adapters[0][1], merged)


def _of_one(record: AdapterRecord, weight: float, merged: MergedRecord) -> AdapterRecord:
    expected = None if record.expected is None else _expected(record.expected, weight)
    unknown = dict(record.unknown)
    if expected is None and record.expected is not None:
        unknown["expected"] = f"the adapter was merged with the weight {weight:g}"
    changes = {"dialect": None, "merged": merged, "expected": expected, "unknown": unknown}
    return record.model_copy(update=changes)


def _expected(expected: Expected, weight: float) -> Expected | None:
    """Return the answers with the adapter's update times a weight; None where they are not in the record."""
    name = _KNOWN_WEIGHTS.get(weight)
    if name is None or not all(getattr(prompt, name) for prompt in expected.prompts):
        return None
    if name == "adapter":
        return expected
    prompts = tuple(_with_answers(prompt, name) for prompt in expected.prompts)
    return expected.model_copy(update={"prompts": prompts})


def _with_answers(prompt: ExpectedPrompt, name: str) -> ExpectedPrompt:
    return prompt.model_copy(update={"adapter": getattr(prompt, name), "half": (), "double": ()})


def _read(folder: Path) -> AdapterRecord | None:
    try:
        return read_record(folder)
    except AdapterError as error:
        # The adapter's weights are as good without it.
        return AdapterRecord(unknown={"expected": f"{error.what}: {error.why}"})
