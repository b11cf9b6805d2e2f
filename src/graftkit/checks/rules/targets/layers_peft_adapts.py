"""Every target must be a layer that PEFT adapts: a wrapper around a linear is none."""

from __future__ import annotations

from graftkit.checks.engine.context import Facts
from graftkit.checks.engine.rule import Observation, Rule, failed, held
from graftkit.checks.peft_config.fixes import retargeted, written_at
from graftkit.checks.peft_config.resolved import Reach, with_reach
from graftkit.checks.probes.modality_inputs import is_fed
from graftkit.findings import Severity, Source
from graftkit.text import some

# What else PEFT raises over; other rules speak of the rest.
_OTHERS = frozenset({"config", "module", "parameter"})


def _check(facts: Facts, reach: Reach) -> Observation:
    key = written_at(facts, "target_modules")
    if reach.wrappers:
        wrapper = reach.inner[reach.wrappers[0]].wrapper
        return failed(
            f"{len(reach.wrappers)} of {len(reach.modules)} targets are wrappers"
            f" ({wrapper.cls if wrapper else ''}), which PEFT refuses: {some(reach.wrappers)}",
            where=reach.wrappers[0],
            help=f"name the linear inside, such as {reach.inner[reach.wrappers[0]].path}",
            fix=retargeted(facts, reach, _inner(facts, reach), saved=True),
            key=key,
            wrappers=len(reach.wrappers),
            targets=len(reach.modules),
        )
    other = next((refusal for refusal in reach.refusals if refusal.kind in _OTHERS), None)
    if other is not None:
        advice = "leave it out of the targets" if other.kind != "config" else "change the field it names"
        return failed(f"PEFT refuses {other.where}: {other.why}", where=other.where, help=advice, key=key)
    named = len(reach.modules) + len(reach.parameters)
    return held(f"each of the {named} targets is something that PEFT adapts", targets=named)


def _inner(facts: Facts, reach: Reach) -> set[str]:
    """The linears that are meant: a bare name means those of the towers that are fed, as it does in a plan.

    What a saved adapter names has been trained, and so has each layer that the targets name inside its wrapper.
    """
    meant = {reach.inner[path].path if path in reach.inner else path for path in reach.modules}
    if facts.folder is not None or any(reach.inner[path].path in reach.targeted for path in reach.wrappers):
        return meant
    modalities = (facts.training.modalities if facts.training else None) or ()
    towers = {tower.name for tower in reach.base.towers if is_fed(reach.base, tower.name, modalities)}
    fed = {site.path for site in reach.base if site.tower in towers | reach.mentioned}
    return meant & fed or meant


RULE = Rule(
    code="GK101",
    title="every target is a layer that PEFT adapts",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=with_reach(_check),
    why="`get_peft_model` raises over the first module it does not know, whether the batches ever use it or not",
    example=(
        '`target_modules: ["q_proj"]` on a model whose vision tower keeps its linears inside wrappers: "Target '
        'module …(…) is not supported", for text-only training too.'
    ),
    help="name the linear inside the wrapper, or let `graft plan` write the targets",
    safety=(
        "The wrapper's own forward stays around the adapter, so nothing the base computes changes. The fix adapts"
        " the named layers of the language model, and of the towers that the targets mention or the data feeds."
    ),
    since="0.1.0",
    sources=(
        "https://github.com/huggingface/peft/issues/3129",
        "https://github.com/huggingface/peft/pull/3154",
        "peft: tuners.lora.model.LoraModel._create_new_module",
    ),
    source=Source.INTROSPECTION,
)
