"""Versions to paste into a bug report, read from package metadata without importing the packages."""

from __future__ import annotations

import os
import platform
from importlib import metadata

_PACKAGES = (
    "graftkit",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
)
_VARIABLES = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "CUDA_VISIBLE_DEVICES", "GRAFT_DEBUG")


def environment() -> dict[str, dict[str, str | None]]:
    """Return the versions of everything graftkit works with: ``packages``, ``system`` and ``variables``.

    A package that is not installed, and a variable that is not set, is None.
    """
    return {
        "packages": {name: version_of(name) for name in _PACKAGES},
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "machine": platform.machine(),
        },
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
