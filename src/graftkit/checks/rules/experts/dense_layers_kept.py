"""Where PEFT takes names for experts, linears of the same names must not be dropped.

## Why it matters

On some model types PEFT turns names such as `gate_proj` into the stacked experts, wherever they stand: dense
layers and shared experts of that name then get no adapter, and no warning.

## Example

The usual seven names on a model whose first layers have a dense MLP: its linears get no adapter.

## How safe that is

The linears are adapted as parameters: that trains the same pair of matrices, and takes no dropout.

## Sources

- https://github.com/huggingface/peft/issues/3711
- peft: utils.transformers_weight_conversion._convert_peft_config_moe
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import more_parameters, recipe_key
from graftkit.findings import Severity, Source
from graftkit.text import percent, some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    if not resolved.expert_names:
        return passed("PEFT reads the targets as they are written")
    dropped = set(resolved.meant) - resolved.targeted
    sites = [site for site in resolved.base if site.path in dropped and site.path not in resolved.adapted]
    if not sites:
        return passed("no linear that the targets name is dropped")
    names = sorted({site.path.rpartition(".")[2] for site in sites})
    share = sum(site.params for site in sites) / max(resolved.base.model.params, 1)
    parameters = [f"{site.path}.weight" for site in sites]
    return failed(
        f"{len(sites)} linears ({percent(share)} of the weights) that the targets name get no adapter: PEFT takes"
        f" {some(names)} for stacked experts",
        where=sites[0].path,
        fix=more_parameters(context, parameters),
        key=recipe_key(context, "target_modules"),
        dropped=len(sites),
        share=round(share, 4),
    )


RULE = Rule(
    code="GK104",
    title="no linear is dropped because its name is taken for experts",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="name the weights of those linears in target_parameters, beside the experts",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
