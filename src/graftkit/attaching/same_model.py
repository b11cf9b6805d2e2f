"""Is this the model that the plan was made for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.errors import AttachError
from graftkit.modeling.sharding import full_shape
from graftkit.planning.plan import Plan
from graftkit.surveying.quantized import features_of
from graftkit.surveying.sites import Site
from graftkit.text import some

if TYPE_CHECKING:
    from torch import nn

_Shape = tuple[int, ...]


def check_same_model(model: nn.Module, plan: Plan) -> None:
    """Check that the model has every planned site, in the shape that it has in the plan.

    Raises:
        AttachError: ``attach-other-model``: says how many sites are missing or differ, with examples.
    """
    missing: list[str] = []
    others: dict[str, tuple[_Shape, _Shape]] = {}
    for site in (attached.site for attached in plan.attached):
        found = _shape_at(model, site)
        if found is None:
            missing.append(site.path)
        # A quantizer may store a transposed weight as a linear's.
        elif sorted(found) != sorted(site.shape):
            others[site.path] = site.shape, found
    if missing or others:
        raise _other_model(model, plan, missing, others)


def _shape_at(model: nn.Module, site: Site) -> _Shape | None:
    """Return the shape of the weight at a site, None where the model has no such site.

    A quantized weight is stored packed: a linear then says its features, and bitsandbytes keeps the former shape.
    """
    holder, _, name = site.path.rpartition(".")
    try:
        module: Any = model.get_submodule(holder if site.kind == "parameter" else site.path)
    except AttributeError:
        return None
    if site.is_linear and (features := features_of(module)) is not None:
        return features
    # The queries', keys' and values' weights of a multi-head attention are one parameter.
    names = {"parameter": name, "multihead_attention": "in_proj_weight"}
    weight = getattr(module, names.get(site.kind, "weight"), None)
    if weight is None:
        return None
    packed = getattr(weight, "quant_state", None)
    return tuple(packed.shape) if packed is not None else tuple(full_shape(weight))


def _other_model(
    model: nn.Module, plan: Plan, missing: list[str], others: Mapping[str, tuple[_Shape, _Shape]]
) -> AttachError:
    found, made_for = type(model).__name__, plan.model.model
    planned = len(plan.attached)
    same = f"both are {found}, of different sizes" if found == made_for.cls else f"it is a {found}"
    shapes = [f"{path}: {list(here)} here, {list(there)} in the plan" for path, (there, here) in others.items()]
    reasons = (
        f"the plan was made for {made_for.name} ({made_for.cls}); {same}",
        f"{len(missing)} of {planned} planned sites are missing: {some(missing, 2)}" if missing else "",
        f"{len(others)} of {planned} have another shape: {some(shapes, 2)}" if others else "",
    )
    request = f"targets={list(plan.targets)}, scope={list(plan.scope)}, method={plan.method!r}"
    return AttachError(
        "this is not the model that the plan was made for",
        where=(*others, *missing)[0],
        why="; ".join(filter(None, reasons)),
        help=f"load the model that was planned, or plan for this one: gk.plan(model, {request}, …)",
        code="attach-other-model",
    )
