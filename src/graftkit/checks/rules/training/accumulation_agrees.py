"""Check that four batches of one sample train like one batch of four.

## Why it matters

If each batch's mean loss counts the same, a token of a short sample weighs more than one of a long sample, and
the result of training depends on how samples are batched.

## Example

Many models that take images declare `accepts_loss_kwargs = False`: the Trainer then cannot pass the number of
tokens of the step, and divides by the number of batches instead.

## How safe that is

A step then depends less on its samples' lengths; memory grows with the batch.

## Sources

- https://github.com/huggingface/transformers/issues/37197
- trl: loss_is_scaled_for_ga of each trainer
- transformers: Trainer._get_num_items_in_batch, Trainer.training_step
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, info, passed, unknown
from graftkit.checks.probes.checkpointing import Mode
from graftkit.checks.probes.gradients import Backward, backward, checkpointing_in_eval, compare
from graftkit.checks.probes.live_adapter import perturbing
from graftkit.checks.probes.text_batches import padded, reason_without_text, single, text_rows
from graftkit.families import IGNORED_LABEL
from graftkit.findings import Severity

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_LENGTHS = (2, 4, 8, 12)
# The Trainer passes the number of tokens to any model whose forward takes keywords; a model that ignores it
# returns a mean, and the Trainer sums these means.
_TWICE = 1.5
_IGNORES = "the model ignores num_items_in_batch: its gradient grows with gradient_accumulation_steps; set it to 1"


def _check(context: CheckContext) -> Observation:
    model = context.model
    if context.given.training is not None and context.training.trainer != "sft":
        return passed(f"{context.training.trainer} averages over samples, or scales its loss itself")
    if "labels" not in context.batch:
        return passed("the batch has no labels, so the model computes no loss")
    samples = _samples(model, context.batch)
    if samples is None:
        return unknown("the batch cannot be split into its samples")
    whole, separate = samples
    accepts = _accepts_loss_kwargs(model.get_base_model())
    with checkpointing_in_eval(model, Mode.OFF), perturbing(model):
        try:
            together = _pass(model, [whole], accepts)
            apart = _pass(model, separate, accepts)
        except _NoLossError:
            return passed("the model computes no loss")
    if not together.usable:
        return unknown("the adapter gets no finite gradient from these samples, so there is nothing to compare")
    worst = max(compare(together, apart).differences.values(), default=0.0)
    evidence: dict[str, Any] = {
        "gradient_difference": worst,
        "loss_together": together.loss,
        "loss_accumulated": apart.loss,
        "accepts_loss_kwargs": accepts,
        "samples": len(separate),
    }
    if worst <= RULE.limit(context.settings, "difference"):
        return passed(f"gradients of one batch and of its samples, accumulated, differ by {worst:.1e}", **evidence)
    message = (
        f"gradients of {len(separate)} accumulated samples differ from those of one batch by {100 * worst:.0f} % "
        f"(loss {apart.loss:.3f} and {together.loss:.3f})"
    )
    advice = _IGNORES if accepts and apart.loss > _TWICE * together.loss else RULE.help
    if context.given.training is None or context.training.accumulation == 1:
        return info(message, help=advice, **evidence)
    key = "args.gradient_accumulation_steps" if context.given.recipe is not None else None
    return failed(message, key=key, help=advice, **evidence)


def _samples(model: PeftModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Return one batch, and its samples each as a batch; None if the batch cannot be split.

    A causal model gets text of four lengths, any other model the rows of its batch, with labels of different
    lengths.
    """
    if reason_without_text(model) is None:
        rows = text_rows(model, _LENGTHS)
        return padded(rows, pad=int(rows[0][0, 0])), [single(row) for row in rows]
    size = batch["labels"].shape[0]
    if any(getattr(value, "shape", ())[:1] != (size,) for value in batch.values()):
        return None
    whole = {**batch, "labels": _of_different_lengths(batch["labels"])}
    return whole, [{name: value[i : i + 1] for name, value in whole.items()} for i in range(size)]


def _of_different_lengths(labels: Tensor) -> Tensor:
    """Return labels, (B, T), of which each row keeps fewer than the row before."""
    if labels.ndim < 2:
        return labels
    labels = labels.clone()
    for row, kept in enumerate(labels):
        kept[max(1, kept.shape[0] // (row + 1)) :] = IGNORED_LABEL
    return labels


class _NoLossError(Exception):
    """The model returns no loss for labels that it takes."""


def _pass(model: PeftModel, batches: list[dict[str, Any]], accepts: bool) -> Backward:
    """Return the gradient of one optimizer step over these batches.

    Source: ``transformers.Trainer._get_num_items_in_batch`` and ``training_step``: a model that takes loss
    arguments gets the number of tokens of the whole step; for others, each batch's mean counts the same.
    """
    first = 1 if _shifts_labels(model.get_base_model()) else 0
    tokens = sum((batch["labels"][..., first:] != IGNORED_LABEL).sum() for batch in batches)
    extra = {"num_items_in_batch": tokens} if accepts else {}

    def loss() -> Tensor:
        losses = [getattr(model(**batch, **extra), "loss", None) for batch in batches]
        if any(loss is None for loss in losses):
            raise _NoLossError
        total: Tensor = sum(losses)  # type: ignore[arg-type,assignment]
        return total if accepts else total / len(batches)

    return backward(model, loss)


def _shifts_labels(base: Any) -> bool:
    """Check, as ``transformers.Trainer.__init__`` does, whether the first label of a row is never predicted."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return shifts and not getattr(base.config, "is_encoder_decoder", False)


def _accepts_loss_kwargs(base: Any) -> bool:
    """Check, as ``transformers.Trainer.__init__`` does, whether the model takes loss arguments."""
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


RULE = Rule(
    code="GK210",
    title="accumulating batches trains like one large batch",
    severity=Severity.WARNING,
    needs=("model", "batch"),
    check=_check,
    help=(
        "a larger per_device_train_batch_size with fewer gradient_accumulation_steps, or samples of like length "
        'in one step (train_sampling_strategy: "group_by_length")'
    ),
    since="0.1.0",
    settings={
        "difference": Setting(0.02, "largest accepted change of one tensor's gradient, relative to its length"),
    },
)
