"""The survey: from a live model, or from a configuration that is built on the meta device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.surveying import kinds
from graftkit.surveying.checkpoint.comparison import compare
from graftkit.surveying.checkpoint.headers import read_headers
from graftkit.surveying.checkpoint.keys import checkpoint_keys
from graftkit.surveying.checkpoint.local_weights import local_checkpoint
from graftkit.surveying.faults import find_faults
from graftkit.surveying.find_sites import find_sites
from graftkit.surveying.quantized import logical_size
from graftkit.surveying.sites import Architecture, ModelInfo, ModelMap, Site, Tower
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import LoadedConfig, load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.structure import ModelStructure
from graftkit.surveying.ties import tied_names
from graftkit.surveying.towers.declared import fed_towers, modalities_taken
from graftkit.surveying.without_adapters import without_adapters

if TYPE_CHECKING:
    from torch import nn


def survey(
    source: Any, *, trust_remote_code: bool = False, revision: str | None = None, headers: bool = False
) -> ModelMap:
    """Map every place an adapter can go in a model, without its weights.

    Args:
        source: a live ``nn.Module`` (its adapters are ignored), a ``PretrainedConfig``, a ``config.json`` or a
            directory with one, a transformers model type, a hub id, or what ``load_config`` returned.
        trust_remote_code: let the model's own code from the hub or directory run.
        revision: branch, tag or commit of a hub id.
        headers: fetch the safetensors headers of a hub's weight files, never the weights, to compare them with
            the class (``ModelMap.checkpoint``). Those of files on this machine are always read.

    Raises:
        SourceError: the source names no model, or no weight files where headers are asked for.
        BuildError: its configuration cannot be built.
    """
    if is_live(source):
        model = without_adapters(source)
        return _map(model, type(model).__name__, "live model")
    loaded = source
    if not isinstance(source, LoadedConfig):
        loaded = load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    model = build_on_meta(loaded.config, model_class_of(loaded))
    found = _map(model, loaded.name, loaded.origin)
    if headers:
        return replace(found, checkpoint=compare(model, read_headers(loaded.name, revision=revision)))
    return replace(found, checkpoint=local_checkpoint(loaded, model))


def is_live(source: Any) -> bool:
    """Check whether a source is a model itself, without importing torch for a name."""
    if isinstance(source, (str, Path, LoadedConfig)):
        return False
    from torch import nn

    return isinstance(source, nn.Module)


def _map(model: nn.Module, name: str, origin: str) -> ModelMap:
    structure = ModelStructure.of(model)
    sites = find_sites(structure)
    names = {site.path: _weight_name(site) for site in sites}
    keys = checkpoint_keys(model, [n for n in names.values() if n in structure.parameters])
    tied = _ties(model, names)
    sites = tuple(
        replace(s, checkpoint_keys=keys.get(names[s.path], ()), tied_to=tied.get(s.path, ())) for s in sites
    )
    return ModelMap(
        model=_info(model, name, origin),
        towers=_towers(structure, sites),
        sites=sites,
        module_paths=tuple(path for path in structure.modules if path),
        parameter_paths=tuple(structure.parameters),
        architecture=_architecture(model),
        faults=find_faults(model, sites),
    )


def _architecture(model: nn.Module) -> Architecture | None:
    from transformers import PreTrainedModel

    return Architecture(type(model), model.config) if isinstance(model, PreTrainedModel) else None


def _weight_name(site: Site) -> str:
    if site.kind == kinds.PARAMETER:
        return site.path
    suffix = "in_proj_weight" if site.kind == kinds.MULTIHEAD else "weight"
    return f"{site.path}.{suffix}"


def _ties(model: nn.Module, weights: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return, by site, the other places of its weight: other sites, or a second path of the same module."""
    site_of = {name: path for path, name in weights.items()}
    return {
        site_of[name]: tuple(site_of.get(n, n.rpartition(".")[0]) for n in names if n != name)
        for names in tied_names(model)
        for name in names
        if name in site_of
    }


def _towers(structure: ModelStructure, sites: tuple[Site, ...]) -> tuple[Tower, ...]:
    params: Counter[str] = Counter()
    seen: set[int] = set()
    for name, parameter in structure.parameters.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            params[structure.tower_of(name.rpartition(".")[0])] += logical_size(parameter)
    counts = Counter(site.tower for site in sites)
    return tuple(Tower(name, counts[name], params[name]) for name in counts | params)


def _info(model: nn.Module, name: str, origin: str) -> ModelInfo:
    config = getattr(model, "config", None)
    return ModelInfo(
        name=name,
        cls=type(model).__name__,
        model_type=getattr(config, "model_type", None),
        origin=origin,
        params=sum(logical_size(p) for p in model.parameters()),
        task_type=_task_type(model),
        modalities=modalities_taken(model),
        fed_towers=fed_towers(model),
    )


def _task_type(model: Any) -> str | None:
    """Return the PEFT task type whose wrapper passes this class's inputs on unchanged, None for the plain one."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model, "main_input_name", "") != "input_ids":
        return None
    if not hasattr(model, "prepare_inputs_for_generation"):  # PEFT's wrappers for generation ask for it
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
