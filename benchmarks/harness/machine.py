"""The machine and the versions that figures come from, in words; no names and no paths."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .contest import Device

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "typer", "unsloth")


def machine_in_words(device: Device) -> str:
    """Return the processor, how many of its cores may be used, the memory and, where it is used, the GPU.

    A machine on which more is running than it has cores is called busy: spreads are then wide.
    """
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = round(psutil.virtual_memory().total / 2**30)
    words = f"{_processor()}, {cores} core{'s' * (cores > 1)}, {memory} GiB of memory"
    if psutil.getloadavg()[0] > cores:
        words += ", busy with other work"
    if device is Device.CUDA:
        import torch

        words += f", {torch.cuda.get_device_name()}"
    return words


def _processor() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the version of Python, of graftkit and of each package that a peer needs and that is installed."""
    from graftkit import __version__

    found = {"Python": platform.python_version(), "graftkit": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
