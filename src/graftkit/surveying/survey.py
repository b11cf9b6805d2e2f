"""The survey itself: one walk over the modules, on the meta device where only a configuration is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftkit.families import Family, family_of
from graftkit.surveying import kinds
from graftkit.surveying.checkpoint.comparison import compare
from graftkit.surveying.checkpoint.headers import read_headers
from graftkit.surveying.checkpoint.keys import checkpoint_keys
from graftkit.surveying.notes import with_notes
from graftkit.surveying.obstacles import objection
from graftkit.surveying.quantized import features_of, logical_size, quantization_of
from graftkit.surveying.roles import role_of
from graftkit.surveying.sites import ModelInfo, ModelMap, Obstacle, Site, Tower, Wrapper
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import LoadedConfig, load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.ties import tied_names
from graftkit.surveying.towers import fed_towers, models_inside, tower_finder
from graftkit.surveying.wrappers import wrappers_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# The configuration fields that count stacked experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def survey(
    source: Any, *, trust_remote_code: bool = False, revision: str | None = None, headers: bool = False
) -> ModelMap:
    """Map every place an adapter can go in a model, without its weights.

    Args:
        source: a live ``nn.Module`` (adapters it already carries are looked through), a
            ``PretrainedConfig``, a ``config.json`` or a directory with one, a transformers model type, or a
            hub id.
        trust_remote_code: let the model's own code from the hub or directory run.
        revision: branch, tag or commit of a hub id.
        headers: also read the weight files' safetensors headers, never the weights, and say in
            ``ModelMap.checkpoint`` which keys the class does not know and which it misses.

    Raises:
        SourceError: the source names no model, or no weight files where headers are asked for.
        BuildError: its configuration cannot be built.
    """
    from torch import nn

    if isinstance(source, nn.Module):
        model = _without_adapters(source)
        return _map(model, type(model).__name__, "live model")
    loaded = load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    model = _described(loaded)
    found = _map(model, loaded.name, loaded.origin)
    if headers:
        found = replace(found, checkpoint=compare(model, read_headers(source, revision=revision)))
    return found


def survey_loaded(loaded: LoadedConfig) -> ModelMap:
    """The map of a model whose configuration has been read already.

    Raises:
        SourceError: ``remote-code-failed``.
        BuildError: it cannot be built.
    """
    return _map(_described(loaded), loaded.name, loaded.origin)


def _described(loaded: LoadedConfig) -> PreTrainedModel:
    return build_on_meta(loaded.config, model_class_of(loaded))


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model itself, or a copy of its modules without PEFT's layers that shares every tensor with it."""
    import copy

    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    added = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if not any(isinstance(module, added) for module in base.modules()):
        return base  # type: ignore[no-any-return]
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    plain = copy.deepcopy(base, shared)
    # All found before the first is replaced: where one wraps another, as around experts, the outer one counts.
    outer = [
        (path, module)
        for path, module in plain.named_modules()
        if isinstance(module, added) and not _inside_added(plain, path, added)
    ]
    for path, module in outer:
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, _original(module))
    return plain  # type: ignore[no-any-return]


def _inside_added(model: nn.Module, path: str, added: tuple[type, ...]) -> bool:
    parents = path.split(".")[:-1]
    return any(isinstance(model.get_submodule(".".join(parents[:n])), added) for n in range(1, len(parents) + 1))


def _original(module: Any) -> Any:
    """What PEFT put ``module`` in the place of, however deep it is wrapped."""
    while True:
        inner = getattr(module, "base_layer", getattr(module, "original_module", None))
        if inner is None:
            return module
        module = inner


def _map(model: nn.Module, name: str, origin: str) -> ModelMap:
    scene = _Scene.of(model)
    sites = tuple(_sites(scene))
    names = {site.path: _weight_name(site) for site in sites}
    keys = checkpoint_keys(model, [n for n in names.values() if n in scene.parameters])
    tied = _ties(model, names)
    sites = tuple(
        replace(s, checkpoint_keys=keys.get(names[s.path], ()), tied_to=tied.get(s.path, ())) for s in sites
    )
    return ModelMap(
        model=_info(model, name, origin),
        towers=_towers(scene, sites),
        sites=with_notes(sites),
        module_paths=tuple(path for path in scene.modules if path),
        parameter_paths=tuple(scene.parameters),
    )


@dataclass(frozen=True)
class _Scene:
    """What every step of one walk reads, gathered once."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    kind_at: dict[str, str]
    wrappers: dict[str, tuple[str, str]]
    tower_of: Any
    family_at: dict[str, Family | None]
    outputs: tuple[nn.Module | None, ...]
    expert_counts: frozenset[int]
    state_spaces: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> _Scene:
        modules = dict(model.named_modules())
        kind_at = {p: k for p, m in modules.items() if p and (k := kinds.kind_of(m)) is not None}
        kind_at = {p: k for p, k in kind_at.items() if kind_at.get(p.rpartition(".")[0]) != kinds.MULTIHEAD}
        linears = frozenset(p for p, k in kind_at.items() if k in {kinds.LINEAR, kinds.TRANSPOSED})
        inner = [held for _, held in models_inside(model)]
        return cls(
            modules=modules,
            parameters=dict(model.named_parameters(remove_duplicate=False)),
            kind_at=kind_at,
            wrappers=wrappers_of(model, linears),
            tower_of=tower_finder(model),
            family_at=_families(modules),
            outputs=tuple(held.get_output_embeddings() for held in inner),
            expert_counts=frozenset(_expert_counts(modules)),
            state_spaces=frozenset(path for path, module in modules.items() if _is_state_space(module)),
        )


def _is_state_space(module: nn.Module) -> bool:
    """A mixer that keeps a decaying state: it owns a decay (A, or its logarithm) or a step size's bias."""
    return not {"A_log", "dt_bias"}.isdisjoint(name for name, _ in module.named_parameters(recurse=False))


def _families(modules: dict[str, nn.Module]) -> dict[str, Family | None]:
    """Path of every sub-model -> its family, so that a tower brings its own facts into any composite."""
    types = {p: getattr(getattr(m, "config", None), "model_type", None) for p, m in modules.items()}
    return {path: family_of(model_type) for path, model_type in types.items() if model_type}


def _expert_counts(modules: dict[str, nn.Module]) -> Iterator[int]:
    for config in {id(c): c for m in modules.values() if (c := getattr(m, "config", None)) is not None}.values():
        for field in _EXPERT_COUNTS:
            count = getattr(config, field, None)
            if isinstance(count, int) and count > 1:
                yield count


def _sites(scene: _Scene) -> Iterator[Site]:
    for path, module in scene.modules.items():
        if path in scene.kind_at:
            yield _module_site(scene, path, module)
        elif path and not _inside_site(scene, path):
            yield from _parameter_sites(scene, path, module)


def _inside_site(scene: _Scene, path: str) -> bool:
    return path.rpartition(".")[0] in scene.kind_at


def _module_site(scene: _Scene, path: str, module: Any) -> Site:
    kind = scene.kind_at[path]
    wrapper = Wrapper(*scene.wrappers[path]) if path in scene.wrappers else None
    site = Site(path, scene.tower_of(path), "other", kind, _shape(module, kind), wrapper=wrapper)
    mixer = path.rpartition(".")[0] in scene.state_spaces
    role = (
        "lm_head"
        if any(module is head for head in scene.outputs)
        else role_of(site.names, kind, in_state_space=mixer)
    )
    return replace(
        site,
        role=role,
        objection=objection(path, module, kind, _family_above(scene, path)),
        quantized=quantization_of(module),
        groups=module.groups if kind == kinds.CONV else 1,
    )


def _shape(module: Any, kind: str) -> tuple[int, ...]:
    """The weight's logical shape: a 4-bit weight is stored packed, so linears report their features."""
    if kind == kinds.LINEAR and (features := features_of(module)) is not None:
        return features
    if kind == kinds.MULTIHEAD:
        return (3 * module.embed_dim, module.embed_dim)
    return tuple(module.weight.shape)


def _parameter_sites(scene: _Scene, path: str, module: nn.Module) -> Iterator[Site]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2 or name.endswith("bias"):
            continue
        role = _parameter_role(scene, path, module, parameter)
        against = Obstacle.LOOSE_PARAMETER.because() if role == "other" else None
        yield Site(f"{path}.{name}", scene.tower_of(path), role, kinds.PARAMETER, tuple(parameter.shape), against)


def _parameter_role(scene: _Scene, path: str, module: nn.Module, parameter: nn.Parameter) -> str:
    """What a bare parameter is: experts are stacked in three dimensions, a router has a row for each of them."""
    words = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    counted = parameter.shape[0] in scene.expert_counts
    if parameter.ndim == 3 and (counted or "expert" in words):
        return "expert"
    if parameter.ndim == 2 and counted and ("router" in words or "gate" in words):
        return "router"
    return "other"


def _family_above(scene: _Scene, path: str) -> Family | None:
    while path:
        path = path.rpartition(".")[0]
        if scene.family_at.get(path) is not None:
            return scene.family_at[path]
    return None


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


def _towers(scene: _Scene, sites: tuple[Site, ...]) -> tuple[Tower, ...]:
    params: Counter[str] = Counter()
    seen: set[int] = set()
    for name, parameter in scene.parameters.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            params[scene.tower_of(name.rpartition(".")[0])] += logical_size(parameter)
    counts = Counter(site.tower for site in sites)
    return tuple(Tower(name, counts[name], params[name]) for name in counts | params)


def _info(model: nn.Module, name: str, origin: str) -> ModelInfo:
    config = getattr(model, "config", None)
    taken = getattr(model, "input_modalities", None) or ()
    return ModelInfo(
        name=name,
        cls=type(model).__name__,
        model_type=getattr(config, "model_type", None),
        origin=origin,
        params=sum(logical_size(p) for p in model.parameters()),
        task_type=_task_type(model),
        modalities=(taken,) if isinstance(taken, str) else tuple(taken),
        fed_towers=fed_towers(model),
    )


def _task_type(model: Any) -> str | None:
    """The PEFT task type whose wrapper passes this class's inputs through unchanged, or None for the plain one."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model, "main_input_name", "") != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
