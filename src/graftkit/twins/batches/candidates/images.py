"""Candidates for images: dense pixels, and patches with the grid that they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from graftkit.twins.batches.candidates.placeholders import with_placeholders
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import value_of
from graftkit.twins.sizes.field_sizes import is_count

VISION = ("vision", "image", "visual", "vit", "backbone", "encoder")
CHANNELS = ("num_channels", "in_channels", "in_chans", "image_channels")
_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id", "media_token_id")
_MERGES = ("spatial_merge_size", "merge_size", "downsample_factor", "pooling_kernel_size", "model_patch_size")
# For classes whose configuration states no size; larger ones only where a class insists.
_SIDES = ("64", "128", "32", "224", "256", "384", "512")
# Axes of pixels with several images a row.
_WITH_SEVERAL = 5
# How much less likely channels are behind the pixels than before them.
_CHANNELS_LAST = 4
_MERGE_INPUTS = ("merge_sizes", "image_merge_sizes")
_PROMPTS = ("prompt_pixel_values", "prompt_masks")
_NOT_PLAIN = ("prompt", "high_res", "local", "mask", "videos")


def images(facts: ModelFacts) -> list[dict[str, str]]:
    """Return groups of inputs for one image a row."""
    name = _pixels(facts)
    if name is None or facts.lacks("vision"):
        return []
    grids = grid_inputs(facts, video=False)
    groups: list[dict[str, str]] = []
    if grids or name == "image_patches":
        groups += _packed(facts, name, grids)
    if name == "flattened_patches":
        groups += _numbered_patches(facts, name)
    elif name != "hidden_states":
        groups += _dense(facts, name)
    return with_placeholders(facts, groups, _TOKENS)


def _pixels(facts: ModelFacts) -> str | None:
    """Return the input that holds pixels or patches: by its name, else by its documented axes."""
    for name in ("flattened_patches", "image_patches", "pixel_values", "image", "images"):
        if facts.takes(name):
            return name
    if facts.takes("hidden_states") and grid_inputs(facts, video=False):
        return "hidden_states"
    axes = {"num_channels", "height", "image_size"}
    return next(
        (
            i.name
            for i in facts.inputs.values()
            if axes & set(i.shape) and not any(w in i.name for w in _NOT_PLAIN)
        ),
        None,
    )


def grid_inputs(facts: ModelFacts, *, video: bool) -> list[str]:
    """Return the inputs that say how patches lie in an image, or in a video."""
    endings = ("grid_thw", "grid_hw", "spatial_shapes", "target_sizes", "position_ids", "image_grids")
    own = ("grid_thw", "spatial_shapes", "target_sizes", "pixel_position_ids")
    return [
        name
        for name in facts.inputs
        if name.endswith(endings) and ("video" in name) == video and (video or "image" in name or name in own)
    ]


def grid_values(names: Iterable[str], frames: str, side: str, rows: str = "B") -> dict[str, str]:
    """Return what the inputs of a grid hold where each row has ``side`` x ``side`` patches."""
    values = {}
    for name in names:
        if name.endswith("thw"):
            values[name] = f"rows({frames}, {side}, {side})"
        elif name.endswith("position_ids"):
            values[name] = f"patch_positions({rows}, {side}, {side})"
        else:
            values[name] = f"rows({side}, {side})"
    return values


def _packed(facts: ModelFacts, name: str, grids: list[str]) -> Iterator[dict[str, str]]:
    merge = merge_factor(facts)
    sides = unlike(facts, (f"2 * {merge}", f"4 * {merge}", "4", "8"))
    padded = name != "hidden_states" and not any(grid.endswith(("thw", "hw")) for grid in grids)
    by_side = [patch_shapes(facts, f"({side}) ** 2", padded=padded) for side in sides]
    for shapes in zip(*by_side, strict=False):
        for side, shape in zip(sides, shapes, strict=True):
            extra = grid_values(grids, "1", side)
            extra |= {sizes: f"each({merge})" for sizes in _MERGE_INPUTS if facts.takes(sizes)}
            if facts.takes("pixel_attention_mask"):
                extra["pixel_attention_mask"] = f"ones(B, ({side}) ** 2)"
            yield {name: f"normal({shape})", **extra}


def merge_factor(facts: ModelFacts) -> str:
    """Return into how few a tower merges the patches of one side."""
    kernel = facts.fields(("merge_kernel_size",), VISION)
    if kernel and isinstance(facts.value(kernel[0]), list | tuple):
        return f"{kernel[0]}[0]"
    return facts.count(_MERGES, 1, VISION)


def patch_shapes(facts: ModelFacts, patches: str, *, padded: bool) -> list[str]:
    """Return shapes of patches, of which a row has so many: packed over all rows, or padded row by row."""
    channels = facts.count(CHANNELS, 3, VISION)
    patch = facts.count(("patch_size", "model_patch_size"), 14, VISION)
    frames = facts.count(("temporal_patch_size", "patch_temporal"), 1, VISION)
    merge = merge_factor(facts)
    flat, square = f"{channels} * {patch} ** 2", f"{channels}, {patch}, {patch}"
    rows = f"B * {patches}"
    by_row = [f"B, {patches}, {flat}", f"B, {patches}, {square}"]
    packed = [
        f"{rows}, {channels} * {frames} * {patch} ** 2",
        f"{rows}, {flat}",
        f"{rows}, {square}",
        f"1, {rows}, {square}",
        f"{rows}, {channels}, {frames}, {patch}, {patch}",
        f"{rows}, {frames}, {patch}, {patch}, {channels}",
        f"{rows} // {merge} ** 2, {patch} * {merge}, {patch} * {merge}, {channels}",
        f"{rows}, {patch} * {merge}, {patch} * {merge}, {channels}",
        f"1, {channels}, {patch}, {rows} * {patch}",
        f"1, {rows}, {flat}",
    ]
    return unlike(facts, by_row + packed if padded else packed + by_row)


def unlike(facts: ModelFacts, sizes: Iterable[str]) -> list[str]:
    """Return the sizes, or shapes, that differ in value."""
    found: dict[str, str] = {}
    for size in sizes:
        found.setdefault(repr(value_of(f"[{size}]", facts.model)), size)
    return list(found.values())


def _numbered_patches(facts: ModelFacts, name: str) -> list[dict[str, str]]:
    """Return patches that begin with the numbers of their row and column."""
    channels, patch = facts.count(CHANNELS, 3, VISION), facts.count(("patch_size",), 16, VISION)
    widths = [*facts.fields(("patch_embed_hidden_size",), VISION), f"{channels} * {patch} ** 2"]
    return [{name: f"beside(patch_positions(B, 4, 4), normal(B, 16, {width}))"} for width in widths]


def _dense(facts: ModelFacts, name: str) -> Iterator[dict[str, str]]:
    shapes = sorted(_axes(facts, name), key=lambda at: at[0])
    for _, shape in shapes:
        # A prompt is an image like the one that it is for.
        alike = [name, *(prompt for prompt in _PROMPTS if facts.takes(prompt))]
        group = {given: f"normal({', '.join(shape)})" for given in alike}
        if facts.takes("aspect_ratio_ids"):
            tiles = shape[-4] if len(shape) > 4 else "1"
            group |= {"aspect_ratio_ids": "ones(B, 1)", "aspect_ratio_mask": f"ones(B, 1, {tiles})"}
        groups = [group]
        if facts.takes("image_sizes"):
            groups.append(group | {"image_sizes": f"rows({shape[-2]}, {shape[-1]})"})
        if len(shape) == _WITH_SEVERAL and facts.takes("pixel_attention_mask"):
            groups.append(group | {"pixel_attention_mask": f"full(True, B, {shape[1]})"})  # which are padding
        # A size belongs to what is cut into tiles; not every tower takes one.
        yield from reversed(groups) if facts.fields(("image_grid_pinpoints",)) else groups


def _axes(facts: ModelFacts, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield shapes with their rank: how far the size and the leading axes are from the best guess."""
    channels = facts.count(CHANNELS, 3, VISION)
    documented = len(facts.inputs[name].shape)
    leading = [[], ["1"], ["2"], ["1", "1"], ["2", "2"]]
    frames = facts.fields(("num_frames", "frames_per_clip", "max_num_tiles", "num_image_with_embedding"), VISION)
    leading[1:1] = [[field] for field in frames] + [["1", field] for field in frames]
    leading.sort(key=lambda axes: bool(documented) and len(axes) + 4 != documented)
    for far, (height, width) in enumerate(image_sizes(facts)):
        for deep, axes in enumerate(leading):
            yield far + deep, ["B", *axes, channels, height, width]
            yield far + deep + _CHANNELS_LAST, ["B", *axes, height, width, channels]
        if documented == 5:
            for field in [*frames, "2"]:
                yield far + len(leading), ["B", channels, field, height, width]


def image_sizes(facts: ModelFacts) -> list[tuple[str, str]]:
    """Return heights and widths: those that the configuration states, then usual ones."""
    stated = facts.fields(("image_size", "input_size", "img_size", "crop_size", "max_img_size"), VISION)
    fields = [field for field in stated if _is_size(facts.value(field))]
    sizes = [(f"height({field})", f"width({field})") for field in fields]
    # An image that the model puts together from two.
    sizes += [(f"width({field})",) * 2 for field in fields if _is_two_squares(facts.value(field))]
    sides = [(side, side) for side in _SIDES]
    patches = [field for field in facts.fields(("patch_size",), VISION) if is_count(facts.value(field))]
    sides[2:2] = [(f"4 * {patch}", f"4 * {patch}") for patch in unlike(facts, patches)[:3]]
    return [*sizes, *sides, ("32", "128"), ("48", "320"), ("1024", "1024")]


def _is_two_squares(size: object) -> bool:
    return isinstance(size, list | tuple) and size[-2] == 2 * size[-1]


def _is_size(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(side, int) for side in value.values()) and bool(value)
    if isinstance(value, list | tuple):
        return len(value) >= 2 and all(isinstance(side, int) for side in value)
    return isinstance(value, int) and value > 1
