"""The effect of a recipe's arguments, as TRL and transformers read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit.env import Machine, asked_by_environment
from graftkit.errors import RecipeError
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.row_options import RowOptions
from graftkit.recipes.trainers import TrainerName


@dataclass(frozen=True)
class Training:
    """The settings that checks of training depend on.

    Attributes:
        trainer: "sft", "dpo" or "grpo".
        checkpointing: whether activations are recomputed in the backward pass.
        reentrant: with the re-entrant implementation.
        reentrant_because: what decides that: "args", "zero3" (TRL forces it) or "default".
        reentrant_key: the recipe's key that decides it.
        packing: whether several samples share one row, padding-free batches included.
        precision: "bf16", "fp16" or "fp32": the dtype of the forward pass under autocast.
        batch_size: samples per device and batch.
        accumulation: batches per step.
        zero_stage: DeepSpeed's, 0 without it.
        quantization: "4bit", "8bit" or None.
        modalities: of the batches, or None for all that the model takes.
        assistant_only: whether the template's generation marks decide which tokens the loss is on.
        find_unused: DDP's ``find_unused_parameters``, or None for its default.
        rows: how rows become sequences.
        keeps_reference: whether the loss compares with the base, which is the model with its adapter switched off.
    """

    trainer: str = "sft"
    checkpointing: bool = True
    reentrant: bool = False
    reentrant_because: str = "default"
    reentrant_key: str = "args.gradient_checkpointing_kwargs.use_reentrant"
    packing: bool = False
    precision: str = "bf16"
    batch_size: int = 8
    accumulation: int = 1
    zero_stage: int = 0
    quantization: str | None = None
    modalities: tuple[str, ...] | None = None
    assistant_only: bool = False
    find_unused: bool | None = None
    rows: RowOptions = field(default_factory=RowOptions)
    keeps_reference: bool = False


def training_of(recipe: Recipe) -> Training:
    """Read a recipe's arguments with TRL's defaults.

    Sources: ``trl.trainer.base_config`` (checkpointing and bf16 are on), ``trl.trainer.sft_trainer`` (ZeRO-3 with
    PEFT forces re-entrant checkpointing), ``transformers.TrainingArguments``.
    """
    args = recipe.args
    zero = zero_stage(args.get("deepspeed"), recipe.path.parent)
    checkpointing = bool(checkpointing_argument(args, "checkpointing", True)[0])
    reentrant, because, key = _reentrant(args, zero)
    modalities = recipe.fields.data.modalities
    return Training(
        trainer=recipe.fields.trainer,
        checkpointing=checkpointing,
        reentrant=checkpointing and reentrant,
        reentrant_because=because,
        reentrant_key=f"args.{key}.use_reentrant",
        packing=bool(args.get("packing") or args.get("padding_free")),
        precision=precision_of(args),
        batch_size=_positive(args.get("per_device_train_batch_size"), 8),
        accumulation=_positive(args.get("gradient_accumulation_steps"), 1),
        zero_stage=zero,
        quantization=recipe.fields.quantization,
        modalities=tuple(modalities) if modalities else None,
        assistant_only=bool(args.get("assistant_only_loss", False)),
        find_unused=args.get("ddp_find_unused_parameters"),
        rows=RowOptions.of(args),
        keeps_reference=keeps_reference(recipe.fields.trainer, args.get("beta")),
    )


def keeps_reference(trainer: TrainerName, beta: Any) -> bool:
    """Check whether a trainer's loss compares with the base.

    Args:
        beta: the weight of that comparison, or None for TRL's default: 0.1 for DPO, 0 for GRPO.
    """
    return trainer == TrainerName.DPO or (trainer == TrainerName.GRPO and bool(beta))


def checkpointing_argument(args: Mapping[str, Any], suffix: str, default: Any) -> tuple[Any, str]:
    """Return an argument of checkpointing, which transformers renamed, and the name that wins.

    Source: ``transformers.TrainingArguments.__post_init__``: the old name counts where the new one is not set.
    """
    names = [f"{prefix}_{suffix}" for prefix in ("activation", "gradient")]
    name = next((name for name in names if args.get(name) is not None), names[0])
    return (default if args.get(name) is None else args[name]), name


def _reentrant(args: Mapping[str, Any], zero: int) -> tuple[bool, str, str]:
    """Return whether checkpointing is re-entrant, what decides that, and the argument with its options.

    Without options transformers takes the non-re-entrant kind; with options that leave it open torch takes the
    re-entrant one. Under ZeRO-3 TRL forces that one by changing the options it was given; given none, it sets the
    old name of that argument, which transformers no longer reads.
    """
    options, name = checkpointing_argument(args, "checkpointing_kwargs", None)
    if not isinstance(options, Mapping) or not options:
        return False, "default", name
    if zero == 3:
        return True, "zero3", name
    return bool(options.get("use_reentrant", True)), "args", name


def precision_of(args: Mapping[str, Any]) -> str:
    """Return the precision of the forward pass under TRL, whose default is bf16."""
    if args.get("fp16"):
        return "fp16"
    return "fp32" if args.get("bf16") is False else "bf16"


def uses_cpu(args: Mapping[str, Any], machine: Machine) -> bool:
    """Check whether a run with these arguments trains on the CPU.

    Without an accelerator that is graftkit's default, except under DeepSpeed, which accelerate uses on a CPU only
    without ``use_cpu`` (``accelerate.state.AcceleratorState``).
    """
    if args.get("use_cpu") is not None:
        return bool(args["use_cpu"])
    deepspeed = args.get("deepspeed") or asked_by_environment("ACCELERATE_USE_DEEPSPEED")
    return machine.accelerator is None and not deepspeed


def _positive(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default


def zero_stage(given: Any, folder: Path) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration, a mapping or the path of a JSON file; 0 for none.

    Raises:
        RecipeError: ``recipe-invalid``: the file cannot be read.
    """
    if isinstance(given, str):
        given = _deepspeed(folder / given)
    options = given.get("zero_optimization") if isinstance(given, Mapping) else None
    stage = options.get("stage") if isinstance(options, Mapping) else None
    return stage if type(stage) is int else 0


def _deepspeed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            "the DeepSpeed configuration cannot be read", where=str(file), why=str(error), code="recipe-invalid"
        ) from error
