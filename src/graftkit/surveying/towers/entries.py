"""Where pixels, sound and text enter a model: the layers that take them in, and the modules called with them."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from graftkit.surveying.kinds import CONV, EMBEDDING, LINEAR
from graftkit.surveying.sites import UNKNOWN_TOWER
from graftkit.surveying.towers.modules import NORM, Layer, Modules, ancestors
from graftkit.surveying.towers.names import TOWER_OF_INPUT, modalities_named, tower_named

if TYPE_CHECKING:
    from torch import nn

_COLOURS = (3, 4)  # RGB, and RGB with transparency
_PATCH_CHANNELS = (3, 4, 6, 8)  # the same, of one frame or two
_FEWEST_TOKENS = 26  # a smaller table numbers something else


def find_entries(modules: Modules, claimed: Mapping[str, str]) -> dict[str, str]:
    """Return path -> tower of every module that takes a model's input in, outside the ``claimed`` paths.

    Pixels enter through a convolution in two or three dimensions of three or four channels, or a linear over
    patches of them; sound through a one-dimensional convolution of one channel, or of a width that no layer gives
    out, that shortens its sequence; text through an embedding that is an output layer's counterpart or what the
    model names as its input embeddings. A module whose forward takes one modality first serves that modality.

    Args:
        claimed: path -> tower. Beside a claimed language tower, other embeddings count positions or the like.
    """
    free = [path for path in modules.by_path if path and not claimed.keys() & {path, *ancestors(path)}]
    layers = [modules.layers[path] for path in free if path in modules.layers]
    found = {layer.path: tower for layer in layers if (tower := _of_layer(modules, layer)) is not None}
    found |= {path: tower for path in free if (tower := _called_with(modules, path)) is not None}
    tables = [layer for layer in layers if layer.kind == EMBEDDING]
    vocabularies = [layer.path for layer in tables if _is_vocabulary(modules, layer)]
    found |= dict.fromkeys(vocabularies, "language")
    if not vocabularies and "language" not in claimed.values():
        found |= {layer.path: _of_table(modules, layer, found) for layer in tables if layer.path not in found}
    return {path: tower for path, tower in found.items() if tower}


# ---- pixels and sound ----


def _of_layer(modules: Modules, layer: Layer) -> str | None:
    module = layer.module
    if layer.kind == LINEAR:
        return "vision" if _takes_patches(modules, layer) else None
    if layer.kind != CONV or module.groups != 1:
        return None
    if len(module.kernel_size) > 1:
        if layer.into in _COLOURS or (layer.into == 1 and len(module.kernel_size) == 3):
            return "vision"
        return _by_name(modules, layer.path) if layer.into in (1, 2) else None  # grey pixels, or a spectrogram
    if layer.into not in (1, 2) and layer.into in modules.emitted:
        return None
    if _shortens(modules, layer.path):
        return "audio"
    return _by_name(modules, layer.path) if layer.into == 1 else None


def _shortens(modules: Modules, path: str) -> bool:
    """Check whether the convolution, or one beside it or beside its parent, moves by several steps."""
    around = [at for at in ancestors(path) if at][:2]
    near = [modules.layers[path], *(layer for at in around for layer in modules.inside(at))]
    return any(len(m.stride) == 1 and m.stride[0] > 1 for m in (x.module for x in near if x.kind == CONV))


def _takes_patches(modules: Modules, layer: Layer) -> bool:
    """Check for a linear over patch_size² pixels, of one image or of two frames, that nothing comes before."""
    for at in ancestors(layer.path):
        if (size := _patch_size(modules.by_path[at])) is not None:
            channels, rest = divmod(layer.into or 0, size * size)
            first = modules.inside(at)[0] is layer
            return not rest and channels in _PATCH_CHANNELS and (first or layer.into not in modules.emitted)
    return False


def _patch_size(module: Any) -> int | None:
    """Return the patch size that a module has, or a transformers model's configuration."""
    owners = (module, module.config) if hasattr(module, "base_model") else (module,)
    sizes = (getattr(owner, "patch_size", None) for owner in owners)
    last = (size[-1] if isinstance(size, list | tuple) and size else size for size in sizes)
    return next((size for size in last if isinstance(size, int) and size > 1), None)


def _by_name(modules: Modules, path: str) -> str:
    """Return whether the names around a layer say that it takes pixels or sound, else "unknown"."""
    for at in (path, *ancestors(path)):
        named = modalities_named(modules.arguments(at)) - {"language"}
        words = (at.rpartition(".")[2], type(modules.by_path[at]).__name__)
        tower = next(iter(named)) if len(named) == 1 else tower_named(*words)
        if tower in {"vision", "audio"}:
            return str(tower)
    return UNKNOWN_TOWER


# ---- text ----


def _is_vocabulary(modules: Modules, table: Layer) -> bool:
    """Check whether an embedding's rows are tokens: an output layer has them too, or the model says so."""
    module = table.module
    if any(_input_embeddings(modules.by_path[at]) is module for at in ancestors(table.path)):
        return True
    called = next(
        (named for at in ancestors(table.path) if (named := modalities_named(modules.arguments(at)))), None
    )
    if called == frozenset(("language",)):
        return True
    rows = module.num_embeddings
    if rows < _FEWEST_TOKENS:
        return False
    outputs = [layer for layer in modules.layers.values() if layer.kind == LINEAR and layer.out == rows]
    if any(getattr(layer.module, "weight", None) is module.weight for layer in outputs):
        return True
    taken = any(layer.into == rows for layer in modules.layers.values())
    return not taken and [layer.into for layer in outputs] == [table.out]


def _input_embeddings(module: Any) -> nn.Module | None:
    if not hasattr(module, "get_input_embeddings"):
        return None
    try:
        found = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None  # transformers looks for usual names alone
    inner: nn.Module = getattr(found, "base_layer", found)
    return inner


def _of_table(modules: Modules, table: Layer, found: dict[str, str]) -> str:
    """Return the tower of an embedding whose rows nothing proves to be tokens; "" where it is not an entry."""
    if not found:
        return "language"
    parent = table.path.rpartition(".")[0]
    beside = any(path.rpartition(".")[0] == parent for path in found)
    if beside or _counts_positions(table):
        return ""
    named = frozenset().union(*(modalities_named(modules.arguments(at)) for at in ancestors(table.path)))
    return "language" if "language" in named else UNKNOWN_TOWER


def _counts_positions(table: Layer) -> bool:
    """Check whether an embedding has a row for each patch of a square picture, with or without one for all."""
    rows: int = table.module.num_embeddings
    return any(isqrt(rows - more) ** 2 == rows - more for more in (0, 1))


def _called_with(modules: Modules, path: str) -> str | None:
    """Return the tower whose input a module's forward takes first, where it takes no other's."""
    arguments = list(modules.arguments(path))
    first = TOWER_OF_INPUT.get(arguments[0]) if arguments else None
    if first is None or modalities_named(arguments) != {first}:
        return None
    # Positions may be counted along a picture that is only measured.
    tables = {EMBEDDING, NORM} if first != "language" else set()
    return first if any(layer.kind not in tables for layer in modules.inside(path)) else None
