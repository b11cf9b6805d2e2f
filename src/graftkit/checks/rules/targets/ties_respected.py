"""No adapter may be on a weight that another module shares.

## Why it matters

The adapter is trained on one of the two, and merging writes it into the weight of both; with
ensure_weight_tying it is written twice, so that the merged model is not the trained one.

## Example

LoRA on `embed_tokens` of a model whose output embeddings are the same weight.

## How safe that is

Each of them trains more parameters than the adapter did; untying also makes the model larger.

## Sources

- https://github.com/huggingface/peft/issues/2018
- https://github.com/huggingface/peft/issues/2777
- peft: tuners.lora.model.LoraModel._add_targets_to_tie
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    shared = [site for site in resolved.sites if site.tied_to]
    if not shared:
        return passed(f"none of the {len(resolved.sites)} adapted weights is shared")
    twice = bool(resolved.is_lora and resolved.fields.get("ensure_weight_tying"))
    after = "adds the adapter twice" if twice else "changes the other module too"
    return failed(
        f"{shared[0].path} shares its weight with {shared[0].tied_to[0]}: merging {after}",
        where=shared[0].path,
        key=recipe_key(context, "ensure_weight_tying" if twice else "target_modules"),
        shared=len(shared),
        merged_twice=twice,
    )


RULE = Rule(
    code="GK113",
    title="no adapter is on a weight that another module shares",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help=(
        "train whole modules with modules_to_save, single tokens with trainable_token_indices,"
        " or untie the weights before training"
    ),
    since="0.1.0",
    source=Source.INTROSPECTION,
)
