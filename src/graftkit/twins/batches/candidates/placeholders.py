"""The tokens of a text that stand for another modality's features."""

from __future__ import annotations

from collections.abc import Iterable

from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import PLACEHOLDERS

MARKS = "image_embeds_position_mask"
_QUERIES = ("latent_query_num", "num_query_tokens", "num_queries")


def with_placeholders(
    facts: ModelFacts, groups: list[dict[str, str]], fields: Iterable[str]
) -> list[dict[str, str]]:
    """Return the groups with as many placeholders as there are features, where the model takes text."""
    token = next((f for f in facts.fields(fields) if isinstance(facts.value(f), int)), None)
    if facts.takes("input_ids", MARKS):
        # No token stands for features: a mask says which positions they take.
        soft = f"[0] * {facts.count(_QUERIES, 4)}"
    elif token is None or not facts.takes("input_ids"):
        return groups
    else:
        soft = f"[{token}] * features"
    return [{**group, PLACEHOLDERS: soft} for group in groups]
