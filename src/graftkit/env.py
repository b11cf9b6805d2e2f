"""What is installed here, what of it cannot be imported, and what this machine can compute."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import traceback
from dataclasses import dataclass
from importlib import metadata

from graftkit._version import __version__
from graftkit.errors import MissingDependencyError
from graftkit.text import describe

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

    Versions are read from package metadata; nothing is imported. graftkit's is that of the code that runs, as
    ``graft --version`` says it. A package that is not installed, and a variable
    that is not set, is None.
    """
    return {
        "packages": {**{name: version_of(name) for name in _PACKAGES}, "graftkit": __version__},
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


def asked_by_environment(variable: str) -> bool:
    """Check a variable with which accelerate's launcher passes a choice on."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def is_installed(package: str) -> bool:
    """Check whether Python finds a package, without importing it."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class ImportFailure:
    """A package that cannot be imported.

    Attributes:
        package: the one at fault, which another one may import.
        why: what its import raised.
    """

    package: str
    why: str

    @property
    def help(self) -> str:
        """The next step."""
        if not is_installed(self.package):
            return f"pip install {self.package}"
        reinstall = f"pip install --force-reinstall --no-deps {self.package}"
        # PEFT imports it wherever it is installed, whether or not anything is quantized.
        return f"{reinstall}; or pip uninstall {self.package}" if self.package == "bitsandbytes" else reinstall


def import_failure(package: str) -> ImportFailure | None:
    """Return why a package cannot be imported, or None where it was."""
    if not is_installed(package):
        return ImportFailure(package, "it is not installed")
    try:
        importlib.import_module(package)
    except Exception as error:  # a library that does not load raises OSErrors and RuntimeErrors too
        return failed_import(error) or ImportFailure(package, describe(error))
    return None


def failed_import(error: BaseException) -> ImportFailure | None:
    """Return the failure of an import that raised this error, or None where no import did."""
    while error.__cause__ is not None:  # transformers and TRL import lazily, and raise errors of their own
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError) and error.name:
        return ImportFailure(error.name.partition(".")[0], describe(error))
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames if frame.f_code.co_name == "<module>"]
    packages = [name.partition(".")[0] for name in modules if name != "__main__"]
    return ImportFailure(packages[-1], describe(error)) if packages else None


@functools.cache
def require_working_peft() -> None:
    """Check that PEFT can be imported, with what it imports itself wherever that is installed.

    Source: ``peft.import_utils.is_bnb_available`` finds bitsandbytes without importing it; ``peft.helpers`` and
    the tuners then import it, and take only some of its errors as its absence.

    Raises:
        MissingDependencyError: names the package that cannot be imported.
    """
    for package in ("bitsandbytes", "peft"):
        if package == "peft" or is_installed(package):
            failure = import_failure(package)
            if failure is not None:
                raise missing_dependency(failure)


def missing_dependency(failure: ImportFailure) -> MissingDependencyError:
    """Return the error for a package that cannot be imported."""
    return MissingDependencyError(f"{failure.package} cannot be imported", why=failure.why, help=failure.help)


@dataclass(frozen=True)
class Machine:
    """What a machine can compute.

    Attributes:
        accelerator: torch's name of its accelerator ("cuda", "xpu", "mps", "tpu" …), or None without one.
        bf16: whether transformers trains in bfloat16 on that accelerator.
    """

    accelerator: str | None
    bf16: bool


def this_machine() -> Machine:
    """Return what this machine can compute, as transformers sees it. Imports torch."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None and is_torch_xla_available():
        return Machine("xla", bf16=True)
    return Machine(None if found is None else found.type, bf16=bool(is_torch_bf16_gpu_available()))
