"""Check that adapters in a tower that no batch feeds do not stop DDP, which waits for every gradient.

## Why it matters

On several devices DDP waits for the gradient of every trained parameter; one that never comes ends the run with
"Expected to have finished reduction in the prior iteration".

## Example

Text-only data, adapters in the vision tower, and re-entrant checkpointing on two devices.

## How safe that is

Looking for unused parameters costs a little time a step; leaving the tower out costs nothing.

## Sources

- trl: trainer.sft_trainer.SFTTrainer.__init__
- transformers: trainer.Trainer._build_accelerator_args
- https://github.com/huggingface/transformers/issues/49443
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.modality_inputs import is_fed, may_be_fed
from graftkit.findings import Fix, Severity, Source
from graftkit.recipes.training import Training


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    training = context.training
    if training.modalities is None:
        return passed("the batches have every modality that the model takes")
    if training.zero_stage:
        return passed(f"ZeRO stage {training.zero_stage} does not wait as DDP does")
    towers = resolved.by_tower.items()
    unfed = {t: len(sites) for t, sites in towers if not is_fed(resolved.base, t, training.modalities)}
    unclear = sum(unfed.pop(tower) for tower in list(unfed) if may_be_fed(resolved.base, tower))
    if not unfed and unclear:
        return unknown(f"it is not known whether the batches feed {unclear} of the adapted modules")
    if not unfed:
        return passed("every adapted tower is fed")
    adapters = sum(unfed.values())
    places = ", ".join(f"{number} in {tower}" for tower, number in unfed.items())
    reason, key = _why_ddp_stops(training)
    if not reason:
        return passed(
            f"{adapters} adapters are never fed ({places}), and DDP looks for unused parameters", unfed=adapters
        )
    return failed(
        f"{adapters} adapters get no gradient from these batches ({places}), and {reason}: DDP stops",
        where=next(iter(unfed)),
        fix=_fix(context, training),
        key=key,
        unfed=adapters,
    )


def _why_ddp_stops(training: Training) -> tuple[str, str | None]:
    """Return why DDP fails, and the key that decides it; an empty text if it does not fail.

    Source: ``trl.trainer.sft_trainer.SFTTrainer.__init__``: for a model of several modalities TRL switches
    find_unused_parameters on where it is not given, but not under re-entrant checkpointing, which fails with it.
    """
    if training.find_unused is False:
        return "ddp_find_unused_parameters is off", "args.ddp_find_unused_parameters"
    if training.checkpointing and training.reentrant:
        return "re-entrant checkpointing cannot look for unused ones", training.reentrant_key
    return "", None


def _fix(context: CheckContext, training: Training) -> Fix | None:
    if context.given.recipe is None:
        return None
    sets: dict[str, object] = {}
    if training.find_unused is False:
        sets["args.ddp_find_unused_parameters"] = True
    if training.checkpointing and training.reentrant:
        sets[training.reentrant_key] = False
    return Fix("recipe", sets)


RULE = Rule(
    code="GK211",
    title="adapters that no batch feeds do not stop DDP",
    severity=Severity.WARNING,
    needs=("peft_config", "base", "training"),
    check=_check,
    help="leave the tower out, or let DDP look for unused parameters, without re-entrant checkpointing",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
