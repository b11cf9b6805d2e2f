"""What a survey reads from a model's modules and configurations, gathered once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.families import Family, family_of
from graftkit.surveying import kinds
from graftkit.surveying.roles.routers import Routing, find_routing
from graftkit.surveying.sites import Composite, Wrapper
from graftkit.surveying.towers.declared import models_inside
from graftkit.surveying.towers.find import tower_finder
from graftkit.surveying.wrappers import composites_of, wrappers_of

if TYPE_CHECKING:
    from torch import nn

# The configuration fields that count stacked experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelStructure:
    """A model's modules and parameters by path, and what its configurations and families say about them.

    Attributes:
        modules: every module, the root included.
        parameters: every parameter; a tied one under each of its names.
        kind_at: the kind of each module that is a site.
        wrappers: linear -> the outermost wrapper around it.
        composites: linear -> the modules composed of it and others, the innermost first.
        tower_of: module path -> tower name.
        family_at: the family of each sub-model, so that a tower brings its own facts into any composite.
        output_layers: the output embeddings of each transformers model inside.
        expert_counts: how many experts the configurations say are stacked.
        state_spaces: the state-space mixers.
        routing: the routers, and the experts that they choose.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    kind_at: dict[str, str]
    wrappers: dict[str, Wrapper]
    composites: dict[str, tuple[Composite, ...]]
    tower_of: Callable[[str], str]
    family_at: dict[str, Family | None]
    output_layers: tuple[nn.Module | None, ...]
    expert_counts: frozenset[int]
    state_spaces: frozenset[str]
    routing: Routing

    @classmethod
    def of(cls, model: nn.Module) -> ModelStructure:
        modules = dict(model.named_modules())
        kind_at = {p: k for p, m in modules.items() if p and (k := kinds.kind_of(m)) is not None}
        kind_at = {p: k for p, k in kind_at.items() if kind_at.get(p.rpartition(".")[0]) != kinds.MULTIHEAD}
        linears = frozenset(p for p, k in kind_at.items() if k in {kinds.LINEAR, kinds.TRANSPOSED})
        expert_counts = _expert_counts(modules)
        return cls(
            modules=modules,
            parameters=dict(model.named_parameters(remove_duplicate=False)),
            kind_at=kind_at,
            wrappers=wrappers_of(model, linears),
            composites=_composites(model, linears),
            tower_of=tower_finder(model),
            family_at=_families(modules),
            output_layers=tuple(inner.get_output_embeddings() for _, inner in models_inside(model)),
            expert_counts=expert_counts,
            state_spaces=frozenset(path for path, module in modules.items() if _is_state_space(module)),
            routing=find_routing(modules, kind_at, expert_counts),
        )

    def family_above(self, path: str) -> Family | None:
        """Return the family of the nearest sub-model that a module lies in, or None."""
        while path:
            path = path.rpartition(".")[0]
            if self.family_at.get(path) is not None:
                return self.family_at[path]
        return None


def _composites(model: nn.Module, linears: frozenset[str]) -> dict[str, tuple[Composite, ...]]:
    around: dict[str, list[Composite]] = defaultdict(list)
    # Inner ones follow outer ones in the model's order.
    for path, inside in reversed(composites_of(model, linears).items()):
        for linear in inside:
            around[linear].append(Composite(type(model.get_submodule(path)).__name__, path))
    return {linear: tuple(found) for linear, found in around.items()}


def _is_state_space(module: nn.Module) -> bool:
    """Check for a mixer with a decaying state: it owns a decay (A, or its logarithm) or a step size's bias."""
    return not {"A_log", "dt_bias"}.isdisjoint(name for name, _ in module.named_parameters(recurse=False))


def _families(modules: dict[str, nn.Module]) -> dict[str, Family | None]:
    types = {p: getattr(getattr(m, "config", None), "model_type", None) for p, m in modules.items()}
    return {path: family_of(model_type) for path, model_type in types.items() if model_type}


def _expert_counts(modules: dict[str, nn.Module]) -> frozenset[int]:
    configs = {id(config): config for module in modules.values() if (config := getattr(module, "config", None))}
    layers = (layer for config in configs.values() for layer in _of_each_layer(config))
    counts = (getattr(config, field, None) for config in layers for field in EXPERT_COUNTS)
    return frozenset(count for count in counts if isinstance(count, int) and count > 1)


def _of_each_layer(config: Any) -> Iterable[Any]:
    """Return a configuration, or those of its layers where they differ: it then answers for a layer alone."""
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,)
