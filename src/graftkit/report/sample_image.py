"""A sample, an image of a few pixels, as SVG paths."""

from __future__ import annotations

from dataclasses import dataclass

from graftkit.report.data import Sample


@dataclass(frozen=True)
class SampleImage:
    """A sample as SVG paths, one for each grey level, in a viewBox of one unit a pixel."""

    sample: Sample
    width: int
    height: int
    paths: tuple[tuple[float, str], ...]


def draw_sample(sample: Sample) -> SampleImage:
    """Draw a sample; black pixels are left out."""
    pixels = sample["pixels"]
    levels: dict[int, list[str]] = {}
    for y, row in enumerate(pixels):
        for x, grey in enumerate(row):
            if grey:
                levels.setdefault(grey, []).append(f"M{x} {y}h1v1h-1z")
    paths = tuple((round(grey / 255, 3), "".join(parts)) for grey, parts in sorted(levels.items()))
    width = max((len(row) for row in pixels), default=0)
    return SampleImage(sample, width, len(pixels), paths)
