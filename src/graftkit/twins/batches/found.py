"""Recipes that were found on this machine: an architecture is searched once, not in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import OutputError
from graftkit.files import write_text
from graftkit.twins.batches.recipe import Recipe
from graftkit.twins.source_hash import source_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cached_recipe(model_class: type[PreTrainedModel]) -> Recipe | None:
    """Return the recipe that an earlier search found for a class, from the same sources, or None."""
    try:
        recipe = json.loads(_place(model_class).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recipe if _is_recipe(recipe) else None


def cache_recipe(model_class: type[PreTrainedModel], recipe: Recipe) -> None:
    """Keep a recipe for later processes; where the cache cannot be written, they search again."""
    try:
        write_text(_place(model_class), json.dumps(recipe, indent=1))
    except (OSError, OutputError):
        return


def _place(model_class: type[PreTrainedModel]) -> Path:
    import transformers
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path(
        "graftkit", namespace="recipes", subfolder=f"transformers-{transformers.__version__}"
    )
    return Path(folder) / f"{model_class.__name__}-{source_hash(model_class)}.json"


def _is_recipe(value: Any) -> bool:
    groups = value.values() if isinstance(value, Mapping) else [None]
    return all(isinstance(g, Mapping) and all(isinstance(e, str) for e in g.values()) for g in groups)
