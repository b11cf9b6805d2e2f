"""The functions that expressions call: random and constant tensors of given shapes, and sizes of modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TensorFunctions:
    """Every public method is a function of the expressions. Floats are float32, whole numbers int64, on the CPU.

    Attributes:
        model: the model that the batch is for.
        batch_size: number of rows, B.
        generator: of random values.
    """

    model: nn.Module
    batch_size: int
    generator: torch.Generator

    def normal(self, *shape: int) -> torch.Tensor:
        """Return values of the standard normal distribution."""
        import torch

        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return values in [0, 1)."""
        import torch

        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Return whole numbers in [low, high)."""
        import torch

        return torch.randint(low, high, shape, generator=self.generator)

    def full(self, value: float, *shape: int) -> torch.Tensor:
        """Return one value everywhere: its type (bool, int, float) is the tensor's."""
        import torch

        return torch.full(shape, value)

    def ones(self, *shape: int) -> torch.Tensor:
        """Return ones, int64."""
        return self.full(1, *shape)

    def rows(self, *values: Any) -> torch.Tensor:
        """Return the same values for each row: (B, number of values)."""
        import torch

        return torch.tensor([list(values)] * self.batch_size)

    def each(self, value: Any) -> torch.Tensor:
        """Return one value a row: (B,)."""
        return self.full(value, self.batch_size)

    def counting(self, length: int) -> torch.Tensor:
        """Return 0, 1, 2, … for each row: (B, length)."""
        import torch

        return torch.arange(length).repeat(self.batch_size, 1)

    def patch_positions(self, rows: int, height: int, width: int) -> torch.Tensor:
        """Return the (x, y) of each patch of a grid: (rows, height x width, 2)."""
        import torch

        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=-1).repeat(rows, 1, 1)

    def boxes(self, number: int, limit: int) -> torch.Tensor:
        """Return boxes (x0, y0, x1, y1), each at least one wide and high, below ``limit``: (B, number, 4)."""
        import torch

        half = max(1, limit // 2)
        corner = self.integers(0, half, self.batch_size, number, 2)
        size = self.integers(1, half, self.batch_size, number, 2) if half > 1 else torch.ones_like(corner)
        return torch.cat([corner, corner + size], dim=-1)

    def beside(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Join tensors along their last axis."""
        import torch

        return torch.cat([tensor.float() for tensor in tensors], dim=-1)

    def stacked(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat a tensor along a new first axis."""
        return tensor.expand(number, *tensor.shape)

    def inputs_of(self, path: str) -> int:
        """Return how many features or channels the module at a path takes."""
        module = self.model.get_submodule(path)
        for name in ("in_features", "in_channels"):
            if isinstance(size := getattr(module, name, None), int):
                return size
        return next(module.parameters(recurse=False)).shape[-1]

    def rows_of(self, path: str) -> int:
        """Return how many rows the table of the embedding at a path has."""
        return next(self.model.get_submodule(path).parameters(recurse=False)).shape[0]

    def largest(self, values: list[int]) -> int:
        """Return the largest of a list of numbers."""
        return max(values)

    def number(self, values: list[int]) -> int:
        """Return the length of a list."""
        return len(values)

    def height(self, size: Any) -> int:
        """Return the height of a size that is a number, a pair (height, width) or a mapping of names."""
        return _side(size, 0, "height")

    def width(self, size: Any) -> int:
        """Return the width of a size that is a number, a pair (height, width) or a mapping of names."""
        return _side(size, -1, "width")


def _side(size: Any, index: int, name: str) -> int:
    if isinstance(size, Mapping):
        return int(size.get(name) or size.get("shortest_edge") or next(iter(size.values())))
    if isinstance(size, list | tuple):
        return int(list(size[-2:])[index])
    return int(size)
