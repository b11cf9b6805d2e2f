"""Merging a LoRA adapter: every element of the result, compared with a sum in double precision.

Run: python benchmarks/merge_accuracy.py [--gigabytes 4] [--folder DIR]
The checkpoint and the adapter are those of benchmarks/merge.py, but the adapter's values are so large that its
update is as large as the weights: then base and update nearly cancel in many elements. The comparison reads the
files with safetensors, sums with torch in float64 and rounds with integers; it shares no code with the merge.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.merge import RANK, SPREAD, write_adapter, write_base

if TYPE_CHECKING:
    import torch

# Elements that are compared at a time.
PART = 2**21
# Base and update count as cancelling where their sum is smaller than the base by this factor.
CANCELLED = 100
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Count:
    """What a comparison found, as numbers of elements."""

    elements: int = 0
    wrong: int = 0
    cancelled: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def main() -> None:
    """Merge, compare, and print what was found."""
    options = _options()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="graft-accuracy-") as name:
        folder = Path(name)
        size = write_base(folder / "base", int(options.gigabytes * 1e9))
        # Then the sum of RANK products of two values spreads as the weights do.
        write_adapter(folder / "base", folder / "adapter", (SPREAD / RANK**0.5) ** 0.5)
        seconds = _merge(folder)
        print(f"{size / 1e9:.1f} GB merged in {seconds:.1f} s")
        started = time.perf_counter()
        found = sum(_compared(folder), Count())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        took = time.perf_counter() - started
        print(f"{found.elements:,} changed elements compared in {took:.0f} s, peak {peak:.0f} MB")
        print(f"{found.wrong} are not the correctly rounded sum")
        print(f"in {found.cancelled:,} the sum is less than a {CANCELLED}th of the weight")
    if found.wrong:
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", default=None)
    return parser.parse_args()


def _merge(folder: Path) -> float:
    from graftkit.merging.merge import merge

    started = time.perf_counter()
    merge(folder / "base", folder / "adapter", folder / "out")
    return time.perf_counter() - started


def _compared(folder: Path) -> Iterator[Count]:
    """Yield the counts of each part of each tensor that the adapter changes."""
    from safetensors import safe_open

    index = json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        for key in adapter.keys():  # noqa: SIM118
            if not key.endswith(".lora_A.weight"):
                continue
            a, b = (adapter.get_tensor(key.replace("lora_A", side)).double() for side in ("lora_A", "lora_B"))
            name = key.removeprefix(PREFIX).replace(".lora_A.weight", ".weight")
            with (
                safe_open(folder / "base" / index[name], "pt") as base,
                safe_open(folder / "out" / index[name], "pt") as out,
            ):
                before, after = base.get_slice(name), out.get_slice(name)
                step = PART // a.shape[1]
                for at in range(0, len(b), step):
                    weights = before[at : at + step].double()
                    yield _count(weights, weights + b[at : at + step] @ a, after[at : at + step])


def _count(weights: torch.Tensor, exact: torch.Tensor, merged: Any) -> Count:
    wrong = merged.double() != _nearest(exact)
    cancelled = exact.abs() * CANCELLED < weights.abs()
    return Count(exact.numel(), int(wrong.sum()), int(cancelled.sum()))


def _nearest(exact: torch.Tensor) -> torch.Tensor:
    """Round to the 8 bits of a bfloat16's significand, to nearest and ties to even, with integers."""
    import torch

    bits = exact.view(torch.int64)
    cut = 53 - 8
    return (((bits + ((bits >> cut) & 1) + (2 ** (cut - 1) - 1)) >> cut) << cut).view(torch.float64)


if __name__ == "__main__":
    main()
