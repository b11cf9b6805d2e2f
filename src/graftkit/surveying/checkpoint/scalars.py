"""The values of a model's scalars, such as bounds, in the files of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.surveying.checkpoint.headers import read_headers
from graftkit.surveying.checkpoint.keys import checkpoint_keys

if TYPE_CHECKING:
    from torch import nn


def read_scalars(model: nn.Module, folder: Path, names: Iterable[str]) -> dict[str, float]:
    """Return the values that the files have for these tensors, by name; those without one value are left out.

    Args:
        model: knows its names on disk; it may be on the meta device.
        folder: of the checkpoint.
        names: of parameters or buffers of the model.

    Raises:
        SourceError: the files' headers cannot be read.
    """
    from safetensors import safe_open

    wanted, headers = list(names), read_headers(folder)
    keys = checkpoint_keys(model, wanted)
    # A model without a head is saved without the first part of its names.
    on_disk = {name: (*keys[name], name, name.partition(".")[2]) for name in wanted}
    found = {name: next((key for key in known if key in headers), "") for name, known in on_disk.items()}
    scalars = {name: key for name, key in found.items() if key and math.prod(headers[key].shape) == 1}
    values: dict[str, float] = {}
    for file in {headers[key].file for key in scalars.values()}:
        with safe_open(folder / file, framework="pt") as opened:
            in_file = {name: key for name, key in scalars.items() if headers[key].file == file}
            values |= {name: float(opened.get_tensor(key)) for name, key in in_file.items()}
    return values
