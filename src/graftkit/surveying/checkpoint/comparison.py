"""The keys that a model expects on disk against those in its checkpoint's safetensors headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.surveying.checkpoint.headers import Headers
from graftkit.surveying.checkpoint.keys import checkpoint_keys
from graftkit.surveying.ties import tied_names

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Checkpoint:
    """What the weight files store, as their headers say.

    Attributes:
        tensors: their number.
        bytes: of all tensor data.
        dtypes: safetensors dtype -> number of tensors.
        unknown: keys that the model's class does not know (it ignores them on loading).
        missing: keys that the model's class expects and no file has (it initializes them at random).
    """

    tensors: int
    bytes: int
    dtypes: tuple[tuple[str, int], ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "bytes": self.bytes,
            "dtypes": dict(self.dtypes),
            "unknown": list(self.unknown),
            "missing": list(self.missing),
        }


def compare(model: nn.Module, headers: Headers) -> Checkpoint:
    """Compare the checkpoint with the model; of tied weights one name on disk is enough."""
    expected = checkpoint_keys(model, list(model.state_dict()))
    known = {key for keys in expected.values() for key in keys}
    absent = {name for name, keys in expected.items() if not any(key in headers for key in keys)}
    present = set(expected) - absent
    excused = {name for names in tied_names(model) if not present.isdisjoint(names) for name in names}
    missing = sorted(key for name in absent - excused for key in expected[name])
    return Checkpoint(
        tensors=len(headers),
        bytes=headers.total_bytes,
        dtypes=tuple(Counter(tensor.dtype for tensor in headers.values()).most_common()),
        unknown=tuple(sorted(key for key in headers if key not in known)),
        missing=tuple(missing),
    )
