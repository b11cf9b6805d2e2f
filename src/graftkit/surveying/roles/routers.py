"""Routers and stacked experts, found by what they do: a router's outputs are as many as the experts beside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.surveying import kinds
from graftkit.surveying.quantized import features_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Routing:
    """Which weights choose experts, and among which.

    Attributes:
        routers: paths of linears and of bare parameters.
        stacks: paths of parameters that stack the experts of one of these routers.
        beside_experts: paths of weights that stand where a router would, routers or not.
    """

    routers: frozenset[str]
    stacks: frozenset[str]
    beside_experts: frozenset[str]


@dataclass(frozen=True)
class _Experts:
    """Experts of one shape, side by side.

    Attributes:
        path: of the parameter that stacks them, or of the list of modules.
        widths: sizes that an expert's input may have.
    """

    path: str
    number: int
    widths: frozenset[int]

    @property
    def is_in_a_layer(self) -> bool:
        return any(part.isdigit() for part in self.path.split("."))

    @property
    def blocks(self) -> Iterator[str]:
        """The modules around them, inwards out, up to the layer: past a number lie other layers' experts."""
        path = self.path
        while path and not path.rpartition(".")[2].isdigit():
            path = path.rpartition(".")[0]
            yield path


def find_routing(
    modules: Mapping[str, nn.Module], kind_at: Mapping[str, str], expert_counts: frozenset[int]
) -> Routing:
    """Find the routers of a model.

    A router is a linear or a matrix with one output for each of the experts beside it, and with an expert's input
    width. "Beside" is in the same block: neither a number nor another matrix lies between.

    Args:
        kind_at: the kind of each module that is a site.
        expert_counts: how many experts the configurations name.
    """
    counted = [*_stacked(modules, kind_at), *_listed(modules, kind_at)]
    # At the top of a model, as many modules alike are its layers. Only a configuration calls them experts there.
    groups = [group for group in counted if group.is_in_a_layer or group.number in expert_counts]
    groups += _named(modules)
    around: dict[str, list[_Experts]] = defaultdict(list)
    for group in groups:
        for block in group.blocks:
            around[block].append(group)
    matrices = _matrices(modules, kind_at)
    routers, stacks, beside = set(), set(), set()
    for path, holder, (outputs, inputs) in _candidates(modules, kind_at) if groups else ():
        unit = _alone(holder, matrices)
        others = [g for g in around.get(unit.rpartition(".")[0], ()) if not f"{g.path}.".startswith(f"{unit}.")]
        chosen = [group for group in others if group.number == outputs and inputs in group.widths]
        if others:
            beside.add(path)
        if chosen:
            routers.add(path)
            stacks |= {group.path for group in chosen if group.path not in modules}
    return Routing(frozenset(routers), frozenset(stacks), frozenset(beside))


# ---- experts ----


def _stacked(modules: Mapping[str, nn.Module], kind_at: Mapping[str, str]) -> Iterator[_Experts]:
    """Yield bare parameters of three dimensions, the first of which may count experts."""
    for path, module in modules.items():
        if path in kind_at or type(module).__module__.startswith("torch.nn."):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:  # not a scale with axes to broadcast along
                yield _Experts(f"{path}.{name}".lstrip("."), parameter.shape[0], frozenset(parameter.shape[1:]))


def _listed(modules: Mapping[str, nn.Module], kind_at: Mapping[str, str]) -> Iterator[_Experts]:
    """Yield lists of modules alike that are made of linears and come back to their input's width."""
    from torch import nn

    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < 2:
            continue
        members = [f"{path}.{name}" for name, _ in module.named_children()]
        shapes = [_linears(member, modules, kind_at) for member in members]
        if shapes[0] and all(shape == shapes[0] for shape in shapes):
            widths = {inputs for _, inputs in shapes[0]} & {outputs for outputs, _ in shapes[0]}
            yield _Experts(path, len(module), frozenset(widths))


def _named(modules: Mapping[str, nn.Module]) -> Iterator[_Experts]:
    """Yield modules that are experts by name alone: nothing is known of their number and width."""
    for path in modules:
        if path.rpartition(".")[2].lower().startswith("expert"):
            yield _Experts(path, 0, frozenset())


def _linears(
    path: str, modules: Mapping[str, nn.Module], kind_at: Mapping[str, str]
) -> tuple[tuple[int, int], ...] | None:
    """Return the shapes of the linears that a module is made of; None where it is made of anything else."""
    if path not in modules:  # it has another name, under which it is listed
        return None
    if kind_at.get(path) == kinds.LINEAR:
        return (_features(modules[path]),)
    own = [name for name, _ in modules[path].named_parameters(recurse=False)]
    children = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    with_weights = [child for child in children if _weighs(modules.get(child))]
    if own or any(kind_at.get(child) != kinds.LINEAR for child in with_weights):
        return None
    return tuple(_features(modules[child]) for child in with_weights)


def _weighs(module: nn.Module | None) -> bool:
    """Check whether a module has parameters, as far as is known."""
    return module is None or next(module.parameters(), None) is not None


# ---- what may be a router ----


def _candidates(
    modules: Mapping[str, nn.Module], kind_at: Mapping[str, str]
) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield (path, holding module, (outputs, inputs)) of every linear, and of every matrix that is a module's only
    weight."""
    for path, module in modules.items():
        if kind_at.get(path) == kinds.LINEAR:
            yield path, path, _features(module)
        elif path and path not in kind_at:
            own = [(name, p) for name, p in module.named_parameters(recurse=False) if _is_matrix(name, p)]
            if len(own) == 1 and own[0][1].ndim == 2:
                outputs, inputs = own[0][1].shape
                yield f"{path}.{own[0][0]}", path, (outputs, inputs)


def _features(linear: Any) -> tuple[int, int]:
    return features_of(linear) or tuple(linear.weight.shape)


def _matrices(modules: Mapping[str, nn.Module], kind_at: Mapping[str, str]) -> Counter[str]:
    """Return how many matrices lie in each module."""
    counted: Counter[str] = Counter()
    for path, module in modules.items():
        own = sum(_is_matrix(name, p) for name, p in module.named_parameters(recurse=False))
        number = 1 if path in kind_at else own
        while number and path:
            counted[path] += number
            path = path.rpartition(".")[0]
    return counted


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")


def _alone(path: str, matrices: Counter[str]) -> str:
    """Return the outermost module around the one at ``path`` that has no other matrix."""
    while (parent := path.rpartition(".")[0]) and matrices[parent] == 1:
        path = parent
    return path
