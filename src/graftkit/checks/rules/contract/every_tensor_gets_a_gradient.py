"""Check that every adapter tensor gets a gradient from the batch.

## Why it matters

A tensor without a gradient keeps its initial values: that part of the adapter is never trained.

## Example

A plan adapts the vision tower and the batches are text only; or re-entrant checkpointing cuts the graph at a
tower whose inputs need no gradient.

## How safe that is

Feeding the tower or leaving it out is safe. Non-re-entrant checkpointing computes the same loss.

## Sources

- https://github.com/huggingface/trl/issues/4612
- https://github.com/unslothai/unsloth/issues/5039
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.checks.probes.checkpointing import InUse, Mode, can_checkpoint, in_use
from graftkit.checks.probes.gradients import Backward
from graftkit.checks.probes.live_adapter import adapter_parameters
from graftkit.findings import Fix, Severity
from graftkit.modeling.unwrapping import name_in_base
from graftkit.recipes.training import Training
from graftkit.surveying.towers.find import tower_finder
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    parameters = [n for n, p in adapter_parameters(context.model).items() if p.requires_grad]
    if not parameters:
        return unknown("no adapter tensor is trainable", help="load the adapter with is_trainable=True")
    run = _Run.of(context)
    backward = run.backward
    figures: dict[str, Any] = {
        "tensors": len(parameters),
        "dead": len(backward.zero_gradient),
        "not_finite": len(backward.nonfinite),
        "loss": backward.loss,
        "checkpointing": (run.use.mode or Mode.OFF).value,
        "towers": run.table,
    }
    if not backward.gradients:
        return failed(
            f"the backward pass fails: {backward.refusal}", help="gradient_checkpointing=False", **figures
        )
    if backward.nonfinite:
        message = f"{len(backward.nonfinite)} of {len(parameters)} gradients are not finite"
        return failed(message, where=backward.nonfinite[0], **figures)
    if backward.zero_gradient:
        return _without_gradient(run, len(parameters), figures)
    return passed(f"all {len(parameters)} adapter tensors get a gradient", **figures)


@dataclass(frozen=True)
class _Run:
    """One backward pass under the settings in use, and what explains its result."""

    context: CheckContext
    use: InUse
    backward: Backward

    @classmethod
    def of(cls, context: CheckContext) -> _Run:
        use = in_use(context.model, context.given.training)
        if not can_checkpoint(context.model):
            use = InUse(Mode.OFF, live=False, because="model")
        mode = None if use.live else use.mode or Mode.OFF
        backward = context.gradients.under(mode)
        if backward.zero_gradient and (trained := context.gradients.in_training(mode)) is not None:
            backward = backward.completed_by(trained)
        return cls(context, use, backward)

    @cached_property
    def towers(self) -> dict[str, str]:
        """Adapter tensor -> its tower."""
        tower_of = tower_finder(self.context.model.get_base_model())
        return {name: tower_of(name_in_base(name)) for name in self.backward.gradients}

    @cached_property
    def table(self) -> dict[str, dict[str, int]]:
        """Tower -> the number of its adapter tensors, and of those that get no gradient ("dead")."""
        dead = Counter(self.towers[name] for name in self.backward.zero_gradient)
        tensors = Counter(self.towers.values())
        return {tower: {"tensors": number, "dead": dead[tower]} for tower, number in tensors.items()}

    @cached_property
    def without(self) -> Backward:
        """The same pass without activation checkpointing."""
        return self.context.gradients.under(Mode.OFF)

    def reached(self, name: str) -> bool:
        """Check whether the forward pass called the tensor's layer."""
        return name.partition(f".{self.context.model.base_model.prefix}")[0] in self.backward.reached

    @cached_property
    def fed_towers(self) -> set[str]:
        """The towers of which the forward pass called an adapted layer."""
        return {tower for name, tower in self.towers.items() if self.reached(name)}


def _without_gradient(run: _Run, tensors: int, figures: dict[str, Any]) -> Observation:
    names = run.backward.zero_gradient
    found = [next(cause for cause in _CAUSES if cause.applies(run, name)) for name in names]
    causes = {cause.name: cause for cause in found}
    counts = dict(Counter(cause.name for cause in found))
    message = f"{len(found)} of {tensors} adapter tensors get no gradient: "
    cut = _CUT.name in causes and run.use.mode is Mode.REENTRANT and not run.use.live
    fixable = cut and run.context.given.recipe is not None and run.use.because != "zero3"
    option = (run.context.given.training or Training()).reentrant_key
    adapted = recipe_key(run.context, "target_modules") if _UNFED.name in causes else None
    return failed(
        message + "; ".join(f"{count} {name}" for name, count in counts.items()),
        where=some(name_in_base(name) for name in names),
        help="; ".join(cause.help(run) for cause in causes.values()),
        key=option if fixable else adapted,
        fix=Fix("recipe", sets={option: False}) if fixable else None,
        causes=counts,
        **figures,
    )


@dataclass(frozen=True)
class _Cause:
    """Why a tensor gets no gradient.

    Attributes:
        name: as it stands in the message, after a number.
        applies: checks whether it is the cause for a tensor.
        help: returns the next step.
    """

    name: str
    applies: Callable[[_Run, str], bool]
    help: Callable[[_Run], str]


def _is_outside_the_graph(run: _Run, name: str) -> bool:
    return _is_cut(run, name) and run.backward.inputs_require_grad is False and run.towers[name] == "language"


def _is_cut(run: _Run, name: str) -> bool:
    checkpointed = run.use.mode not in {None, Mode.OFF}
    return checkpointed and run.without.refusal is None and name not in run.without.zero_gradient


def _unfed_help(run: _Run) -> str:
    towers = {run.towers[name] for name in run.backward.zero_gradient} - run.fed_towers
    return f"put the inputs of the {', '.join(sorted(towers))} tower in the batch, or leave it out of the scope"


def _cut_help(run: _Run) -> str:
    if run.use.because == "zero3":
        return (
            "TRL forces re-entrant checkpointing on PEFT with ZeRO-3: train with ZeRO-2, or without checkpointing"
        )
    if run.use.mode is Mode.REENTRANT:
        return 'gradient_checkpointing_kwargs={"use_reentrant": False}'
    return "gradient_checkpointing=False"


_CUT = _Cause("cut off by activation checkpointing", _is_cut, _cut_help)
_UNFED = _Cause(
    "in a tower that the batch does not feed",
    lambda run, name: run.towers[name] not in run.fed_towers,
    _unfed_help,
)
# The first that applies is the cause.
_CAUSES = (
    _Cause(
        "in a head whose weight is read past its module",
        lambda run, name: not run.reached(name) and run.towers[name] == "head",
        lambda _: "leave the output head out of the targets: a fused loss multiplies by its weight directly",
    ),
    _UNFED,
    _Cause(
        "in a layer that is never called",
        lambda run, name: not run.reached(name),
        lambda _: "leave these out: their weight is read without calling the module, or no token is routed there",
    ),
    _Cause(
        "behind inputs that need no gradient",
        _is_outside_the_graph,
        lambda _: "model.enable_input_require_grads(): re-entrant checkpointing needs it on a frozen base",
    ),
    _CUT,
    _Cause(
        "on which the loss does not depend",
        lambda _run, _name: True,
        lambda _: "leave these out: what they compute does not reach the loss",
    ),
)


RULE = Rule(
    code="GK203",
    title="every adapter tensor gets a gradient",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="feed that tower in the batch or leave it out of the scope; use non-re-entrant checkpointing",
    since="0.1.0",
)
