"""What the recipe asks for must be possible on the model, exactly."""

from __future__ import annotations

from graftkit.checks.facts import Facts
from graftkit.checks.rule import Observation, Rule, failed, held
from graftkit.findings import Severity, Source


def _check(facts: Facts) -> Observation:
    assert facts.recipe is not None
    if facts.recipe_refusal is not None:
        error = facts.recipe_refusal
        return failed(
            ": ".join(part for part in (error.what, error.why) if part),
            where=error.where,
            help=error.help,
            key="adapter.options" if facts.recipe.fields.adapter.options else "adapter",
            error=error.code,
        )
    if facts.plan is None:
        return held("the stock PEFT configuration is used as it is")
    return held(f"{len(facts.plan.attached)} sites are adapted, as asked", sites=len(facts.plan.attached))


RULE = Rule(
    code="GK100",
    title="what the recipe asks for can be planned and attached, exactly",
    severity=Severity.ERROR,
    needs=("recipe", "base"),
    check=_check,
    why="a request that can be met in part only would train something else than what was meant",
    example='`targets: [q_proj, k_prj]`: "k_prj" names nothing on this model.',
    help="change the request as the message says; `graft plan MODEL` shows what a request means",
    safety="The plan says what is adapted before anything is loaded.",
    since="0.1.0",
    sources=("https://github.com/huggingface/peft/issues/3554",),
    source=Source.INTROSPECTION,
)
