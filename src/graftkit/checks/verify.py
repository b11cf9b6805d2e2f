"""The contract checks on a live adapted model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.facts import Facts
from graftkit.checks.live import adapted_layers, leaving_no_trace
from graftkit.checks.rule import Rule
from graftkit.checks.rules import rules_of
from graftkit.checks.runner import run
from graftkit.errors import VerifyError
from graftkit.findings import Report

if TYPE_CHECKING:
    from peft import PeftModel


def verify(
    model: PeftModel,
    batch: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[Rule], None] | None = None,
) -> Report:
    """Prove on this model, with this batch, what an adapter owes.

    A fresh adapter leaves the model unchanged; every adapter tensor gets a gradient; merged equals adapted;
    the saved adapter reloads in stock PEFT and computes the same; unmerging restores the base. The model is
    left exactly as it was found: weights, adapter, gradients, what is trainable, modes and random state.

    Args:
        model: from ``attach`` or ``get_peft_model``, trained or not.
        batch: keyword arguments of the model's forward, tensors of shape (batch, …). None: an example batch
            of every modality the model takes.
        progress: called with each rule before it runs.

    Returns:
        One finding a rule; "unknown" where a rule could not be decided.

    Raises:
        VerifyError: the model carries no adapter, or one that is merged or disabled.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise VerifyError(
            f"nothing to verify: {type(model).__name__} carries no adapter",
            why="verify looks at a PeftModel",
            help="model = gk.attach(model, plan), or PeftModel.from_pretrained(model, directory)",
            code="no-adapter",
        )
    _check_state(model)
    if batch is None:
        from graftkit.twins.batch import example_batch

        batch = example_batch(model.get_base_model())
    with leaving_no_trace(model):
        return run(rules_of("contract"), Facts(model=model, batch=batch), progress=progress)


def _check_state(model: PeftModel) -> None:
    """Refuse a model whose adapter is not at work: every comparison would be of something else."""
    layers = adapted_layers(model).values()
    states = (
        ("merged", "model.unmerge_adapter(), then verify", any(layer.merged for layer in layers)),
        ("disabled", "enable the adapter layers, then verify", any(layer.disable_adapters for layer in layers)),
    )
    for state, advice, holds in states:
        if holds:
            raise VerifyError(
                f"the adapter is {state}",
                why="what the adapter does could not be told from what the base does",
                help=advice,
                code=f"adapter-{state}",
            )
