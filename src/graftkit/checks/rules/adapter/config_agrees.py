"""Check that the configuration describes the tensors beside it.

## Why it matters

PEFT builds layers from the configuration and fills them from the file: what differs is lost.

## Example

`r` is edited in `adapter_config.json` after training, or another run's file is copied beside it.

## How safe that is

The configuration can be corrected without touching the tensors; alpha cannot be read from them.

## Sources

- peft: tuners.tuners_utils.check_target_module_exists
- peft: utils.other.get_pattern_key
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed
from graftkit.checks.peft_config.schema import declared
from graftkit.findings import Severity
from graftkit.planning.matching import suffixes
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    if problems := context.config_problems:
        return failed(f"its fields are not what PEFT expects: {some(problems)}", problems=len(problems))
    saved = context.saved
    untargeted, ranks = _untargeted(context), _other_ranks(saved)
    unanswered = _expected(context, _without_tensors(saved))
    faults = [
        f"no target names {len(untargeted)} adapted modules: {some(untargeted)}" if untargeted else "",
        f"no tensor belongs to the targets {some(unanswered)}" if unanswered else "",
        f"{len(ranks)} tensors have another rank than the configuration says: {some(ranks)}" if ranks else "",
    ]
    figures: dict[str, Any] = {
        "untargeted": len(untargeted),
        "unanswered": len(unanswered),
        "other_ranks": len(ranks),
    }
    if context.given.base is None and unanswered and not untargeted and not ranks:
        advice = "PEFT ignores a target that its base has no module for; --base shows whether a layer is missing"
        return failed(faults[1], where=unanswered[0], help=advice, severity=Severity.WARNING, **figures)
    if any(faults):
        return failed("; ".join(filter(None, faults)), where=(untargeted or unanswered or ranks)[0], **figures)
    return _judge_fields(saved)


def _untargeted(context: CheckContext) -> list[str]:
    saved = context.saved
    if saved.targets is None:
        return []
    by_wrapper: dict[str, str] = {}
    if context.given.base is not None and saved.prefix is not None:
        # A target that names the wrapper is for GK507 to report.
        by_wrapper = {site.path: name for name, site in context.base.inner.items()}
    tied = _targeted_by_ties(context)
    stray = (core for core in saved.modules if core not in saved.parameters and core not in tied)
    return [c for c in stray if not saved.matches(c) and not (c in by_wrapper and saved.matches(by_wrapper[c]))]


def _targeted_by_ties(context: CheckContext) -> frozenset[str]:
    """Return the modules that PEFT may adapt because they share a target's weight; without a base, all may."""
    if not context.saved.file.config.get("ensure_weight_tying"):
        return frozenset()
    return frozenset(context.saved.modules if context.given.base is None else context.fit.planned)


def _expected(context: CheckContext, targets: list[str]) -> list[str]:
    """Return the targets that the base has, or may have, modules for which the filters do not exclude.

    Lists are shared between model families.
    """
    saved = context.saved
    if not targets or context.given.base is None or isinstance(saved.targets, str):
        return targets
    known = {suffix for path in context.base.module_paths if saved.matches(path) for suffix in suffixes(path)}
    return [target for target in targets if target in known]


def _without_tensors(saved: SavedAdapter) -> list[str]:
    """Return the targets that no tensor belongs to."""
    if saved.targets is None or saved.prefix is None:
        return []
    if isinstance(saved.targets, str):
        answers = any(saved.matches(core) or saved.matches(core.rpartition(".")[0]) for core in saved.modules)
        return [] if answers or saved.parameters else [saved.targets]
    # A module path has few suffixes, so they are looked up instead of matching every target with every path.
    answered = {suffix for core in saved.modules for suffix in suffixes(core)}
    # An inner linear belongs to its wrapper's name too.
    answered |= {suffix for core in saved.modules for suffix in suffixes(core.rpartition(".")[0])}
    missing = [target for target in saved.targets if target not in answered]
    # No tensor is expected for a target that the filters exclude.
    return [target for target in missing if saved.matches(target)]


def _other_ranks(saved: SavedAdapter) -> list[str]:
    if saved.file.peft_type != "LORA":
        return []
    found = []
    for core, names in saved.modules.items():
        if core in saved.parameters:
            continue
        said = saved.rank(core)
        shown = {name: saved.rank_of_shape(name) for name in names}
        found += [f"{name} ({rank}, not {said})" for name, rank in shown.items() if rank not in {None, said}]
    return found


def _judge_fields(saved: SavedAdapter) -> Observation:
    modules = len(saved.modules)
    method = declared(saved.file.peft_type)
    if method is None:
        return failed(f"the installed PEFT has no method {some([saved.file.peft_type])}")
    ignored = sorted(saved.file.config.keys() - method.fields.keys())
    if ignored:
        message = f"the tensors agree; the installed PEFT ignores the fields {some(ignored)}"
        advice = "an adapter from a newer PEFT may compute something else in this version: update peft"
        return info(message, where=ignored[0], help=advice, ignored=len(ignored))
    return passed(f"targets and ranks agree with the tensors of {modules} modules", modules=modules)


RULE = Rule(
    code="GK504",
    title="configuration and tensors agree",
    severity=Severity.ERROR,
    needs=("adapter",),
    check=_check,
    help="restore the adapter_config.json that was saved with these tensors",
    since="0.1.0",
)
