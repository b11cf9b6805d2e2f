"""What a transformers model says of its towers: in its sub-configurations, its getters and its classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graftkit.surveying.sites import UNKNOWN_TOWER

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

# What a sub-configuration's key or model type says about its modality; the first that occurs wins.
_MODALITY_WORDS = (
    ("audio", ("audio", "speech", "sound", "codec", "mimi", "whisper")),
    ("vision", ("vision", "visual", "image", "video", "vit")),
    ("language", ("text", "language", "llm", "thinker", "talker", "llama", "qwen", "mistral")),
    ("projector", ("qformer", "projector", "connector", "perceiver", "resampler", "adapter")),
)
MODALITY_OF_INPUT = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}
_TOWER_OF_MODALITY = {"text": "language", "image": "vision", "video": "vision", "audio": "audio"}


def fed_towers(model: nn.Module) -> tuple[str, ...]:
    """Return the towers that every batch feeds, since they take the main input of the model or of one it holds."""
    inputs = (name for _, inner in models_inside(model) for name in main_inputs(inner))
    modalities = (MODALITY_OF_INPUT[name] for name in inputs if name in MODALITY_OF_INPUT)
    return tuple(dict.fromkeys(_TOWER_OF_MODALITY[modality] for modality in modalities))


def main_inputs(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the inputs that a transformers class calls its main ones: several in OneFormer."""
    main = getattr(module, "main_input_name", "")
    return (main,) if isinstance(main, str) else tuple(main)


def modalities_taken(module: nn.Module) -> tuple[str, ...]:
    """Return the modalities that transformers' class says it takes: "text", "image", "audio", …"""
    taken = getattr(module, "input_modalities", None) or ()
    return (taken,) if isinstance(taken, str) else tuple(taken)


def models_inside(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """Return (path, model) of the outermost transformers models in ``model``: itself, or those that it holds."""
    from transformers import PreTrainedModel

    found: list[tuple[str, PreTrainedModel]] = []
    for path, module in model.named_modules():
        inside = any(not prefix or path.startswith(f"{prefix}.") for prefix, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((path, module))
    return found


def stated_towers(module: Any) -> tuple[str, ...]:
    """Return the towers of the modalities that a class says it takes: its main input's first, text last.

    What a class only inherits from ``PreTrainedModel`` says nothing: it is the same for every model.
    """
    from transformers import PreTrainedModel

    main = next((MODALITY_OF_INPUT[name] for name in main_inputs(module) if name in MODALITY_OF_INPUT), None)
    if getattr(module, "input_modalities", None) not in (None, PreTrainedModel.input_modalities):
        taken: tuple[str | None, ...] = modalities_taken(module)
    elif main not in (None, MODALITY_OF_INPUT[PreTrainedModel.main_input_name]):
        taken = (main,)
    else:
        return ()
    ordered = sorted(taken, key=lambda modality: (modality != main, modality == "text"))
    return tuple(dict.fromkeys(_TOWER_OF_MODALITY.get(m or "", UNKNOWN_TOWER) for m in ordered))


def declared_towers(model: nn.Module) -> dict[str, str | None]:
    """Return path -> tower of the modules that a transformers model says are towers, and of its heads.

    The tower is None where nothing says which one it is.
    """
    assigned: dict[str, str | None] = {}
    for source in (_from_sub_configs, _from_encoder_decoder, _from_heads):
        for path, tower in source(model):
            assigned.setdefault(path, tower)
    towers = frozenset(path for path, tower in assigned.items() if tower != "head")
    for path, tower in _from_sub_models(model, towers):
        assigned.setdefault(path, tower)
    return assigned


def _from_sub_configs(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    owners = dict(_sub_configs(getattr(model, "config", None)))
    if not owners:
        return
    root_config = id(model.config)
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if path and id(config) in owners and id(config) != root_config and hasattr(module, "base_model"):
            named = owners[id(config)]
            yield path, named if named != "other" else _main_tower(module)


def _sub_configs(config: PretrainedConfig | None) -> Iterator[tuple[int, str]]:
    """Yield (identity, tower) of every sub-configuration, nested ones included."""
    for key in getattr(config, "sub_configs", None) or ():
        sub = getattr(config, key, None)
        if sub is None:
            continue
        yield from _sub_configs(sub)
        yield id(sub), _tower_from_words(key, getattr(sub, "model_type", "") or "")


def _tower_from_words(key: str, model_type: str) -> str:
    for text in (key.lower(), model_type.lower()):
        for tower, words in _MODALITY_WORDS:
            if any(word in text for word in words):
                return tower
    return "other"


def _from_sub_models(model: nn.Module, towers: frozenset[str]) -> Iterator[tuple[str, str | None]]:
    """Yield complete sub-models beside assigned towers that share the root's configuration (a text decoder)."""
    from transformers import PreTrainedModel

    if not any("." not in path for path in towers):
        return
    for name, child in model.named_children():
        holds_tower = any(path.startswith(f"{name}.") for path in towers)
        if isinstance(child, PreTrainedModel) and name not in towers and not holds_tower:
            yield name, _main_tower(child)


def _from_encoder_decoder(model: Any) -> Iterator[tuple[str, str | None]]:
    """Yield the encoder and the decoder, which may differ in modality (speech to text, image to text)."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    paths = {id(module): path for path, module in model.named_modules()}
    for getter in ("get_encoder", "get_decoder"):
        module = getattr(model, getter)()
        path = paths.get(id(module), "")
        if path:
            yield path, _main_tower(module)


def _from_heads(model: Any) -> Iterator[tuple[str, str]]:
    paths = {id(module): path for path, module in model.named_modules()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None and id(output) in paths:
        yield paths[id(output)], "head"
    base = getattr(model, "base_model", None)
    if base is None or base is model:
        return
    for name, child in model.named_children():
        if child is not base and not any(module is base for module in child.modules()):
            yield name, "head"


def _main_tower(module: nn.Module) -> str | None:
    return next(iter(stated_towers(module)), None)
