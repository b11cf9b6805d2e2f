"""Fields of a configuration whose sizes depend on each other, apart from those of attention."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from graftkit.twins.sizes.field_sizes import (
    EMBEDDING_WIDTHS,
    EXPERTS,
    HEAD_DIM,
    HIDDEN,
    SMALL_INTERMEDIATE,
    TARGETS,
    TOP_K,
    VOCAB,
    WIDTHS,
    first_count,
    is_count,
)
from graftkit.twins.sizes.layers import is_index_list
from graftkit.twins.sizes.pictures import PATCHES_PER_SIDE

# Mamba's heads, and how wide each is.
_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("n_mamba_heads", "mamba_headdim"),
    ("mamba_num_heads", "mamba_head_dim"),
)
# Of the widths that a network with a scale lists, which are made for phones.
_SCALE = 0.25
# Names of widths; what comes before ``_size`` in the others is measured in pixels, samples or ids.
_WIDTH = re.compile(
    r"(_dim|_width|_channels?|(?<!image)(?<!patch)(?<!window)(?<!kernel)(?<!vocab)(?<!crop)_size)$"
)
# Names of how large the maps of features are that a backbone returns.
_FEATURE_MAPS = re.compile(r"feature_sizes$")
# How many patches of a side a tower merges into one.
_MERGES = ("spatial_merge_size", "merge_size")


def experts(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep top-k below the number of experts where it was, and one where it was one."""
    experts = first_count(own, EXPERTS)
    top_k = first_count(own, TOP_K)
    if experts is None or top_k is None or not own[top_k] < own[experts]:
        return {}
    return {top_k: min(new[top_k], max(1, new[experts] - 1))}


_NEVER_OPEN: Mapping[str, Any] = {"vocab_size": VOCAB, "prediction_length": 8}


def unset(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Set what a default configuration leaves open although its class cannot compute without it.

    A window where layers slide, how many experts a token goes to where there are experts, the size of a vocabulary
    and of a forecast, and that of a head, which is its share of the hidden size.
    """
    changed = {name: size for name, size in _NEVER_OPEN.items() if name in own and own[name] is None}
    if "sliding_attention" in (own.get("layer_types") or ()) and own.get("sliding_window", 0) is None:
        changed["sliding_window"] = TARGETS["sliding_window"]
    experts = first_count(own, EXPERTS)
    if experts is not None and first_count(own, TOP_K) is None:
        few = min(TARGETS["num_experts_per_tok"], max(1, new[experts] - 1))
        changed |= {name: few for name in TOP_K if name in own and own[name] is None}
    width, heads = first_count(new, WIDTHS), first_count(new, ("num_attention_heads", "num_heads"))
    if width and heads and own.get("head_dim", 0) is None:
        changed["head_dim"] = new[width] // new[heads]
    return changed


def merged_widths(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a width that is a tower's times the patches it merges into one: what follows the tower takes those.

    Args:
        own: the fields of a configuration and its parts.
        new: the same, shrunk.
    """
    changed: dict[str, Any] = {}
    towers = {name: part for name, part in own.items() if isinstance(part, Mapping)}
    for tower, part in towers.items():
        width, merge = first_count(part, WIDTHS), first_count(part, _MERGES)
        if width is None or merge is None or part[merge] == 1:
            continue
        patches = part[merge] ** 2
        wide = (
            name for name, value in own.items() if TARGETS.get(name) == HIDDEN and value == part[width] * patches
        )
        changed |= dict.fromkeys(wide, new[tower][width] * patches)
    return changed


def state_space(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep Mamba's heads x head size = inner width = expansion x hidden size, as the classes require."""
    factor, width = first_count(own, ("mamba_expand", "expand")), new.get("hidden_size")
    if factor is None or width is None:
        return {}
    inner, changed = int(own[factor] * width), {}
    if own.get("intermediate_size") == own[factor] * own["hidden_size"] and "state_size" in own:
        changed["intermediate_size"] = inner
    for heads, size in _STATE_HEADS:
        if is_count(own.get(heads)) and is_count(own.get(size)):
            changed[size] = min(own[size], HEAD_DIM)
            changed[heads] = inner // changed[size]
    if "state_size" in own and "chunk_size" in own:
        changed["chunk_size"] = min(own["chunk_size"], 8)
    return changed


def codebooks(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep codes as wide as the hidden size where they are, since these need no projection; others stay narrow."""
    width = own.get("hidden_size")
    return {
        name: new["hidden_size"] if own[name] == width else min(own[name], SMALL_INTERMEDIATE)
        for name in ("codebook_dim", "vector_quantization_hidden_dimension")
        if is_count(own.get(name)) and is_count(width)
    }


def as_wide(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Let other widths that equal the part's own follow it: nothing projects between them."""
    width = first_count(own, (*WIDTHS, "hidden_dim", "embed_dim"))
    if width is None or new[width] == own[width]:
        return {}
    others = (name for name in own if name not in TARGETS and _WIDTH.search(name))
    return {name: new[width] for name in others if is_count(own[name]) and own[name] == own[width]}


def embeddings(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep embeddings of another width than the layers so: what projects them is there only then."""
    width = first_count(own, WIDTHS)
    if width is None:
        return {}
    others = [name for name in EMBEDDING_WIDTHS if is_count(own.get(name)) and own[name] != own[width]]
    return {name: new[width] // 2 if own[name] < own[width] else 2 * new[width] for name in others}


def boxes(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the embeddings of a box's four coordinates and two sides, joined, as wide as the layers."""
    width, coordinate, side = first_count(own, WIDTHS), own.get("coordinate_size"), own.get("shape_size")
    if width is None or not is_count(coordinate) or not is_count(side) or 4 * coordinate + 2 * side != own[width]:
        return {}
    smaller: int = new[width] // 8
    return {"coordinate_size": smaller, "shape_size": (new[width] - 4 * smaller) // 2}


def positions(own: Mapping[str, Any], _new: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink a learned table of positions; a rotary model's length decides no shape and is kept."""
    length = own.get("max_position_embeddings")
    if not is_count(length) or own.get("rope_parameters"):
        return {}
    return {"max_position_embeddings": min(length, 4 * HIDDEN)}


def stages(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep two layers a stage, windows as large as the last one's picture, and widths that double at each."""
    depths = _depths(own)
    if not depths:
        return {}
    changed: dict[str, Any] = {"depths": [min(depth, 2) for depth in depths]}
    if is_count(window := own.get("window_size")):
        changed["window_size"] = min(window, PATCHES_PER_SIDE)
    first, last = first_count(own, ("embed_dim", "patch_embeds_hidden_size")), 2 ** (len(depths) - 1)
    if first is not None and own.get("hidden_size") == own[first] * last:
        changed["hidden_size"] = new.get(first, own[first]) * last
    return changed


def scaled_stages(own: Mapping[str, Any], _new: Mapping[str, Any]) -> dict[str, Any]:
    """Scale the stages of a network down whose widths and depths are multiples of listed ones, two blocks each."""
    scale, depth, repeats = (
        own.get(name) for name in ("width_coefficient", "depth_coefficient", "num_block_repeats")
    )
    if not _is_scale(scale) or not isinstance(repeats, list | tuple):
        return {}
    smaller = min(scale, _SCALE)
    changed: dict[str, Any] = {"width_coefficient": smaller, "num_block_repeats": [min(n, 2) for n in repeats]}
    if _is_scale(depth):
        changed["depth_coefficient"] = min(depth, 1.0)
    if is_count(own.get("hidden_dim")):
        changed["hidden_dim"] = int(own["hidden_dim"] * smaller / scale)
    return changed


def _is_scale(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and value > 0


def scaled_widths(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a width that is that of a part's last stage, which has a scale.

    Args, Returns: as :func:`merged_widths`.
    """
    changed: dict[str, Any] = {}
    for part, fields in own.items():
        widths = fields.get("out_channels") if isinstance(fields, Mapping) else None
        if isinstance(widths, list | tuple) and widths and _is_scale(fields.get("width_coefficient")):
            last = widths[-1] * fields["width_coefficient"]
            names = (name for name, value in own.items() if TARGETS.get(name) == HIDDEN and value == last)
            changed |= dict.fromkeys(names, int(widths[-1] * new[part]["width_coefficient"]))
    return changed


def listed_widths(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a width that is one of a list of widths, a stage each, which is kept as it is."""
    lists = (value for name, value in own.items() if isinstance(value, list) and name not in TARGETS)
    listed = {size for sizes in lists for size in sizes if is_count(size)}
    widths = (name for name, value in new.items() if TARGETS.get(name) == HIDDEN and is_count(value))
    return {name: own[name] for name in widths if own[name] > HIDDEN and own[name] in listed}


def image(own: Mapping[str, Any], _new: Mapping[str, Any]) -> dict[str, Any]:
    """Set an image of 4 x 4 patches, whatever the patch size is; in the last of stages that each halve them.

    Patches that overlap have a stride, and are merged by the stages that follow: of these there are 16 x 16.
    """
    size, patch = own.get("image_size"), own.get("patch_size")
    patches = PATCHES_PER_SIDE * 2 ** max(0, len(_depths(own)) - 1)
    if patch is None:
        patch, patches = own.get("patch_stride"), PATCHES_PER_SIDE**2
    if _is_pair(size) and _is_pair(patch):
        return {"image_size": [min(s, patches * p) for s, p in zip(size, patch, strict=True)]}
    if _is_pair(size) and is_count(patch):
        return {"image_size": [min(s, patches * patch * (s // min(size))) for s in size]}
    if not (is_count(size) and is_count(patch)):
        return {}
    new = min(size, patches * patch)
    in_patches = (n for n, v in own.items() if n.startswith("image_") and n not in TARGETS and v == size // patch)
    return {"image_size": new} | dict.fromkeys(in_patches, new // patch)


def _depths(own: Mapping[str, Any]) -> list[int]:
    depths = own.get("depths")
    return depths if isinstance(depths, list) and all(is_count(depth) for depth in depths) else []


def _is_pair(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(is_count(v) for v in value)


def tiles(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Set one tile an image, of the vision tower's own size, where images are cut into tiles."""
    vision = fields.get("vision_config")
    if not fields.get("image_grid_pinpoints") or not isinstance(vision, Mapping):
        return {}
    size = vision.get("image_size")
    return {"image_grid_pinpoints": [[size, size]]} if is_count(size) else {}


def feature_maps(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Scale the sizes of a backbone's feature maps with its image.

    Args:
        own: the fields of a configuration and its parts.
        new: the same, shrunk.
    """
    backbone, small = own.get("backbone_config"), new.get("backbone_config")
    if not isinstance(backbone, Mapping) or not isinstance(small, Mapping):
        return {}
    before, after = _side(backbone.get("image_size")), _side(small.get("image_size"))
    if before is None or after is None:
        return {}
    maps = {name: value for name, value in own.items() if _FEATURE_MAPS.search(name) and isinstance(value, list)}
    return {
        name: [[side * after // before for side in pair] for pair in pairs]
        for name, pairs in maps.items()
        if all(_is_pair(pair) for pair in pairs)
    }


def _side(size: Any) -> int | None:
    if _is_pair(size):
        return size[0]
    return size if is_count(size) else None


def as_wide_as_others(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Let widths of a part that equal another part's hidden size follow that: what they hold goes there.

    Args, Returns: as :func:`shared_heads`.
    """
    parts = dict(_parts(own))
    hidden = {path: part["hidden_size"] for path, part in parts.items() if is_count(part.get("hidden_size"))}
    changed: dict[str, Any] = {}
    for path, part in parts.items():
        others = {size: _at(new, other)["hidden_size"] for other, size in hidden.items() if other != path}
        for name, value in part.items():
            if name in (*TARGETS, "head_dim") or _at(new, path).get(name) != value:
                continue
            followed = _followed(name, value, others)
            if followed != value:
                _set_at(changed, path, {name: followed})
    return changed


def _followed(name: str, value: Any, others: Mapping[int, int]) -> Any:
    """Return a width, or a list of one a step, with what equals another part's replaced by that part's new one."""
    if name == "num_pos_feats" and is_count(value):  # features of a position: one half for each axis
        return others.get(2 * value, 2 * value) // 2
    if not _WIDTH.search(name):
        return value
    if isinstance(value, list | tuple) and all(is_count(size) for size in value):
        return [others.get(size, size) for size in value]
    return others.get(value, value) if is_count(value) else value


def joined_widths(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Set a width that is the sum of the model's own and a part's, or of two parts', where features are joined.

    Args:
        own: a configuration's fields and its parts' before, as ``to_dict`` gives them.
        new: the same in the twin.
    """
    parts = [(fields, new[name]) for name, fields in own.items() if isinstance(fields, Mapping) and name in new]
    widths = [
        (before["hidden_size"], after["hidden_size"])
        for before, after in ((own, new), *parts)
        if is_count(before.get("hidden_size"))
    ]
    joined: dict[str, Any] = {}
    for one, other in itertools.combinations(widths, 2):
        names = (n for n, v in own.items() if n not in TARGETS and _WIDTH.search(n) and v == one[0] + other[0])
        joined |= {name: one[1] + other[1] for name in names if name not in joined}
    return joined


def widths_of_listed_layers(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a width that holds the states of several listed layers, or of these and one more, side by side."""
    width = first_count(own, WIDTHS)
    if width is None:
        return {}
    changed: dict[str, Any] = {}
    for layers in (name for name, value in own.items() if is_index_list(name, value)):
        number, fewer = len(own[layers]), len(new.get(layers, own[layers]))
        for more in (0, 1) if number > 1 else ():
            wide = own[width] * (number + more)
            names = (n for n, v in own.items() if n not in TARGETS and _WIDTH.search(n) and v == wide)
            changed |= dict.fromkeys(names, new.get(width, own[width]) * (fewer + more))
    return changed


def shared_heads(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep heads of one size in parts that may read each other's keys and values.

    These are parts with as many layers, as many key and value heads, and heads of one stated size. The new size is
    the smallest that any of them would have alone, or the full size where one keeps it.

    Args:
        own: a configuration's fields and its parts' before, as ``to_dict`` gives them.
        new: the same in the twin.

    Returns:
        The new sizes: nested mappings address parts.
    """
    alike: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
    for path, part in _parts(own):
        key = tuple(part.get(name) for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
        if all(is_count(value) for value in key):
            alike.setdefault(key, []).append(path)
    changed: dict[str, Any] = {}
    for paths in alike.values():
        full = _at(own, paths[0])["head_dim"]
        sizes = {_at(new, path)["head_dim"] for path in paths}
        for path in paths if len(sizes) > 1 else ():
            _set_at(changed, path, {"head_dim": full if full in sizes else min(sizes)})
    return changed


def shared_pictures(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep pictures at full size that several parts read, where one of them has no rule to make its own smaller.

    Args, Returns: as :func:`shared_heads`.
    """
    alike: dict[tuple[int, int], list[tuple[str, ...]]] = {}
    for path, part in _parts(own):
        size = part.get("image_size")
        sides = [size, size] if is_count(size) else size
        if _is_pair(sides):
            alike.setdefault((sides[0], sides[1]), []).append(path)
    changed: dict[str, Any] = {}
    for paths in alike.values():
        smaller = [path for path in paths if _at(new, path).get("image_size") != _at(own, path)["image_size"]]
        for path in smaller if len(smaller) < len(paths) else ():
            _set_at(changed, path, {"image_size": _at(own, path)["image_size"]})
    return changed


def _parts(
    fields: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    yield path, fields
    for name, value in fields.items():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _parts(value, (*path, name))


def _at(fields: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for name in path:
        fields = fields[name]
    return fields


def _set_at(fields: dict[str, Any], path: tuple[str, ...], values: Mapping[str, Any]) -> None:
    for name in path:
        fields = fields.setdefault(name, {})
    fields.update(values)


def layer_overrides(
    own: Mapping[str, Any], new: Mapping[str, Any], overrides: Mapping[int, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Keep per-layer sizes larger or smaller than the model's own where they were."""
    return {
        layer: {k: _relative(v, own.get(k), new.get(k)) for k, v in values.items()}
        for layer, values in overrides.items()
    }


def _relative(value: Any, base: Any, new_base: Any) -> Any:
    if not (is_count(value) and is_count(base) and is_count(new_base)):
        return value
    if value == base:
        return new_base
    if value > base:
        return min(value, new_base * max(2, min(4, value // base)))
    return max(1, min(new_base // 2, value))
