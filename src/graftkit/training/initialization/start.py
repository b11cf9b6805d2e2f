"""The values a run starts from: computed from its data before the first step, or restored from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import adapted_as_planned
from graftkit.attaching.initial_values.compute import as_plain, compute_initial_values
from graftkit.attaching.initial_values.corda import corda_preprocessing
from graftkit.attaching.initial_values.restore import restore_moved_base, restore_ranks
from graftkit.errors import TrainingError
from graftkit.planning.cost import memory_of
from graftkit.planning.decisions import LeftAlone
from graftkit.planning.initializers import Initializer, initializer_of
from graftkit.planning.plan import Plan
from graftkit.recipes.initializer import check_initializer, recipe_initializer
from graftkit.recipes.recipe import Recipe
from graftkit.training.distributed.sharding import Sharding, sharding_of
from graftkit.training.guard.sample_batch import real_batches
from graftkit.training.initialization.kept import INITIAL_NAME, InitialValues
from graftkit.training.model import LoadedBase

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from transformers import PreTrainedModel

# Rows of the data that the values are computed from. CorDA's authors take 256 samples, LoRA-GA's 32 and more; EVA
# goes over them until its components converge.
_ROWS = 128


def check_start(recipe: Recipe, args: Any, checkpoint: Path | None) -> None:
    """Check, before anything is loaded, that the run can start from its recipe's initializer.

    Args:
        args: the trainer's, made in this process.
        checkpoint: to resume from.

    Raises:
        RecipeError: ``initializer``.
        TrainingError: ``initializer``: the processes of this run shard the base; ``cannot-resume``: the checkpoint
            lacks the values that the run began with.
        MissingDependencyError: what PEFT needs for it is not installed.
    """
    check_initializer(recipe)
    row = recipe_initializer(recipe)
    if row is None or not _starts_later(row):
        return
    if row.name == "corda":
        corda_preprocessing()
    sharding = sharding_of(args)
    if sharding is not Sharding.NONE:
        raise TrainingError(
            f"{row.name} needs the whole base in every process",
            why=f"this run is under {sharding}",
            help="leave init_lora_weights out, or train in one process or with DDP: graft train RECIPE --launch N",
            code="initializer",
        )
    if checkpoint is not None and row.needs_conversion and not (checkpoint / INITIAL_NAME).is_file():
        raise TrainingError(
            "the checkpoint lacks the adapter's initial values",
            where=str(checkpoint / INITIAL_NAME),
            why=f"{row.name} took them out of the base weights, and without them the base cannot be made again",
            help="start without --resume",
            code="cannot-resume",
        )


def config_to_attach(config: PeftConfig) -> PeftConfig:
    """Return the configuration for the trainer to attach: plain LoRA where the values come later."""
    row = _row(config)
    return as_plain(config) if row is not None and _starts_later(row) else config


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        plan: of what is adapted, None for a configuration that was not planned.
        moved: the initial values that were taken out of the base weights, or None.
    """

    plan: Plan | None
    moved: InitialValues | None = None


def start_from_initializer(trainer: Any, base: LoadedBase, checkpoint: Path | None) -> Start:
    """Give the trainer's adapter, attached as plain LoRA, the values of its initializer.

    The trainer's data and all random states are left as they were.

    Raises:
        AttachError: as ``graftkit.initialize``.
    """
    row = _row(base.peft_config)
    if row is None or not _starts_later(row):
        return Start(base.plan)
    config: Any = base.peft_config
    if checkpoint is None:
        _compute(trainer, config, base.processor, row)
    else:
        _restore(trainer, config, checkpoint, row)
    plan = base.plan and _as_adapted(base.plan, trainer.model)
    if not row.needs_conversion:
        return Start(plan)
    moved = InitialValues.of(trainer.model)
    trainer.add_callback(moved)
    return Start(plan, moved)


def _compute(trainer: Any, config: LoraConfig, processor: Any, row: Initializer) -> None:
    import torch

    args = trainer.args
    batches = []
    with torch.random.fork_rng():
        # The same in every process.
        torch.manual_seed(args.seed)
        if row.needs_data:
            loader = trainer.get_train_dataloader()
            rows = args.per_device_train_batch_size
            batches = real_batches(loader, trainer.model, processor, rows=rows, most=max(_ROWS, rows))
        with _recomputing(trainer.model.get_base_model(), args):
            compute_initial_values(trainer.model, config, batches)


@contextmanager
def _recomputing(base: PreTrainedModel, args: Any) -> Iterator[None]:
    """Recompute activations in the block if the run does: LoRA-GA's backward pass needs the memory of a step."""
    if not (args.activation_checkpointing and base.supports_gradient_checkpointing):
        yield
        return
    base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        base.activation_checkpointing_disable()


def _restore(trainer: Any, config: LoraConfig, checkpoint: Path, row: Initializer) -> None:
    from safetensors.torch import load_file

    if row.needs_conversion:
        restore_moved_base(trainer.model, config, load_file(checkpoint / INITIAL_NAME))
    else:
        restore_ranks(trainer.model, config, load_file(checkpoint / "adapter_model.safetensors"))


def _as_adapted(plan: Plan, model: Any) -> Plan:
    """Return the plan with what is adapted in the end: EVA may leave layers without a rank."""
    found = adapted_as_planned(model, plan)
    attached = tuple(a for a in plan.attached if a.path in found)
    left = (LeftAlone.NO_RANK.skip(a.site) for a in plan.attached if a.path not in found)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return replace(
        plan,
        peft_config=copy.deepcopy(model.peft_config["default"]),
        attached=attached,
        skipped=(*plan.skipped, *left),
        trainable_params=trainable,
        memory=memory_of(plan.memory.base_weights, trainable),
    )


def _row(config: PeftConfig) -> Initializer | None:
    return initializer_of(getattr(config, "init_lora_weights", None))


def _starts_later(row: Initializer) -> bool:
    """Check whether the values come after the trainer has attached the adapter."""
    return row.needs_data or row.needs_conversion
