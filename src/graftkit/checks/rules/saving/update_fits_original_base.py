"""Check that the saved update is one for the original base, whatever the initializer did to it.

## Why it matters

The initializer moved part of the base weights into the adapter: on the original base B·A is wrong.

## Example

A LoRA-GA adapter is saved and loaded in stock PEFT: no warning, and the logits differ by their own size.

## How safe that is

The conversion is exact: rank and alpha are doubled, and the second half subtracts the initial part. A converted
adapter has `init_lora_weights: true`, and passes this rule.

## Sources

- peft.tuners.lora.model.LoraModel.subtract_mutated_init
- peft.tuners.lora.model.LoraModel._convert_state_dict_for_initial_model
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity
from graftkit.planning.initializers import initializer_of

# Why stock PEFT does not rebuild the base when it loads the adapter, by initializer: seen with peft 0.21.2.
_NOT_REBUILT = {
    "pissa_niter": "its decomposition depends on the random generator: loading it gives another base",
    "corda": "loading it needs the covariances of its preprocessing, and raises without them",
    "lora_ga": "loading it leaves the base as it is, without a warning",
}
_CONVERT = (
    "save it again with save_pretrained(out, path_initial_model_for_weight_conversion=…), which needs the "
    "untrained adapter; or merge it in the process that trained it"
)


def _check(context: CheckContext) -> Observation:
    init = context.saved.file.config.get("init_lora_weights")
    row = initializer_of(init)
    if row is None or not row.moves_base:
        return passed("its initializer did not change the base")
    moved = f"init_lora_weights={init!r:.80} moved the base"
    if row.rebuilt_on_load is None:
        return unknown(f"{moved}: whether PEFT rebuilds it on loading is not known")
    if not row.rebuilt_on_load:
        why = _NOT_REBUILT.get(row.name, "loading the adapter does not rebuild it")
        return failed(f"{moved}, and {why}", where="init_lora_weights", init_lora_weights=init)
    return failed(
        f"{moved}: B·A alone is not its update",
        where="init_lora_weights",
        help=f"stock PEFT rebuilds that base on loading; for other tools, {_CONVERT}",
        severity=Severity.WARNING,
        init_lora_weights=init,
    )


RULE = Rule(
    code="GK604",
    title="the saved update fits the original base",
    severity=Severity.ERROR,
    needs=("adapter",),
    check=_check,
    help=_CONVERT,
    since="0.1.0",
)
