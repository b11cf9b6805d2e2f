"""The rules that a run can decide before its first step, and what they read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import Rule
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.probes.live_adapter import restoring_state
from graftkit.checks.rules import all_rules
from graftkit.env import environment
from graftkit.errors import GraftError
from graftkit.findings import Report
from graftkit.modeling.autocast import without_autocast
from graftkit.modeling.sharding import is_sharded
from graftkit.planning.config.build import config_dict
from graftkit.planning.plan import Plan
from graftkit.recipes.row_options import RowOptions
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.trainers import TrainerName
from graftkit.recipes.training import Training, keeps_reference
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.sources.local import local_folder
from graftkit.surveying.survey import survey
from graftkit.surveying.towers.declared import MODALITY_OF_INPUT
from graftkit.text import describe
from graftkit.training.guard.sample_batch import real_batch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

_log = logging.getLogger(__name__)

SUPPLIED = (
    "environment",
    "config",
    "base",
    "peft_config",
    "plan",
    "training",
    "rows",
    "processor",
    "checkpoint",
    "model",
    "batch",
)
# These copy the model, merge into it or load it again, which takes minutes and a second model's memory on a large
# one. They do not depend on the data, and `verify` runs them, on the model or on its twin.
LEFT_TO_VERIFY = frozenset({"GK115", "GK508", "GK601", "GK607"})
_MAX_ROWS = 8


def rules_before_training() -> tuple[Rule, ...]:
    """Return the rules that a run can decide before its first step without a second model."""
    return tuple(rule for rule in decidable(all_rules(), SUPPLIED) if rule.code not in LEFT_TO_VERIFY)


def run_preflight(
    model: PeftModel,
    args: TrainingArguments,
    *,
    plan: Plan | None,
    settings: CheckSettings,
    processor: Any,
    loader: Any,
    rows: Any = None,
) -> Report:
    """Run the rules on the model that is to be trained; leave it and all random states as they were.

    If the model's parameters are sharded over processes, what needs a forward pass stays unknown.

    Args:
        loader: the trainer's data loader.
        rows: the data as it was before the trainer tokenized it; None for what the loader has.
    """
    inputs = _inputs_without_forward(model, args, plan, processor)
    data = getattr(loader, "dataset", None) if rows is None else rows
    inputs = replace(inputs, rows=None if data is None else lambda: data)
    if not can_run_alone(model):
        return run(rules_before_training(), CheckContext(inputs, settings))
    with restoring_state(model), without_autocast(model):
        batch = _batch(model, args, loader, processor)
        training = replace(_training(model, args), modalities=_modalities(batch))
        inputs = replace(inputs, model=model, batch=batch, training=training)
        return run(rules_before_training(), CheckContext(inputs, settings))


def can_run_alone(model: PeftModel) -> bool:
    """Check whether one process can run the model forward and backward while the others wait.

    Not with sharded parameters, and not under DeepSpeed: its hooks on the gradients wait for every process. DDP's
    do nothing before the forward pass of its wrapper.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if is_sharded(model):
        return False
    collective = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    return not AcceleratorState._shared_state or AcceleratorState().distributed_type not in collective


def _inputs_without_forward(
    model: PeftModel, args: TrainingArguments, plan: Plan | None, processor: Any
) -> Inputs:
    return Inputs(
        environment=environment()["packages"],
        config=model.config.to_dict() if hasattr(model.config, "to_dict") else None,
        base=_model_map(model, plan),
        peft_config=config_dict(model.peft_config[model.active_adapters[0]]),
        plan=plan,
        training=_training(model, args),
        processor=processor,
        checkpoint=local_folder(str(getattr(model.config, "name_or_path", "") or "")),
    )


def _model_map(model: PeftModel, plan: Plan | None) -> ModelMap | None:
    """Return the map of the live base, or the plan's if the base is sharded."""
    if is_sharded(model):
        return plan.model if plan is not None else None
    try:
        return survey(model)
    except GraftError as error:
        _log.warning("the model cannot be surveyed: %s", error.what)
        return None


def _training(model: PeftModel, args: Any) -> Training:
    """Return the trainer's settings; the rules ask the live model how activations are recomputed."""
    classes = {kind.__name__ for kind in type(args).__mro__}
    # Set both by the argument `deepspeed` and by accelerate's own configuration.
    deepspeed = getattr(args, "deepspeed_plugin", None)
    trainer = next((name for name in TrainerName if name.config_class in classes), TrainerName.SFT)
    return Training(
        trainer=trainer,
        checkpointing=recomputes(args),
        packing=bool(getattr(args, "packing", False) or getattr(args, "padding_free", False)),
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        zero_stage=0 if deepspeed is None else deepspeed.zero_stage,
        quantization=_quantization(model),
        assistant_only=bool(getattr(args, "assistant_only_loss", False)),
        find_unused=args.ddp_find_unused_parameters,
        rows=row_options(args),
        keeps_reference=keeps_reference(trainer, getattr(args, "beta", None)),
    )


def recomputes(args: Any) -> bool:
    """Return whether activations are checkpointed; other frameworks bring a transformers with the older name."""
    newer = getattr(args, "activation_checkpointing", None)
    return bool(args.gradient_checkpointing if newer is None else newer)


def row_options(args: Any) -> RowOptions:
    """Return how the trainer made sequences of its rows; one without a ``max_length`` was given sequences."""
    return RowOptions.of({"max_length": None, **vars(args)})


def _quantization(model: PeftModel) -> str | None:
    """Return how bitsandbytes quantized the base, as a recipe writes it, or None."""
    base: Any = model.get_base_model()
    flags = {"4bit": "is_loaded_in_4bit", "8bit": "is_loaded_in_8bit"}
    return next((bits for bits, flag in flags.items() if getattr(base, flag, False)), None)


def _batch(model: PeftModel, args: TrainingArguments, loader: Any, processor: Any) -> dict[str, Any] | None:
    rows = min(args.per_device_train_batch_size, _MAX_ROWS)
    try:
        return real_batch(loader, model, processor, rows=rows)
    except Exception as error:  # the user's collator and data may raise anything
        _log.warning("no batch for the checks could be made: %s", describe(error))
        return None


def _modalities(batch: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    if batch is None:
        return None
    found = {modality for name, modality in MODALITY_OF_INPUT.items() if name in batch}
    return ("text", *sorted(found - {"text"}))
