"""What is known of a run before its first step, and the rules that can then decide."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import Rule
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.probes.forward import leaving_no_trace
from graftkit.checks.rules import all_rules
from graftkit.env import environment
from graftkit.errors import GraftError
from graftkit.findings import Report
from graftkit.modeling.sharding import is_sharded
from graftkit.planning.plan import Plan, config_dict
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training
from graftkit.surveying.quantized import quantization_of
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.sources import hub
from graftkit.surveying.survey import survey
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
    "processor",
    "checkpoint",
    "model",
    "batch",
)
# These copy the model, merge into it or load it again: minutes and a second model's memory on a large one. They
# do not depend on the data, and `verify` runs them, on the model or on its twin.
LEFT_TO_VERIFY = frozenset({"GK115", "GK508", "GK601", "GK607"})
# More rows than this show the rules nothing more.
_MOST_ROWS = 8
_TRAINERS = ("sft", "dpo", "grpo")
_MODALITIES = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}


def rules_before_training() -> tuple[Rule, ...]:
    """The rules that a run can decide before its first step, but for those that need a second model."""
    return tuple(rule for rule in decidable(all_rules(), SUPPLIED) if rule.code not in LEFT_TO_VERIFY)


def looked_at(
    model: PeftModel,
    args: TrainingArguments,
    *,
    plan: Plan | None,
    settings: CheckSettings,
    processor: Any,
    loader: Any,
) -> Report:
    """Run these rules on the model that is about to be trained and leave it, and all random states, as they were.

    Where the model's parameters are shared out over processes, what needs its forward pass stays unknown.
    """
    given = _static(model, args, plan, processor)
    if not runs_alone(model):
        return run(rules_before_training(), CheckContext(given, settings))
    with leaving_no_trace(model), own_precision(model):
        batch = _batch(model, args, loader, processor)
        training = replace(_training(model, args), modalities=_modalities(batch))
        given = replace(given, model=model, batch=batch, training=training)
        return run(rules_before_training(), CheckContext(given, settings))


def runs_alone(model: PeftModel) -> bool:
    """Whether one process can run the model forward and backward while the others wait.

    Not where its parameters are in parts, and not under DeepSpeed at all: its hooks on the gradients wait for
    every process. Under DDP they are silent until the wrapper's own forward pass.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if is_sharded(model):
        return False
    together = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    return not AcceleratorState._shared_state or AcceleratorState().distributed_type not in together


def _static(model: PeftModel, args: TrainingArguments, plan: Plan | None, processor: Any) -> Inputs:
    return Inputs(
        environment=environment()["packages"],
        config=model.config.to_dict() if hasattr(model.config, "to_dict") else None,
        base=_map(model, plan),
        peft_config=config_dict(model.peft_config[model.active_adapters[0]]),
        plan=plan,
        training=_training(model, args),
        processor=processor,
        checkpoint=_folder(model),
    )


def _map(model: PeftModel, plan: Plan | None) -> ModelMap | None:
    """Of the live base; where that is in parts, the plan's."""
    if is_sharded(model):
        return plan.model if plan is not None else None
    try:
        return survey(model)
    except GraftError as error:
        _log.warning("the model cannot be surveyed: %s", error.what)
        return None


def _folder(model: PeftModel) -> Path | None:
    """The folder with the base's weights, where it lies on this machine."""
    return hub.local_folder(str(getattr(model.config, "name_or_path", "") or ""))


def _training(model: PeftModel, args: Any) -> Training:
    """The settings as the trainer took them. How activations are recomputed, the live model says itself."""
    kinds = [kind.__name__.lower().removesuffix("config") for kind in type(args).__mro__]
    # Set both by the argument `deepspeed` and by accelerate's own configuration.
    deepspeed = getattr(args, "deepspeed_plugin", None)
    return Training(
        trainer=next((kind for kind in kinds if kind in _TRAINERS), "sft"),
        checkpointing=bool(args.activation_checkpointing),
        packing=bool(getattr(args, "packing", False) or getattr(args, "padding_free", False)),
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        zero_stage=0 if deepspeed is None else deepspeed.zero_stage,
        quantization=_bits(model),
        assistant_only=bool(getattr(args, "assistant_only_loss", False)),
        find_unused=args.ddp_find_unused_parameters,
    )


def _bits(model: PeftModel) -> str | None:
    """How bitsandbytes packed the base, in a recipe's words."""
    base: Any = model.get_base_model()
    flags = {"4bit": "is_loaded_in_4bit", "8bit": "is_loaded_in_8bit"}
    return next((bits for bits, flag in flags.items() if getattr(base, flag, False)), None)


def _batch(model: PeftModel, args: TrainingArguments, loader: Any, processor: Any) -> dict[str, Any] | None:
    rows = min(args.per_device_train_batch_size, _MOST_ROWS)
    try:
        return real_batch(loader, model, processor, rows=rows)
    except Exception as error:  # the user's collator and data raise what they like
        _log.warning("no batch for the checks could be made: %s: %s", type(error).__name__, error)
        return None


def _modalities(batch: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    if batch is None:
        return None
    return ("text", *sorted({kind for name, kind in _MODALITIES.items() if name in batch}))


@contextmanager
def own_precision(model: PeftModel) -> Iterator[None]:
    """Without the autocast that accelerate puts around a forward pass, where every weight is float32.

    The rules take their tolerance from the weights, and autocast rounds to half precision behind their back.
    Source: ``accelerate.Accelerator.prepare_model`` keeps the forward that it replaces.
    """
    import torch

    own = vars(model).get("_original_forward")
    packed = any(quantization_of(module) for module in model.modules())
    coarse = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    if own is None or coarse or packed:
        yield
        return
    patched = vars(model).pop("forward")
    vars(model)["forward"] = own
    try:
        yield
    finally:
        vars(model)["forward"] = patched
