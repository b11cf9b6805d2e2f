"""The tokens of a text that stand for another modality's features."""

from __future__ import annotations

from collections.abc import Iterable

from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import PLACEHOLDERS


def with_placeholders(
    facts: ModelFacts, groups: list[dict[str, str]], fields: Iterable[str]
) -> list[dict[str, str]]:
    """Return the groups with as many placeholders as there are features, where the model takes text."""
    token = next((f for f in facts.fields(fields) if isinstance(facts.value(f), int)), None)
    if token is None or not facts.takes("input_ids"):
        return groups
    return [{**group, PLACEHOLDERS: f"[{token}] * features"} for group in groups]
