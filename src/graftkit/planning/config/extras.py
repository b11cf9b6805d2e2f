"""Options that train more than the planned sites: whole modules, single tokens, biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.matching import ends_with
from graftkit.planning.trials.skeleton import slots_of
from graftkit.surveying.quantized import logical_size
from graftkit.text import suggest

if TYPE_CHECKING:
    from peft import PeftConfig

    from graftkit.surveying.sites import ModelMap, Site


def check_extras(model_map: ModelMap, planned: Iterable[str], options: Mapping[str, Any]) -> None:
    """Refuse names of modules and embeddings that PEFT would not find in the model, or would not adapt.

    Args:
        planned: paths of the planned sites.

    Raises:
        PlanError: ``modules-to-save-unmatched``, ``modules-to-save-targeted`` or ``token-indices-unmatched``.
    """
    for name in options.get("modules_to_save") or ():
        saved = saved_modules(model_map, name)
        if not saved:
            raise _no_module("modules_to_save", name, model_map.module_paths, model_map)
        inside = tuple(f"{path}." for path in saved)
        if both := next((path for path in planned if f"{path}.".startswith(inside)), None):
            raise _targeted(name, both)
    indices = options.get("trainable_token_indices")
    embeddings = [site.path for site in _token_sites(model_map)]
    for name in indices if isinstance(indices, Mapping) else ():
        if not any(ends_with(path, name) for path in embeddings):
            raise _no_module("trainable_token_indices", name, embeddings, model_map)


@dataclass(frozen=True)
class ParameterSizes:
    """Elements of a model's parameters.

    Attributes:
        by_path: elements of each parameter.
        repeated: paths of parameters that are also listed under another path.
    """

    by_path: Mapping[str, int]
    repeated: frozenset[str] = frozenset()


def extra_params(model_map: ModelMap, config: PeftConfig, planned: Iterable[str], sizes: ParameterSizes) -> int:
    """Return the elements that ``config`` trains besides the adapters.

    Args:
        planned: paths of the planned sites, whose own biases are counted with the adapters.
        sizes: from ``parameter_sizes``.
    """
    names = getattr(config, "modules_to_save", None) or ()
    saved = [path for name in names for path in saved_modules(model_map, name)]
    whole = tuple(f"{path}." for path in saved)
    in_saved = sum(size for name, size in sizes.by_path.items() if name.startswith(whole))
    return in_saved + _tokens(model_map, config) + _biases(config, [*planned, *saved], sizes)


def parameter_sizes(model_map: ModelMap, model: Any) -> ParameterSizes:
    """Return the elements of each parameter: of all from a live module, of the sites from a map alone.

    A map holds no sizes of norms: what ``modules_to_save`` and ``bias="all"`` train there is counted only
    where the plan is made for the model itself.
    """
    if hasattr(model, "named_parameters"):
        sizes = {name: logical_size(p) for name, p in model.named_parameters(remove_duplicate=False)}
        return ParameterSizes(sizes, frozenset(sizes) - {name for name, _ in model.named_parameters()})
    known: dict[str, int] = {}
    for slot in slots_of(model_map, model_map):
        weight = slot.path if slot.kind == "parameter" else f"{slot.path}.weight"
        known |= {weight: prod(slot.shape), f"{slot.path}.bias": slot.outputs}
    present = set(model_map.parameter_paths)
    return ParameterSizes({path: size for path, size in known.items() if path in present})


def saved_modules(model_map: ModelMap, name: str) -> list[str]:
    """Return the modules that PEFT saves for a name: it looks at how a path ends, dots or not.

    Source: ``peft.utils.other._set_trainable``.
    """
    return [path for path in model_map.module_paths if path.endswith(name)]


def _token_sites(model_map: ModelMap) -> list[Site]:
    """Return the sites whose rows belong to tokens."""
    return [site for site in model_map if site.kind == "embedding" or site.role == "lm_head"]


def _tokens(model_map: ModelMap, config: Any) -> int:
    indices = getattr(config, "trainable_token_indices", None)
    if not indices:
        return 0
    if isinstance(indices, Mapping):
        # The same rows of modules that share a weight are trained once.
        trained = {
            (min(site.path, *site.tied_to), *rows): len(rows) * site.shape[1]
            for name, rows in indices.items()
            for site in _token_sites(model_map)
            if ends_with(site.path, name)
        }
        return sum(trained.values())
    embeddings = [site for site in _token_sites(model_map) if site.kind == "embedding"]
    if not embeddings:
        return 0
    first = next((site for site in embeddings if site.tower == "language"), embeddings[0])
    return len(indices) * first.shape[1]


def _biases(config: Any, counted: Iterable[str], sizes: ParameterSizes) -> int:
    if getattr(config, "bias", "none") != "all":
        return 0
    own = tuple(f"{path}." for path in counted)
    others = (name for name in sizes.by_path if "bias" in name and not name.startswith(own))
    return sum(sizes.by_path[name] for name in others if name not in sizes.repeated)


def _targeted(name: str, path: str) -> PlanError:
    return PlanError(
        f"modules_to_save trains {name!r} whole, and the targets adapt it",
        where=path,
        why="PEFT puts no adapter on what it trains whole",
        help="leave it out of the targets, or out of modules_to_save",
        code="modules-to-save-targeted",
    )


def _no_module(option: str, name: str, paths: Iterable[str], model_map: ModelMap) -> PlanError:
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return PlanError(
        f"{option} name {name!r} matches nothing in this model",
        where=model_map.model.name,
        why="PEFT would train nothing there",
        help=suggest(name.rpartition(".")[2], leaves, 3) or "graft survey lists every name",
        code=f"{'modules-to-save' if option == 'modules_to_save' else 'token-indices'}-unmatched",
    )
