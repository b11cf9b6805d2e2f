"""Where torch compiles a tuner's extension: apart from other processes, where there is no device to run it on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "TORCH_EXTENSIONS_DIR"


@contextmanager
def own_extension_folder() -> Iterator[None]:
    """Let torch compile extensions in a folder of this block alone, unless there is a CUDA device.

    PEFT's BOFT compiles a CUDA kernel for each layer that it adapts, also where nothing could run it. torch marks
    a compilation with a lock file in a folder that all processes share, and waits for a lock without end: a
    process that was killed meanwhile would make every later one hang (torch/utils/file_baton.py). With a device
    the compiled kernel is worth sharing.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    before = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="graftkit-extensions-", ignore_cleanup_errors=True) as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
