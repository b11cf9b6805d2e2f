"""Options that a bare parameter cannot take must not be used where experts are adapted."""

from __future__ import annotations

from graftkit.checks.engine.context import Facts
from graftkit.checks.engine.rule import Observation, Rule, failed, held
from graftkit.checks.peft_config.fixes import mended, written_at
from graftkit.checks.peft_config.resolved import Reach, with_reach
from graftkit.findings import Severity, Source
from graftkit.planning.methods import not_on_parameters


def _check(facts: Facts, reach: Reach) -> Observation:
    if not reach.parameters:
        return held("no parameter is adapted, so every option can be used")
    options = not_on_parameters(reach.given)
    if not options:
        return held(f"the options suit the {len(reach.parameters)} adapted parameters")
    named = ", ".join(options.values())
    made = f"; PEFT makes {', '.join(sorted(reach.rewritten))} into parameters here" if reach.rewritten else ""
    return failed(
        f"{named} cannot be used on the {len(reach.parameters)} parameters that are adapted{made}",
        where=reach.parameters[0],
        help=f"drop {named}, or leave the experts out of the targets",
        fix=mended(facts, removes=options),
        key=written_at(facts, next(iter(options))),
        parameters=len(reach.parameters),
        options=sorted(options),
    )


RULE = Rule(
    code="GK105",
    title="adapted experts get no option that a parameter cannot take",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=with_reach(_check),
    why="`get_peft_model` raises: PEFT adapts a parameter by adding to it, and has no input to drop or to scale",
    example=(
        "`lora_dropout: 0.05` with the usual seven names on a mixture of experts whose names PEFT rewrites:"
        ' "lora.ParamWrapper does not work with lora_dropout != 0".'
    ),
    help="drop the option, or leave the experts out of the targets",
    safety="The option goes for the other layers too: without dropout the adapter may overfit a little sooner.",
    since="0.1.0",
    sources=("https://github.com/modelscope/ms-swift/issues/9589", "peft: tuners.lora.layer.ParamWrapper"),
    source=Source.INTROSPECTION,
)
