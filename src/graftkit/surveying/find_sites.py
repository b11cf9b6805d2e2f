"""The sites of a model: modules that carry a weight, and bare parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftkit.surveying import kinds
from graftkit.surveying.obstacles import is_linear_of_its_own, objection
from graftkit.surveying.quantized import features_of, quantization_of
from graftkit.surveying.roles.by_name import is_projection, role_of
from graftkit.surveying.sites import Note, Obstacle, Site
from graftkit.surveying.structure import ModelStructure

if TYPE_CHECKING:
    from torch import nn


def find_sites(structure: ModelStructure) -> tuple[Site, ...]:
    """Return every site of the model, in definition order."""
    return _with_notes(tuple(_sites(structure)))


def _sites(structure: ModelStructure) -> Iterator[Site]:
    for path, module in structure.modules.items():
        if path in structure.kind_at:
            yield _module_site(structure, path, module)
        elif path and path.rpartition(".")[0] not in structure.kind_at:
            yield from _parameter_sites(structure, path, module)


def _module_site(structure: ModelStructure, path: str, module: Any) -> Site:
    kind = structure.kind_at[path]
    shape, wrapper = _shape(module, kind), structure.wrappers.get(path)
    composites = structure.composites.get(path, ())
    site = Site(path, structure.tower_of(path), "other", kind, shape, wrapper=wrapper, composites=composites)
    return replace(
        site,
        role=_module_role(structure, site, module),
        objection=objection(path, module, kind, structure.family_above(path)),
        quantized=quantization_of(module),
        groups=module.groups if kind == kinds.CONV else 1,
    )


def _module_role(structure: ModelStructure, site: Site, module: Any) -> str:
    if any(module is head for head in structure.output_layers):
        return "lm_head"
    if site.path in structure.routing.routers:
        return "router"
    stands_for = next((c.path for c in site.composites if is_projection(c.path)), None)
    return role_of(
        site.names if stands_for is None else (stands_for,),
        site.kind,
        in_state_space=site.path.rpartition(".")[0] in structure.state_spaces,
        beside_experts=site.path in structure.routing.beside_experts,
    )


def _shape(module: Any, kind: str) -> tuple[int, ...]:
    """Return the weight's logical shape: a 4-bit weight is stored packed, so linears report their features."""
    if kind == kinds.LINEAR and (features := features_of(module)) is not None:
        return features
    if kind == kinds.MULTIHEAD:
        return (3 * module.embed_dim, module.embed_dim)
    return tuple(module.weight.shape)


def _parameter_sites(structure: ModelStructure, path: str, module: nn.Module) -> Iterator[Site]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2 or name.endswith("bias"):
            continue
        role = _parameter_role(structure, f"{path}.{name}", module, parameter)
        against = Obstacle.LOOSE_PARAMETER.because() if role == "other" else None
        if role == "other" and name == "weight" and is_linear_of_its_own(module):
            role, against = role_of((path,), kinds.LINEAR), None
        shape = tuple(parameter.shape)
        yield Site(f"{path}.{name}", structure.tower_of(path), role, kinds.PARAMETER, shape, against)


def _parameter_role(structure: ModelStructure, path: str, module: nn.Module, parameter: nn.Parameter) -> str:
    """Return a bare parameter's role: experts are stacked in three dimensions, a router has a row for each."""
    words = f"{path.split('.')[-2]} {type(module).__name__}".lower()
    counted = parameter.shape[0] in structure.expert_counts
    if path in structure.routing.stacks or (parameter.ndim == 3 and (counted or "expert" in words)):
        return "expert"
    is_router = parameter.ndim == 2 and counted and ("router" in words or "gate" in words)
    if path in structure.routing.routers or is_router:
        return "router"
    return "other"


def _with_notes(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return the sites with notes on attention layers that lack projections which their tower has elsewhere.

    A layer with a key but no value projection uses its keys as values; one with neither reads another
    layer's. A tower in which no layer has a value projection (a fused qkv) gets no notes.
    """
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for site in sites:
        layers[_layer(site)].add(site.role)
    separate = {tower for (tower, _), roles in layers.items() if "attention.v" in roles}
    return tuple(replace(s, note=_note(s, layers[_layer(s)])) if s.tower in separate else s for s in sites)


def _layer(site: Site) -> tuple[str, str]:
    return site.tower, site.names[-1].rpartition(".")[0]


def _note(site: Site, roles: set[str]) -> Note | None:
    if "attention.v" in roles or roles & {"attention.qkv", "attention.kv"}:
        return None
    if site.role == "attention.k":
        return Note.KEY_IS_VALUE
    if site.role == "attention.q" and "attention.k" not in roles:
        return Note.SHARED_KV
    return None
