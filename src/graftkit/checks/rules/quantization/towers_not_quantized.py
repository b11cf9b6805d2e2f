"""Check that only the language model is quantized, unless asked for.

## Why it matters

Vision and audio towers are small and sensitive: quantizing them saves little memory and costs accuracy, more so
in wrappers whose bounds were measured with the original weights.

## Example

`load_in_4bit=True` without `llm_int8_skip_modules` quantizes every linear of the vision tower.

## How safe that is

The towers then stay in 16 bit, which takes a little more memory.

## Sources

- transformers: quantizers.base.HfQuantizer.get_modules_to_not_convert
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.probes.modality_inputs import always_fed
from graftkit.findings import Fix, Severity, Source
from graftkit.planning.quantization import plan_quantization
from graftkit.surveying.sites import UNKNOWN_TOWER, ModelMap, Site

# Where TRL takes loading options from.
_IN_ARGS = "args.model_init_kwargs.quantization_config"


def _check(context: CheckContext) -> Observation:
    fed_by_text = always_fed(context.base)
    # Of a module of no known tower nothing says that it is outside the language model.
    outside = [site for site in context.base if site.tower not in fed_by_text | {UNKNOWN_TOWER}]
    quantized = [site for site in outside if site.quantized]
    given = _bitsandbytes_options(context)
    if not quantized and given is None:
        if _is_planned(context):
            return passed("what stays unquantized is named when the base is loaded")
        if context.training.quantization is None:
            return passed("the base is not quantized")
    if not quantized:
        quantized = _would_quantize(outside, context.base, (given or {}).get("llm_int8_skip_modules"))
    if not quantized:
        return passed("no linear outside the language model is quantized")
    skip = list(plan_quantization(context.base, context.training.quantization or "4bit").skip_modules)
    towers = Counter(site.tower for site in quantized)
    in_recipe = _options_in_recipe(context) is not None
    return failed(
        f"{len(quantized)} linears outside the language model are quantized: "
        + ", ".join(f"{number} in {tower}" for tower, number in towers.most_common()),
        where=quantized[0].path,
        help=f"llm_int8_skip_modules={skip}",
        fix=Fix("recipe", {f"{_IN_ARGS}.llm_int8_skip_modules": skip}) if in_recipe else None,
        key=_IN_ARGS if in_recipe else None,
        packed=len(quantized),
    )


def _is_planned(context: CheckContext) -> bool:
    """Check whether graftkit loads the base: a plan, or the recipe's key, then names what is not quantized."""
    by_plan = context.given.plan is not None and context.plan.quantization is not None
    return by_plan or (context.given.recipe is not None and context.recipe.fields.quantization is not None)


def _bitsandbytes_options(context: CheckContext) -> Mapping[str, Any] | None:
    """Return the options for bitsandbytes, from the recipe or from the model's own configuration."""
    own = (context.given.config or {}).get("quantization_config")
    bits = isinstance(own, dict) and (own.get("load_in_4bit") or own.get("load_in_8bit"))
    return _options_in_recipe(context) or (own if bits else None)


def _options_in_recipe(context: CheckContext) -> Mapping[str, Any] | None:
    options = context.recipe.args.get("model_init_kwargs") if context.given.recipe is not None else None
    given = options.get("quantization_config") if isinstance(options, dict) else None
    return given if isinstance(given, dict) else None


def _would_quantize(sites: list[Site], base: ModelMap, skip: list[str] | None) -> list[Site]:
    """Return those of the sites that transformers would replace.

    Source: ``transformers.integrations.bitsandbytes.replace_with_bnb_linear``, which takes plain linears only.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    named = skip if skip is not None else _kept_by_default(base)
    plain = (site for site in sites if site.is_linear and site.adaptable)
    return [site for site in plain if should_convert_module(site.path, named)]


def _kept_by_default(base: ModelMap) -> list[str]:
    """Return what transformers never quantizes by default: heads, tied weights, the last parameter's module.

    Source: ``transformers.quantizers.base.get_keys_to_not_convert``.
    """
    place = {path: at for at, path in enumerate(base.parameter_paths)}
    tied = {f"{site.path}.weight": site.tied_to for site in base if site.tied_to}
    first = [
        p for p in place if all(place.get(f"{other}.weight", place[p]) >= place[p] for other in tied.get(p, ()))
    ]
    last = [path.removesuffix(".weight") for path in first[-1:]]
    return [site.path for site in base if site.role == "lm_head" or site.tied_to] + last


RULE = Rule(
    code="GK303",
    title="no linear outside the language model is quantized",
    severity=Severity.WARNING,
    needs=("base", "training"),
    check=_check,
    help="name the towers in llm_int8_skip_modules, and the output embeddings, which your own list has to repeat",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
