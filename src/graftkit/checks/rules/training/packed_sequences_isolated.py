"""Check that samples packed in one row do not see each other.

## Why it matters

Attention can be masked where the positions restart. A convolution or a recurrent state runs on through the row
unless the model resets it at the end of each sample: a sample is then learned with the end of another in its
state.

## Example

A Jamba with `packing: true`: the logits of a packed sample differ by more than their own size from those of the
sample alone. So do those of models that build their mask without the positions.

## How safe that is

Training without packing is correct; it pads rows and takes longer.

## Sources

- https://github.com/huggingface/transformers/pull/46093
- trl: trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call
- transformers: masking_utils.find_packed_sequence_indices
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.checks.probes.forward import difference, logits_of, tolerance
from graftkit.checks.probes.text_batches import packed_for_trl, packed_sequences, reason_without_text, text_rows
from graftkit.findings import Fix, Severity
from graftkit.text import first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Longer than the windows of short convolutions.
_LENGTHS = (7, 5)
_OPTIONS = ("packing", "padding_free")


def _check(context: CheckContext) -> Observation:
    model = context.model
    if (reason := reason_without_text(model)) is not None:
        return passed(f"samples are not packed for this model: {reason}")
    rows = text_rows(model, _LENGTHS)
    second = logits_of(model, {"input_ids": rows[1], "use_cache": False})
    trl = _Packed.of(model, packed_for_trl, rows, second)
    plain = _Packed.of(model, packed_sequences, rows, second)
    allowed = tolerance(model)
    evidence: dict[str, Any] = {
        "difference": trl.difference,
        "difference_without_boundaries": plain.difference,
        "tolerance": allowed,
        "attention": getattr(model.get_base_model().config, "_attn_implementation", None),
    }
    if trl.refusal is not None:
        return _leak(
            context, f"the model refuses packed rows: {trl.refusal}", {**evidence, "refusal": trl.refusal}
        )
    if not trl.difference <= allowed:
        if (flash := _flash_elsewhere(context)) is not None:
            return unknown(f"samples leak with this attention; {flash} is not available to test", **evidence)
        message = f"a packed sample sees the one before it: its logits differ by {trl.difference:.1e}"
        return _leak(context, message, evidence)
    together = logits_of(model, {"input_ids": packed_sequences(rows)["input_ids"], "use_cache": False})
    if not difference(second, together[:, rows[0].shape[1] :]) > allowed:
        return unknown(
            "a sample's logits hardly depend on what is before it, so a leak would not show", **evidence
        )
    return passed(f"packed and separate logits differ by {trl.difference:.1e}", **evidence)


@dataclass(frozen=True)
class _Packed:
    """How far the packed second sample's logits are from those of the sample alone, or the model's refusal."""

    difference: float
    refusal: str | None = None

    @classmethod
    def of(
        cls,
        model: PeftModel,
        collate: Callable[[list[Tensor]], Mapping[str, Any]],
        rows: list[Tensor],
        second: Tensor,
    ) -> _Packed:
        try:
            logits = logits_of(model, collate(rows))
        except (ValueError, TypeError, NotImplementedError) as error:
            return cls(float("nan"), first_line(error))
        return cls(difference(second, logits[:, rows[0].shape[1] :]))


def _flash_elsewhere(context: CheckContext) -> str | None:
    """Return the flash attention that the recipe asks for, if this model computes attention otherwise."""
    if context.given.recipe is None:
        return None
    options = context.recipe.args.get("model_init_kwargs")
    wanted = str(options.get("attn_implementation", "")) if isinstance(options, Mapping) else ""
    own = str(getattr(context.model.get_base_model().config, "_attn_implementation", ""))
    return wanted if "flash" in wanted and "flash" not in own else None


def _leak(context: CheckContext, message: str, evidence: Mapping[str, Any]) -> Observation:
    """Return a failure if training packs samples, otherwise a note."""
    if context.given.training is None or not context.training.packing:
        return info(message, help="do not pack samples for this model", **evidence)
    recipe = context.given.recipe
    set_ = [f"args.{name}" for name in _OPTIONS if recipe is not None and recipe.args.get(name)]
    return failed(
        message,
        key=next(iter(set_), None),
        fix=Fix("recipe", sets=dict.fromkeys(set_, False)) if set_ else None,
        **evidence,
    )


RULE = Rule(
    code="GK205",
    title="samples packed in one row do not see each other",
    severity=Severity.ERROR,
    needs=("model",),
    check=_check,
    help="packing: false",
    since="0.1.0",
)
