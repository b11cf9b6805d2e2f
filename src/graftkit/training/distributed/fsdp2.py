"""A base that transformers shards as it is loaded (FSDP2): what that requires, and what it excludes.

``args: {model_init_kwargs: {distributed_config: {fsdp_size: N}}}`` needs neither accelerate's FSDP nor an
accelerator. The adapter is attached to the shards; every process has its full tensors, and the trainer keeps them
equal (``transformers.Trainer._sync_replicated_trainable_parameters``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.errors import TrainingError
from graftkit.planning.initializers import initializer_of
from graftkit.recipes.problems import suggest_key

if TYPE_CHECKING:
    from peft import PeftConfig

    from graftkit.recipes.recipe import Recipe
    from graftkit.training.model import LoadedBase

_WHERE = "args.model_init_kwargs.distributed_config"


def check_sharding(recipe: Recipe, args: Any, resume: bool) -> None:
    """Check, before anything is loaded, a recipe that shards its base.

    Args:
        args: the trainer's, made in this process.
        resume: whether to continue from a checkpoint.

    Raises:
        TrainingError: ``sharding``.
    """
    asked = (recipe.args.get("model_init_kwargs") or {}).get("distributed_config")
    if not isinstance(asked, Mapping):
        return
    _check_keys(asked)
    _check_processes(asked, args.world_size)
    if recipe.fields.quantization is not None:
        raise _refused(
            "a quantized base cannot be sharded",
            "transformers shards the packed weights, and loses what is needed to unpack them",
            "leave quantization out, or train with DDP: graft train RECIPE --launch N without distributed_config",
        )
    if resume or (args.save_strategy != "no" and not args.save_only_model):
        raise _refused(
            "a run with a sharded base cannot be resumed",
            "transformers does not save the optimizer's state of such a run (transformers.Trainer.__init__)",
            "start without --resume" if resume else "args: {save_only_model: true} saves the adapter alone",
        )


def check_attachable(base: LoadedBase) -> None:
    """Check that PEFT can attach the adapter to a base that may be sharded.

    Raises:
        TrainingError: ``sharding``.
    """
    wanted = [name for name, needs in _needs_full_weights(base.peft_config).items() if needs]
    if wanted and getattr(base.model, "is_distributed_loading_by_transformers", False):
        raise _refused(
            f"{', '.join(wanted)} cannot be used on a sharded base",
            "PEFT reads or copies full weights for it, of which each process has a shard",
            "use LoRA without it, or train with DDP: graft train RECIPE --launch N without distributed_config",
        )


def _needs_full_weights(config: PeftConfig) -> dict[str, bool]:
    init = getattr(config, "init_lora_weights", True)
    row = initializer_of(init)
    return {
        "DoRA": bool(getattr(config, "use_dora", False)),
        f"init_lora_weights: {init}": row is not None and not row.only_draws,
        "modules_to_save": bool(getattr(config, "modules_to_save", None)),
        "trainable_token_indices": bool(getattr(config, "trainable_token_indices", None)),
        "ln_tuning": config.peft_type == "LN_TUNING",
    }


def _check_keys(asked: Mapping[str, Any]) -> None:
    """Check the keys: transformers ignores unknown ones, and does not shard the base."""
    from transformers.distributed import DistributedConfig

    known = [field.name for field in dataclasses.fields(DistributedConfig)]
    unknown = next((key for key in asked if key not in known), None)
    if unknown is not None:
        raise _refused(f"unknown key {unknown!r}", "transformers would ignore it", suggest_key(unknown, known))


def _check_processes(asked: Mapping[str, Any], count: int) -> None:
    from transformers.distributed import DistributedConfig

    try:
        config = DistributedConfig.from_dict(dict(asked))
    except (TypeError, ValueError, OSError) as error:
        raise _refused("transformers refuses these values", str(error), "fsdp_size: 2 is two processes") from error
    needed = config.dp_size * config.tp_size * config.pp_size
    if needed != count:
        raise _refused(
            f"these sizes are for {needed} processes, and this run has {count}",
            "each process holds one shard",
            f"graft train RECIPE --launch {needed}",
        )


def _refused(what: str, why: str, help: str) -> TrainingError:
    return TrainingError(what, where=_WHERE, why=why, help=help, code="sharding")
