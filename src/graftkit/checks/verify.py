"""``verify()``: rules on a live adapted model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.probes.live_adapter import adapted_layers, restoring_state, sits_in_layers
from graftkit.checks.rules import all_rules, rules_of
from graftkit.errors import VerifyError
from graftkit.findings import Report
from graftkit.planning.config.build import config_dict
from graftkit.planning.plan import Plan
from graftkit.progress import Progress
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training
from graftkit.surveying.checkpoint.comparison import Checkpoint
from graftkit.surveying.checkpoint.local_weights import local_checkpoint
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import LoadedConfig
from graftkit.surveying.sources.quiet import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel


def verify(
    model: PeftModel,
    batch: Mapping[str, Any] | None = None,
    *,
    plan: Plan | None = None,
    training: Training | None = None,
    processor: Any | None = None,
    checkpoint: str | Path | None = None,
    settings: CheckSettings | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Check on this model and batch that the adapter works.

    A fresh adapter leaves the model unchanged; every adapter tensor gets a gradient; merged equals adapted;
    the saved adapter reloads in stock PEFT and computes the same; unmerging restores the base. The model is
    left unchanged: weights, adapter, gradients, trainable parameters, modes and random state.

    Args:
        model: from ``attach`` or ``get_peft_model``, trained or not.
        batch: keyword arguments of the model's forward, tensors of shape (batch, …). None: an example batch
            of every modality the model takes.
        plan: the plan that was attached; with it, rules on the configuration run too.
        training: the settings of the training. Without them, what is wrong only under some settings (packing,
            re-entrant checkpointing) is an info.
        processor: the tokenizer or processor, whose chat template decides what is learned.
        checkpoint: the folder that the base was loaded from.
        settings: which rules, with which limits.
        on_progress: called before each rule.

    Returns:
        One finding for each rule that needs no more than was given.

    Raises:
        VerifyError: the model carries no adapter in its layers, or one that is merged or disabled.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise VerifyError(
            f"nothing to verify: {type(model).__name__} carries no adapter",
            why="verify looks at a PeftModel",
            help="model = gk.attach(model, plan), or PeftModel.from_pretrained(model, directory)",
            code="no-adapter",
        )
    if not sits_in_layers(model):
        raise VerifyError(
            "nothing to verify: the adapter is in none of the model's layers",
            why=f"{model.active_peft_config.peft_type.value} keeps its tensors beside them",
            code="no-layers",
        )
    _check_state(model)
    if batch is None:
        from graftkit.twins.example_batch import example_batch

        batch = example_batch(model.get_base_model())
    with restoring_state(model), quiet_transformers():
        given = Inputs(
            plan=plan,
            base=plan.model if plan is not None else None,
            base_files=None if checkpoint is None else _base_files(model, checkpoint),
            peft_config=config_dict(plan.peft_config if plan is not None else model.active_peft_config),
            training=training,
            processor=processor,
            checkpoint=Path(checkpoint) if checkpoint is not None else None,
            model=model,
            batch=batch,
        )
        context = CheckContext(given, settings or CheckSettings())
        return run(decidable(all_rules(), given.names), context, on_progress=on_progress)


def _base_files(model: PeftModel, folder: str | Path) -> Checkpoint | None:
    """Compare the folder that the base was loaded from with the base's class."""
    from transformers import PreTrainedModel

    base: Any = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return None
    loaded = LoadedConfig(base.config, "directory", str(folder))
    return local_checkpoint(loaded, build_on_meta(base.config, type(base)))


def contract() -> CheckSettings:
    """Return settings that select the contract: the rules that do not depend on the training."""
    return CheckSettings(select=tuple(rule.code for rule in rules_of("contract")))


def _check_state(model: PeftModel) -> None:
    """Refuse a model whose adapter is merged or disabled, since rules compare with and without it."""
    layers = adapted_layers(model).values()
    states = (
        ("merged", "model.unmerge_adapter(), then verify", any(layer.merged for layer in layers)),
        ("disabled", "enable the adapter layers, then verify", any(layer.disable_adapters for layer in layers)),
    )
    for state, advice, holds in states:
        if holds:
            raise VerifyError(
                f"the adapter is {state}",
                why="the model with and without the adapter cannot be compared",
                help=advice,
                code=f"adapter-{state}",
            )
