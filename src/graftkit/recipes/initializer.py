"""The initializer that a recipe asks for, and whether its run can start from it."""

from __future__ import annotations

from typing import Any

from graftkit.errors import RecipeError
from graftkit.planning.initializers import Initializer, initializer_of
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.trainers import TrainerName
from graftkit.recipes.training import keeps_reference

_WITHOUT = "leave init_lora_weights out"


def recipe_initializer(recipe: Recipe) -> Initializer | None:
    """Return the row of the initializer that the recipe names, or None."""
    return initializer_of(_adapter_option(recipe, "init_lora_weights"))


def check_initializer(recipe: Recipe) -> None:
    """Check that a run can start from the recipe's initializer, and end with an adapter of use.

    Raises:
        RecipeError: ``initializer``.
    """
    row = recipe_initializer(recipe)
    if row is None:
        return
    trainer, args = recipe.fields.trainer, recipe.args
    if row.moves_base and keeps_reference(trainer, args.get("beta")):
        raise _refused(
            recipe,
            f"{trainer} cannot start from {row.name}",
            "its reference is the base with the adapter switched off, and the initializer moves that base",
            f"{_WITHOUT}, or use one that leaves the base as it is",
        )
    if row.needs_data and row.moves_base and trainer != TrainerName.SFT:
        raise _refused(
            recipe,
            f"{trainer} cannot start from {row.name}",
            "it is computed from whole samples with labels, and before the first step there are only prompts",
            f"{_WITHOUT}, or use eva, which reads the prompts",
        )
    if row.needs_data or row.needs_conversion:
        _check_processes(recipe, row)
    if row.needs_conversion:
        _check_convertible(recipe, row)
    if row.needs_data and row.moves_base and recipe.fields.quantization is not None:
        raise _refused(
            recipe,
            f"{row.name} does not work on a quantized base",
            "it moves part of the base weights into the adapter, and needs them in full precision",
            f"{_WITHOUT}, or leave quantization out",
        )
    if args.get("push_to_hub") and row.needs_conversion:
        raise _refused(
            recipe,
            f"push_to_hub would upload what {row.name} has trained before it is converted to plain LoRA",
            "the trainer uploads its own files while it trains",
            "leave push_to_hub out, and upload the output folder after the run",
        )


def _check_processes(recipe: Recipe, row: Initializer) -> None:
    loading = recipe.args.get("model_init_kwargs") or {}
    sharded = {
        "args.deepspeed": recipe.args.get("deepspeed"),
        "args.fsdp": recipe.args.get("fsdp"),
        "args.model_init_kwargs.distributed_config": loading.get("distributed_config"),
    }
    key = next((key for key, value in sharded.items() if value), None)
    if key is not None:
        raise _refused(
            recipe,
            f"{row.name} needs the whole base in every process",
            f"{key} shards it",
            f"{_WITHOUT}, or train in one process or with DDP: graft train RECIPE --launch N without {key}",
        )


def _check_convertible(recipe: Recipe, row: Initializer) -> None:
    if recipe.fields.adapter.method == "dora" or _adapter_option(recipe, "use_dora"):
        raise _refused(
            recipe,
            f"{row.name} with DoRA cannot be saved as an adapter of the original base",
            "DoRA normalizes the sum of base and adapter, so its update cannot be taken apart again",
            f"{_WITHOUT}, or use method: lora",
        )


def _adapter_option(recipe: Recipe, name: str) -> Any:
    section = recipe.fields.adapter
    return (section.options if section.peft_config is None else section.peft_config).get(name)


def initializer_key(recipe: Recipe) -> tuple[str, ...]:
    """Return the key of the recipe that names its initializer."""
    return (
        "adapter",
        "options" if recipe.fields.adapter.peft_config is None else "peft_config",
        "init_lora_weights",
    )


def _refused(recipe: Recipe, what: str, why: str, help: str) -> RecipeError:
    where = recipe.document.where(initializer_key(recipe))
    return RecipeError(what, where=where, why=why, help=help, code="initializer")
