"""Every adapter tensor must get a gradient from the batch."""

from __future__ import annotations

from typing import Any

from graftkit.checks.facts import Facts
from graftkit.checks.live import adapter_parameters, evaluating, loss_of, probing
from graftkit.checks.rule import Observation, Rule, failed, held, unknown
from graftkit.findings import Severity


def _check(facts: Facts) -> Observation:
    import torch

    assert facts.model is not None
    assert facts.batch is not None
    parameters = {n: p for n, p in adapter_parameters(facts.model).items() if p.requires_grad}
    if not parameters:
        return unknown("no adapter tensor is trainable", help="load the adapter with is_trainable=True")
    # Eval mode: dropout must not zero a path by chance. The probe lifts the zero half of a fresh adapter,
    # behind which the other half would rightly get no gradient.
    with evaluating(facts.model), probing(facts.model), torch.enable_grad():
        loss = loss_of(facts.model, facts.batch)
        loss.backward()  # type: ignore[no-untyped-call]
        dead = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
        wild = [n for n, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    figures: dict[str, Any] = {
        "tensors": len(parameters),
        "dead": len(dead),
        "not_finite": len(wild),
        "loss": loss.item(),
    }
    if wild:
        return failed(f"{len(wild)} of {len(parameters)} gradients are not finite", where=wild[0], **figures)
    if dead:
        message = f"{len(dead)} of {len(parameters)} adapter tensors get no gradient"
        return failed(message, where=_places(dead), **figures)
    return held(f"all {len(parameters)} adapter tensors get a gradient", **figures)


def _places(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix("base_model.model.") for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


RULE = Rule(
    code="GK203",
    title="every adapter tensor gets a gradient",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    why="a tensor without a gradient is saved as it began: that part of the adapter never trains",
    example=(
        "A plan adapts the vision tower and the batches are text only; or re-entrant checkpointing cuts "
        "the graph at a tower whose inputs need no gradient."
    ),
    help=("feed that tower in the batch or leave it out of the scope; use non-re-entrant checkpointing"),
    safety=("Feeding the tower or leaving it out is safe. Non-re-entrant checkpointing computes the same loss."),
    since="0.1.0",
    sources=("https://github.com/huggingface/trl/issues/4612", "https://github.com/unslothai/unsloth/issues/5039"),
)
