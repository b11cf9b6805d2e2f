"""Tensors of a safetensors file that is not stock PEFT's, read without trusting it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import AdapterError, SourceError
from graftkit.merging.checkpoint.shards import FLOATS
from graftkit.surveying.checkpoint.safetensors_header import FileHeader, read_header

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file with a checked header; tensors stay on disk until one is asked for."""

    path: Path
    header: FileHeader = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header.

        Raises:
            AdapterError: ``adapter-weights``: the file is missing, malformed, truncated or empty, or a tensor's
                dtype is none that factors are kept in.
        """
        try:
            header = read_header(path)
        except SourceError as error:
            raise unreadable(path, error.why or error.what) from error
        if not header.tensors:
            raise unreadable(path, "it contains no tensors")
        for name, tensor in header.tensors.items():
            if tensor.dtype not in FLOATS or 0 in tensor.shape:
                raise unreadable(path, f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
        return cls(path, header)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.header.tensors.items()}

    def dtype(self, name: str) -> str:
        """Return safetensors' name of a tensor's dtype."""
        return self.header.tensors[name].dtype

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Read a tensor in its stored dtype, or of a stacked one the matrix of one expert.

        Raises:
            AdapterError: ``adapter-weights``: the file has changed, or a value is not finite.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                stored = file.get_slice(name)
                found: torch.Tensor = stored[:] if expert is None else stored[expert : expert + 1][0]
        except (OSError, SafetensorError) as error:
            raise unreadable(self.path, str(error)) from error
        if not bool(found.isfinite().all()):
            raise unreadable(self.path, f"{name} contains values that are not finite")
        return found


def unreadable(path: Path, why: str) -> AdapterError:
    """Return the error for a weights file that cannot be used."""
    return AdapterError(
        "the adapter's weights cannot be read",
        where=str(path),
        why=why,
        help="save the adapter again, or fetch the file again and compare its size with the original's",
        code="adapter-weights",
    )


def does_not_fit(path: Path, tensor: str, why: str) -> AdapterError:
    """Return the error for a tensor that has no place in the base."""
    return AdapterError(
        "a tensor of the adapter fits nothing in this base",
        where=f"{path}: {tensor}",
        why=why,
        help="name the base that the adapter was made for",
        code="adapter-does-not-fit",
    )
