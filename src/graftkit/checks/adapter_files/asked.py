"""What a saved adapter asks of the engine that is to serve it: by its files, its base and its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftkit.checks.adapter_files.base_fit import BaseFit
from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.engines import Feature, Model
from graftkit.engines.base import OTHER_MODALITIES
from graftkit.merging.unsupported import changes_no_weights
from graftkit.planning.initializers import initializer_of

# The roles of linears that make an attention's values.
_VALUES = frozenset({"attention.v", "attention.qkv", "attention.kv"})
# Roles that are judged as features of the adapter, module by module.
_OUTSIDE = frozenset({"embedding", "lm_head"})
_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")
_FP8 = "F8_"

# Field of the configuration -> the feature that it asks for, where it is set. Source: peft.LoraConfig.
_FIELDS: Mapping[str, Feature] = {
    "use_dora": Feature.DORA,
    "alora_invocation_tokens": Feature.ALORA,
    "trainable_token_indices": Feature.TRAINABLE_TOKENS,
    "layer_replication": Feature.REPLICATION,
    "use_bdlora": Feature.BLOCK_DIAGONAL,
    "use_qalora": Feature.QALORA,
    # These change what a layer computes, in ways that nobody looked at in an engine.
    "velora_config": Feature.VARIANT,
    "monteclora_config": Feature.VARIANT,
    "kasa_config": Feature.VARIANT,
    "arrow_config": Feature.VARIANT,
}
_TENSORS: Mapping[str, Feature] = {
    "lora_magnitude_vector": Feature.DORA,
    "trainable_tokens_delta": Feature.TRAINABLE_TOKENS,
}


@dataclass(frozen=True)
class Asked:
    """One feature that an adapter asks for.

    Attributes:
        feature: the feature.
        at: the field, the tensor or the module that shows it.
        name: the last part of the module's name, or what else tells facts on one feature apart.
    """

    feature: Feature
    at: str
    name: str | None = None


def model_of(fit: BaseFit | None) -> Model:
    """Return what an engine's facts by architecture are looked up by."""
    return Model() if fit is None else Model(fit.base.model.cls, fit.base.model.model_type)


def asked_by_files(saved: SavedAdapter, fit: BaseFit | None) -> tuple[Asked, ...]:
    """Return what an adapter's files ask for; with a base also what its class and its precision ask."""
    if saved.file.peft_type != "LORA":
        method = Feature.NO_WEIGHTS if changes_no_weights(saved.file.peft_type) else Feature.OTHER_METHOD
        return (Asked(method, saved.file.peft_type),)
    found = [Asked(Feature.PEFT_FILES, saved.file.peft_type)]
    found += [Asked(feature, name) for name, feature in _FIELDS.items() if saved.file.config.get(name)]
    found += [Asked(f, tensor) for part, f in _TENSORS.items() if (tensor := _first(saved, part)) is not None]
    found += [*_of_biases(saved), *_of_initializer(saved), *_of_whole_modules(saved), *_of_targets(saved)]
    found += _outside_layers(saved, fit)
    if fit is not None:
        found += _of_base(saved, fit)
    return tuple(found)


def _first(saved: SavedAdapter, part: str) -> str | None:
    return next((name for name in saved.file.tensors if part in name), None)


def _of_biases(saved: SavedAdapter) -> Iterator[Asked]:
    config = saved.file.config
    tensor = next((name for name in saved.file.tensors if name.endswith(".bias")), None)
    if tensor is not None or config.get("lora_bias"):
        yield Asked(Feature.BIAS, tensor or "lora_bias")
    elif config.get("bias") not in (None, "none"):
        yield Asked(Feature.EMPTY_BIAS, "bias")


def _of_initializer(saved: SavedAdapter) -> Iterator[Asked]:
    given = saved.file.config.get("init_lora_weights")
    row = initializer_of(given)
    if row is not None and row.moves_base:
        yield Asked(Feature.MOVED_BASE, str(given), row.name)


def _of_whole_modules(saved: SavedAdapter) -> Iterator[Asked]:
    for name in saved.file.config.get("modules_to_save") or ():
        leaf = str(name).rpartition(".")[2]
        stored = [t for t in saved.file.tensors if f".{leaf}." in t]
        norm = stored and all("_layernorm" in t or ".norm" in t for t in stored)
        yield Asked(Feature.TRAINED_NORMS if norm else Feature.MODULES_TO_SAVE, str(name), leaf)


def _of_targets(saved: SavedAdapter) -> Iterator[Asked]:
    if isinstance(saved.targets, str):
        yield Asked(Feature.REGEX_TARGETS, saved.targets)


def _outside_layers(saved: SavedAdapter, fit: BaseFit | None) -> Iterator[Asked]:
    """Find LoRA on embeddings and output layers. Without a base, tensors and usual names tell."""
    for core, tensors in saved.modules.items():
        leaf = core.rpartition(".")[2]
        site = None if fit is None else fit.sites.get(core)
        tied = site is not None and bool(site.tied_to)
        if any("lora_embedding_" in tensor for tensor in tensors):
            yield Asked(Feature.TIED_EMBEDDING if tied else Feature.EMBEDDING, core, leaf)
        elif site.role == "lm_head" if site is not None else fit is None and leaf == "lm_head":
            yield Asked(Feature.TIED_HEAD if tied else Feature.LM_HEAD, core, leaf)


def _of_base(saved: SavedAdapter, fit: BaseFit) -> Iterator[Asked]:
    yield Asked(Feature.MODEL_CLASS, fit.base.model.cls)
    stored = fit.base.checkpoint
    if stored is None or not any(dtype.startswith(_FP8) for dtype, _ in stored.dtypes):
        return
    experts = [core for core in saved.modules if _holds_experts(core, fit)]
    yield Asked(Feature.FP8_EXPERTS, experts[0]) if experts else Asked(Feature.FP8_BASE, fit.base.model.name)


def _holds_experts(core: str, fit: BaseFit) -> bool:
    """Check whether a module is one expert, or holds stacked ones. A router is a parameter, too, and no expert."""
    site = fit.sites.get(core)
    if site is not None:
        return site.role == "expert"
    return any(inner.role == "expert" for inner in _parameters_of(core, fit))


def _parameters_of(core: str, fit: BaseFit) -> Iterator[Any]:
    return (site for site in fit.base if site.kind == "parameter" and site.path.rpartition(".")[0] == core)


def asked_by_modules(fit: BaseFit) -> tuple[Asked, ...]:
    """Return what the adapted modules ask for: each one feature at least, but for embeddings and output layers."""
    found = [asked for core in fit.saved.modules for asked in _of_module(core, fit)]
    return (*found, *(Asked(Feature.NO_VALUE, core, "q_proj") for core in _queries_without_values(fit)))


def _of_module(core: str, fit: BaseFit) -> Iterator[Asked]:
    site, leaf = fit.sites.get(core), core.rpartition(".")[2]
    if site is None:
        yield Asked(_of_holder(core, fit), core, leaf)
    elif site.path != core:
        yield Asked(Feature.INNER_NAMES, core, leaf)
    elif site.tower in OTHER_MODALITIES:
        yield Asked(Feature.TOWERS, core, leaf)
    elif site.role not in _OUTSIDE:
        yield Asked(Feature.ROUTER if site.role == "router" else Feature.LINEAR, core, leaf)
        if not _LAYER.search(core):
            yield Asked(Feature.NO_LAYER, core, leaf)


def _of_holder(core: str, fit: BaseFit) -> Feature:
    if not fit.holds_parameters(core):
        return Feature.OTHER_PREFIX
    return Feature.STACKED_EXPERTS if _holds_experts(core, fit) else Feature.ROUTER


def _queries_without_values(fit: BaseFit) -> list[str]:
    """Return the adapted query projections whose layer has no adapter on its values."""
    layers: dict[str, dict[str, str]] = {}
    for module in fit.saved.modules:
        site = fit.sites.get(module)
        if site is not None and site.tower not in OTHER_MODALITIES:
            layers.setdefault(module.rpartition(".")[0], {})[site.role] = module
    return [
        query
        for roles in layers.values()
        if (query := roles.get("attention.q")) is not None
        and not _VALUES.intersection(roles)
        and sibling(query, "q", "v") not in fit.saved.modules
    ]


def sibling(path: str, role: str, other: str) -> str | None:
    """Return the projection of another role in the same layer ("k_proj" -> "v_proj"), None for other names."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{other}{leaf.removeprefix(role)}" if leaf.startswith(f"{role}_") else None
