"""Write a safetensors file one tensor at a time: its header needs only names, dtypes and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from graftkit.converting.errors import not_writable
from graftkit.errors import reraise_as
from graftkit.merging.checkpoint.shards import torch_dtype
from graftkit.surveying.checkpoint.safetensors_header import StoredTensor, header_bytes

if TYPE_CHECKING:
    import torch

_FORMAT: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class OutTensor:
    """One tensor of a file to write.

    Attributes:
        dtype: safetensors' name: "F32".
        make: computes it; its result is converted to ``dtype``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor] = field(repr=False)


def write_safetensors(path: Path, tensors: Iterable[OutTensor], metadata: Mapping[str, str] = _FORMAT) -> None:
    """Write the tensors in their order, each computed when its turn comes.

    Raises:
        OutputError: ``output-not-writable``.
        ValueError: a tensor has another shape than it said.
    """
    every = tuple(tensors)
    with reraise_as(not_writable, path), path.open("wb") as file:
        file.write(header_bytes(_layout(every), metadata, 0))
        for tensor in every:
            made = tensor.make().detach().to(torch_dtype(tensor.dtype)).contiguous()
            if tuple(made.shape) != tensor.shape:
                raise ValueError(f"{tensor.name} is {list(made.shape)}, and {list(tensor.shape)} was said")
            file.write(_raw(made))


def _layout(tensors: Iterable[OutTensor]) -> dict[str, StoredTensor]:
    found, at = {}, 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * torch_dtype(tensor.dtype).itemsize
        found[tensor.name] = StoredTensor(tensor.dtype, tensor.shape, at, at + size)
        at += size
    return found


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
