"""Candidates for videos: frames of pixels, and patches over time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from graftkit.twins.batches.candidates.images import (
    CHANNELS,
    VISION,
    grid_inputs,
    grid_values,
    image_sizes,
    merge_factor,
    patch_shapes,
)
from graftkit.twins.batches.candidates.placeholders import with_placeholders
from graftkit.twins.batches.facts import ModelFacts

_TOKENS = ("video_token_id", "video_token_index", "image_token_id", "image_token_index", "media_token_id")
_FRAMES = ("num_frames", "frames_per_clip", "max_num_frames")


def videos(facts: ModelFacts) -> list[dict[str, str]]:
    """Return groups of inputs for one video a row."""
    name = next((n for n in ("pixel_values_videos", "pixel_values_video", "video_values") if facts.takes(n)), None)
    if name is None or facts.lacks("vision"):
        return []
    grids = grid_inputs(facts, video=True)
    groups = [*(_packed(facts, name, grids) if grids else ()), *_frames(facts, name)]
    return with_placeholders(facts, groups, _TOKENS)


def _packed(facts: ModelFacts, name: str, grids: list[str]) -> Iterator[dict[str, str]]:
    merge = merge_factor(facts)
    grid_sizes = list(itertools.product(("2", "1"), dict.fromkeys((f"2 * {merge}", f"4 * {merge}"))))
    by_grid = [patch_shapes(facts, f"{frames} * ({side}) ** 2", padded=False) for frames, side in grid_sizes]
    for shapes in zip(*by_grid, strict=False):
        for (frames, side), shape in zip(grid_sizes, shapes, strict=True):
            extra = grid_values(grids, frames, side, rows=f"B * {frames}")
            if facts.takes("video_merge_sizes"):
                extra["video_merge_sizes"] = f"each({merge})"
            if facts.takes("num_frames_per_video"):
                extra["num_frames_per_video"] = f"each({frames})"
            if facts.takes("video_second_per_grid"):
                extra["video_second_per_grid"] = "each(1.0)"
            yield {name: f"normal({shape})", **extra}


def _frames(facts: ModelFacts, name: str) -> Iterator[dict[str, str]]:
    channels = facts.count(CHANNELS, 3, VISION)
    for height, width in image_sizes(facts)[:6]:
        for frames in (*facts.fields(_FRAMES, VISION), "2", "4", "8"):
            yield {name: f"normal(B, {frames}, {channels}, {height}, {width})"}
