"""Check that activation checkpointing does not change the gradients.

## Why it matters

The loss is right and goes down, while the adapter gets wrong gradients, without a warning: re-entrant
checkpointing recomputes a layer from its tensor arguments alone, and what a layer passes on otherwise (keys and
values shared with later layers) is cut out of the graph.

## Example

`prepare_model_for_kbit_training(model)` enables re-entrant checkpointing. On a model whose last layers reuse
the keys and values of earlier ones, 46 of 76 adapter tensors get a wrong gradient.

## How safe that is

Non-re-entrant checkpointing computes the loss and the gradients of training without checkpointing.

## Sources

- https://github.com/huggingface/trl/issues/4951
- peft: peft.utils.other.prepare_model_for_kbit_training
- trl: trl.trainer.sft_trainer.SFTTrainer.__init__ (ZeRO-3)
- torch: torch.utils.checkpoint.checkpoint
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, info, passed, unknown
from graftkit.checks.probes.checkpointing import InUse, Mode, can_checkpoint, in_use
from graftkit.checks.probes.gradients import Backward, Comparison, compare
from graftkit.findings import Fix, Severity
from graftkit.modeling.unwrapping import name_in_base
from graftkit.recipes.training import Training


def _check(context: CheckContext) -> Observation:
    if not can_checkpoint(context.model):
        return passed("none of the model's layers can recompute its activations")
    use = in_use(context.model, context.given.training)
    allowed = RULE.limit(context.settings, "difference")
    plain = context.gradients.under(Mode.OFF)
    if not plain.usable:
        return unknown("without checkpointing the adapter gets no finite gradient, so there is nothing to compare")
    figures = {mode.value: _figures(plain, _pass(context, use, mode), allowed) for mode in _modes(use)}
    evidence: dict[str, Any] = {
        "in_use": None if use.mode is None else use.mode.value,
        "allowed": allowed,
        **figures,
    }
    wrong = [mode for mode, seen in figures.items() if seen["wrong"]]
    if use.mode is not None and use.mode.value in wrong:
        return _wrong_in_use(context, use, figures[use.mode.value], evidence)
    if use.mode is Mode.OFF:
        message = "activations are not recomputed, so the gradients are right"
        return _unused_mode(message, wrong, figures, evidence) if wrong else passed(message, **evidence)
    if use.mode is not None:
        worst = figures[use.mode.value]["worst_difference"]
        return passed(f"{use.mode.value} checkpointing changes the gradients by {worst:.1e}", **evidence)
    if wrong:
        return _unused_mode("it is not known whether activations will be recomputed", wrong, figures, evidence)
    return passed("gradients are the same with activation checkpointing, re-entrant or not", **evidence)


def _modes(use: InUse) -> tuple[Mode, ...]:
    return (use.mode,) if use.mode is Mode.CUSTOM else (Mode.NON_REENTRANT, Mode.REENTRANT)


def _pass(context: CheckContext, use: InUse, mode: Mode) -> Backward:
    """Run a mode; the one that the model is in runs with the model's own function and hooks."""
    return context.gradients.under(None if use.live and use.mode is mode else mode)


def _figures(plain: Backward, tried: Backward, allowed: float) -> dict[str, Any]:
    if tried.refusal is not None:
        tensors = len(plain.gradients)
        return {"tensors": tensors, "wrong": tensors, "worst_difference": 1.0, "refusal": tried.refusal}
    apart: Comparison = compare(plain, tried)
    wrong = apart.wrong(allowed)
    return {
        "tensors": len(apart.differences),
        "wrong": len(wrong),
        "worst_difference": max(apart.differences.values(), default=0.0),
        "worst_cosine": min(apart.cosines.values(), default=1.0),
        "worst": [name_in_base(name) for name in wrong[:3]],
        "loss_difference": abs(tried.loss - plain.loss),
    }


def _wrong_in_use(
    context: CheckContext, use: InUse, seen: dict[str, Any], evidence: dict[str, Any]
) -> Observation:
    assert use.mode is not None
    # If only the model is in the mode, the recipe did not set it and cannot change it.
    written = context.given.recipe is not None and not use.live
    forced = use.because == "zero3"
    fixable = written and not forced and use.mode is Mode.REENTRANT
    option = (context.given.training or Training()).reentrant_key
    return failed(
        _message(use.mode.value, seen),
        where=next(iter(seen.get("worst", ())), None),
        help=_help(use),
        key=("args.deepspeed" if forced else option) if written else None,
        fix=Fix("recipe", sets={option: False}) if fixable else None,
        **evidence,
    )


def _help(use: InUse) -> str:
    if use.because == "zero3":
        return (
            "TRL forces re-entrant checkpointing on PEFT with ZeRO-3 where checkpointing has options: leave "
            "gradient_checkpointing_kwargs out, train with ZeRO-2, or with gradient_checkpointing=False"
        )
    if use.mode is Mode.REENTRANT and use.live:
        return (
            'model.gradient_checkpointing_enable({"use_reentrant": False}), or '
            'prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return RULE.help if use.mode is Mode.REENTRANT else "train with gradient_checkpointing=False"


def _unused_mode(message: str, wrong: list[str], figures: dict[str, Any], evidence: dict[str, Any]) -> Observation:
    """Return a note that a mode gives wrong gradients that is not known to be in use."""
    wrong_mode = _message(wrong[0], figures[wrong[0]])
    return info(f"{message}; {wrong_mode}", help=f"do not train with {wrong[0]} checkpointing", **evidence)


def _message(mode: str, seen: dict[str, Any]) -> str:
    if "refusal" in seen:
        return f"the backward pass fails with {mode} checkpointing: {seen['refusal']}"
    return (
        f"{mode} checkpointing gives {seen['wrong']} of {seen['tensors']} adapter tensors a wrong gradient "
        f"(cosine down to {seen['worst_cosine']:.2f}, the loss differs by {seen['loss_difference']:.0e})"
    )


RULE = Rule(
    code="GK202",
    title="gradients are the same with and without activation checkpointing",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help='gradient_checkpointing_kwargs={"use_reentrant": False}',
    since="0.1.0",
    settings={
        "difference": Setting(0.02, "largest accepted change of one tensor's gradient, relative to its length"),
    },
)
