"""Check that the saved model keeps the base's wrappers, under the base's names.

## Why it matters

The class does not know the weights' new names, so it initializes them at random.

## Example

`setattr(parent, name, wrapper.linear)` makes PEFT accept a wrapped model. Saved like this, the checkpoint lacks
the wrapped names and all clip bounds, and reloading it gives another model.

## How safe that is

Only names and bounds change: the weights are the same.

## Sources

- https://github.com/huggingface/peft/issues/3129
- torch.nn.Module.state_dict
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.surveying.sites import ModelMap
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftModel


def _check(context: CheckContext) -> Observation:
    if context.given.model is None and context.given.checkpoint is None:
        return unknown("needs checkpoint, or model", missing=("checkpoint",))
    expected = {f"{site.path}.weight": f"{site.wrapper.path}.weight" for site in context.base if site.wrapper}
    if not expected:
        return passed("the base has no wrappers", wrappers=0)
    if context.given.model is not None:
        seen = _compared("the live model", _live_names(context.model), expected)
        if seen.verdict is not Severity.OK or context.given.checkpoint is None:
            return seen
    return _compared("the saved model", context.checkpoint_headers.keys(), _on_disk(context.base))


def _live_names(model: PeftModel) -> set[str]:
    """Return the names of the state dict as the base has them, without the parts that PEFT adds."""
    added = {"base_layer", "original_module"}
    names = model.get_base_model().state_dict()
    return {".".join(part for part in name.split(".") if part not in added) for name in names}


def _on_disk(base: ModelMap) -> dict[str, str]:
    """Return, by name of each wrapped weight, its name without the wrapper."""
    found: dict[str, str] = {}
    for site in base:
        if site.wrapper is None:
            continue
        inner = site.path.removeprefix(site.wrapper.path)
        found |= {key: key.replace(f"{inner}.weight", ".weight") for key in site.checkpoint_keys}
    return found


def _compared(what: str, names: Collection[str], expected: dict[str, str]) -> Observation:
    missing = [name for name in expected if name not in names]
    bare = [name for name in missing if expected[name] in names]
    if bare:
        message = f"{what} has {len(bare)} of {len(expected)} wrapped weights without their wrapper: {some(bare)}"
        return failed(message, where=bare[0], missing=len(missing), unwrapped=len(bare), wrappers=len(expected))
    if missing:
        return unknown(f"{what} lacks {len(missing)} of {len(expected)} wrapped weights: {some(missing)}")
    return passed(f"{what} has all {len(expected)} wrapped weights under their names", wrappers=len(expected))


RULE = Rule(
    code="GK602",
    title="the saved model keeps the base's wrappers",
    severity=Severity.ERROR,
    needs=("base",),
    check=_check,
    help="put the wrappers back before saving; `gk.unwrap` does that for every state dict",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
