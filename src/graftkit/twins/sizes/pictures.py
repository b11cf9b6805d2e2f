"""Pictures and clips of a twin whose size another field than that of square patches goes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from graftkit.twins.sizes.field_sizes import is_count

PATCHES_PER_SIDE = 4
_FRAMES = ("num_frames", "frames_per_clip")
_MOST_FRAMES = 8
# The side of a picture that a convolutional backbone, which halves it five times, leaves something of.
_FRAMED_SIDE = 112


def clips(own: Mapping[str, Any], _new: Mapping[str, Any]) -> dict[str, Any]:
    """Set eight frames, and a picture of 4 x 4 of their tubes, or of patches where it is cropped for these."""
    tube, size, crop = own.get("tubelet_size"), own.get("image_size"), own.get("crop_size")
    changed = {name: min(own[name], _MOST_FRAMES) for name in _FRAMES if is_count(own.get(name))}
    if _is_tube(tube) and is_count(size) and own.get("patch_size") is None:
        changed["image_size"] = min(size, PATCHES_PER_SIDE * max(tube[1:]))
    if is_count(crop) and is_count(own.get("patch_size")) and size is None:
        changed["crop_size"] = min(crop, PATCHES_PER_SIDE * own["patch_size"])
    return changed


def _is_tube(size: Any) -> TypeGuard[list[int]]:
    """Check whether a size is frames x height x width."""
    return isinstance(size, list | tuple) and len(size) == 3 and all(is_count(side) for side in size)


def framed(own: Mapping[str, Any], _new: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink a picture and the learned frame around it alike."""
    side = own.get("max_img_size")
    frames = [name for name in own if name.endswith("_prompt_size") and is_count(own[name])]
    if not is_count(side) or not frames:
        return {}
    times = max(1, side // _FRAMED_SIDE)
    return {name: max(1, own[name] // times) for name in ("max_img_size", *frames)}


def pictures_of_parts(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Keep patches as large as the pictures of the towers that read them.

    Args:
        own: the fields of a configuration and its parts.
        new: the same, shrunk.
    """
    sizes = {
        (part["image_size"], new[name].get("image_size"))
        for name, part in own.items()
        if isinstance(part, Mapping) and is_count(part.get("image_size"))
    }
    alike = len(sizes) == 1 and own.get("patch_size") == next(iter(sizes))[0]
    return {"patch_size": next(iter(sizes))[1]} if alike else {}


def read_layers(own: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Let a list of layers of the towers that are read name the last ones that there are, in the same order.

    Args, Returns: as :func:`pictures_of_parts`.
    """
    counts = [
        part["num_hidden_layers"]
        for name, part in new.items()
        if isinstance(part, Mapping) and is_count(part.get("num_hidden_layers"))
    ]
    changed: dict[str, Any] = {}
    for name, read in own.items():
        if name.endswith("_hook_ids") and isinstance(read, list) and counts and max(read) >= min(counts):
            order = sorted(read, reverse=True)
            changed[name] = [max(0, min(counts) - 1 - order.index(layer)) for layer in read]
    return changed
