"""Check that a fresh adapter does not change the model.

## Why it matters

Training would start from a different model than the one chosen.

## Example

A module tests the class of its child (`if type(self.linear) is nn.Linear`), so PEFT's layer in its place
changes what it computes before the first step.

## How safe that is

Changing the initializer is safe before training; it does not apply to a trained adapter.

## Sources

- peft: LoraLayer.reset_lora_parameters
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.forward import compare, room_for_copy, tolerance
from graftkit.checks.probes.live_adapter import is_untrained, moved_base
from graftkit.findings import Severity
from graftkit.modeling.outputs import outputs_of


def _check(context: CheckContext) -> Observation:
    initializer = getattr(context.model.active_peft_config, "init_lora_weights", True)
    if initializer is False:
        return unknown("init_lora_weights=False starts with an adapter that changes the model")
    if (moved := moved_base(context.model)) is not None:
        return unknown(
            f"{moved} moves part of the base weights into the adapter, so the original output cannot be compared"
        )
    if (lacking := room_for_copy(context.model)) is not None:
        return unknown(lacking, help="run it on the twin: gk.twin(model)")
    compared = compare(context.pristine_outputs, outputs_of(context.model, context.batch))
    apart = compared.difference
    if apart <= tolerance(context.model):
        return passed(f"outputs with and without the adapter differ by {apart:.1e}", **compared.figures)
    if not is_untrained(context.model):
        return unknown("the adapter has been trained; its initial state is gone", **compared.figures)
    return failed(f"outputs with and without the fresh adapter differ by {apart:.1e}", **compared.figures)


RULE = Rule(
    code="GK115",
    title="a fresh adapter leaves the model unchanged",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="use init_lora_weights=True, and look for a wrapper that the adapter bypasses",
    since="0.1.0",
)
