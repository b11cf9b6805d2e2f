"""A twin in a folder that inference engines load: weights, configuration, tokenizer and processor files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.families import ServedTwin, family_of
from graftkit.files import atomic_folder, write_text
from graftkit.serving.twin_tokenizer import write_tokenizer
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.shrink import shrink
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MARKER = "config.json"
# csrc/cpu/cpu_attn.cpp of vLLM 0.32: "Unsupported CPU attention configuration" below.
_LEAST_HEAD = 32


def write_engine_twin(
    source: Any,
    folder: Path | str,
    *,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    engine: str | None = None,
) -> PreTrainedModel:
    """Write a twin of ``source`` as engines load it, and return the model that was written.

    The folder holds float32 safetensors under the names that released checkpoints use, the configuration with the
    values that engines read and transformers does not need (``families/``), a byte-fallback BPE tokenizer over the
    twin's vocabulary, the generation configuration, and processor files where a class asks for them.

    Args:
        source: what ``gk.twin`` takes: a model, a configuration, a path, a model type or a hub id.
        folder: the folder to write; one that was written for this purpose is replaced.
        seed: of the weights.
        overrides: configuration values the twin must have, over those of its family.
        engine: the engine that is to load it. Where it reads a family's weights only as it writes them itself,
            they are written like that, and transformers cannot load them.

    Returns:
        The live model: float32, in eval mode, on the CPU.

    Raises:
        SourceError: ``source`` names no model.
        BuildError: code ``twin``: no twin can be built.
        OutputError: the folder cannot be written, or holds something else.
    """
    config = _config(source)
    served = _served(config)
    wanted = _over(served.overrides, overrides or {})
    model = twin(source, seed=seed, overrides=_over(_head_size(shrink(config, wanted)), wanted))
    with atomic_folder(folder, marker=_MARKER) as target, quiet_transformers():
        model.save_pretrained(target)
        if engine is not None and engine in served.weights:
            _rewrite_weights(target, served.weights[engine])
        _write_config(model.config, target, served)
        write_tokenizer(model.config, target, served)
        for name, content in served.files.items():
            (target / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return model


def _rewrite_weights(folder: Path, change: Callable[..., Iterable[tuple[str, Any]]]) -> None:
    """Write each weight as an engine does; a twin's are all in one file."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    changed = (pair for name, tensor in load_file(file).items() for pair in change(name, tensor))
    save_file({name: tensor.contiguous() for name, tensor in changed}, file)


def _served(config: PretrainedConfig) -> ServedTwin:
    family = family_of(config.model_type)
    return family.served_twin if family else ServedTwin()


def _head_size(small: PretrainedConfig) -> dict[str, Any]:
    """Return what gives attention heads the least size that vLLM's CPU backend has an implementation for."""
    text = small.get_text_config()
    fields = text.to_dict()
    heads = fields.get("num_attention_heads")
    size = fields.get("head_dim") or fields.get("hidden_size", 0) // (heads or 1)
    if not heads or size >= _LEAST_HEAD:
        return {}
    # Heads of a size of their own keep the width; others fill it.
    wider = {"head_dim": _LEAST_HEAD} if fields.get("head_dim") else {"hidden_size": heads * _LEAST_HEAD}
    inner = next((name for name in small.sub_configs if getattr(small, name, None) is text), None)
    return {inner: wider} if inner else wider


def _config(source: Any) -> Any:
    from transformers import PreTrainedModel

    return source.config if isinstance(source, PreTrainedModel) else load_config(source).config


def _write_config(config: PretrainedConfig, folder: Path, served: ServedTwin) -> None:
    """Write ``config.json`` with the fields that released checkpoints have and engines read, too.

    transformers 5 keeps what rotates in ``rope_parameters`` and renames a few fields (``attribute_map``); engines
    other than those that use transformers read ``rope_theta``, ``rope_scaling`` and the names as released.
    """
    path = folder / _MARKER
    written = json.loads(path.read_text(encoding="utf-8"))
    released = served.released(written) if served.released else {}
    write_text(path, json.dumps(_over(_as_released(written, config), released), indent=2, sort_keys=True) + "\n")


def _as_released(fields: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    names = {alias: fields[name] for alias, name in config.attribute_map.items() if name in fields}
    inner = {
        name: _as_released(fields[name], sub)
        for name in config.sub_configs
        if isinstance(fields.get(name), Mapping) and (sub := getattr(config, name, None)) is not None
    }
    return {**_rotation(fields.get("rope_parameters") or {}), **names, **fields, **inner}


def _rotation(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 called the parameters of the rotary embedding."""
    full, sliding = parameters.get("full_attention"), parameters.get("sliding_attention")
    if isinstance(full, Mapping) and isinstance(sliding, Mapping):
        return {"rope_theta": full["rope_theta"], "rope_local_base_freq": sliding["rope_theta"]}
    flat = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    is_plain = parameters.get("rope_type", "default") == "default"
    scaling = {name: value for name, value in parameters.items() if name not in flat}
    return flat if is_plain else {**flat, "rope_scaling": scaling}


def _over(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``extra``, mapping by mapping."""
    merged = dict(base)
    for name, value in extra.items():
        inner = merged.get(name)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            merged[name] = _over(inner, value)
        else:
            merged[name] = value
    return merged
