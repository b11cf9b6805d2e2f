"""Adapter folders, read without trusting them: bounded JSON, a checked safetensors header, no pickle."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import AdapterError, SourceError, reraise_as
from graftkit.files import why_no_folder
from graftkit.surveying.checkpoint.safetensors_header import FileHeader, StoredTensor, parse_json, read_header
from graftkit.text import some

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What graftkit writes beside them: see graftkit.adapters.record.
RECORD_NAME = "graftkit.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
# PEFT's defaults, for a configuration that leaves ``r`` or ``lora_alpha`` out. Source: peft.LoraConfig.
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8

# What a module that PEFT saves whole holds in memory; the adapter's name may follow. Source:
# peft.utils.other.ModulesToSaveWrapper.
_INSIDE = (re.compile(r"\.(?:original_module|modules_to_save)\."), re.compile(r"\.modules_to_save\.[^.]+\."))
# A configuration that lists every module of a very large model by its full path has a few hundred kilobytes.
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """One adapter folder. The tensors stay on disk until one is asked for.

    Attributes:
        config: the JSON object in ``adapter_config.json``.
        header: of the weights file.
        repeated_fields: names that an object in the configuration holds more than once.
    """

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    header: FileHeader = field(repr=False)
    repeated_fields: tuple[str, ...] = field(default=(), repr=False)

    @property
    def weights_path(self) -> Path:
        return self.folder / WEIGHTS_NAME

    @property
    def peft_type(self) -> str:
        """PEFT's name for the method, in capitals: "LORA"."""
        return str(self.config["peft_type"]).upper()

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Tensor name -> dtype, shape and byte range, in file order."""
        return self.header.tensors

    @cached_property
    def duplicates(self) -> frozenset[str]:
        """Names under which PEFT writes a module that it saves whole a second time, and does not apply it.

        Embeddings that were resized, and with ``bias="all"`` biases, are also saved as they are called in memory.
        Source: ``peft.utils.save_and_load.get_peft_model_state_dict``.
        """
        return frozenset(name for name in self.tensors if any(n in self.tensors for n in _without_insides(name)))

    @property
    def repeated(self) -> tuple[str, ...]:
        """Names that the header holds more than once."""
        return self.header.repeated

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into the CPU's memory.

        Raises:
            KeyError: there is none of that name.
        """
        from safetensors import safe_open

        if name not in self.tensors:
            raise KeyError(name)
        with safe_open(str(self.weights_path), framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


def _without_insides(name: str) -> list[str]:
    return [plain for inside in _INSIDE if (plain := inside.sub(".", name, count=1)) != name]


def read_adapter(folder: str | Path, *, allow_empty: bool = False) -> AdapterFile:
    """Read an adapter folder as PEFT's ``save_pretrained`` writes it, without executing or unpickling anything.

    Args:
        allow_empty: accept a weights file without tensors, which is an error otherwise.

    Raises:
        AdapterError: ``adapter-not-found`` (no such folder), ``adapter-config`` (``adapter_config.json`` is
            missing, too large, or not a JSON object with a ``peft_type``), ``adapter-pickle`` (there are only
            pickled weights), ``adapter-weights`` (no weights, or a malformed or truncated file).
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AdapterError(
            "no such adapter folder",
            where=str(folder),
            why=why_no_folder(path),
            help=f"name the folder that contains {CONFIG_NAME}",
            code="adapter-not-found",
        )
    config, repeated_fields = _parsed_config(path / CONFIG_NAME)
    weights = _checked_weights(path)
    try:
        header = read_header(weights)
    except SourceError as error:
        raise AdapterError(
            "the adapter's weights cannot be read",
            where=str(weights),
            why=error.why or error.what,
            help="fetch the file again, and compare its size with the original's",
            code="adapter-weights",
        ) from error
    if not header.tensors and not allow_empty:
        raise AdapterError(
            "the adapter's weights file contains no tensors",
            where=str(weights),
            help="save the adapter again, with the parameters gathered on one process",
            code="adapter-weights",
        )
    return AdapterFile(path, MappingProxyType(config), header, repeated_fields)


def unreadable(file: AdapterFile) -> AdapterError | None:
    """Return the error where the installed safetensors cannot open weights with a well-formed header, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file.weights_path), framework="pt"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return AdapterError(
            "the adapter's weights cannot be opened",
            where=str(file.weights_path),
            why=f"safetensors: {error}",
            help="update safetensors, or fetch the file again",
            code="adapter-weights",
        )


def read_config(path: Path) -> dict[str, Any]:
    """Read an ``adapter_config.json``.

    Raises:
        AdapterError: ``adapter-config``: it is missing, too large, or not a JSON object with a ``peft_type``.
    """
    return _parsed_config(path)[0]


def read_object(path: Path) -> dict[str, Any]:
    """Read an ``adapter_config.json`` of any tool.

    Raises:
        AdapterError: ``adapter-config``: it is missing, too large, or not a JSON object.
    """
    return _parsed_object(path)[0]


def _parsed_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the configuration, and the names that an object in it holds more than once."""
    config, repeated = _parsed_object(path)
    if not isinstance(config.get("peft_type"), str):
        raise _bad_config(path, "it has no peft_type")
    return config, repeated


def _parsed_object(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        config, repeated = parse_json(_bounded_bytes(path))
    except (ValueError, RecursionError) as error:
        raise _bad_config(path, f"it is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise _bad_config(path, f"a JSON object was expected, not a {type(config).__name__}")
    return config, tuple(repeated)


def _bounded_bytes(path: Path) -> bytes:
    with reraise_as(_bad_config, path):
        # Reading a pipe or a device would not end, and some files claim to be empty.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _bad_config(path, "it is not a regular file")
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise _bad_config(path, f"it is larger than {_MAX_CONFIG_BYTES:,} bytes")
    return content


def _bad_config(path: Path | str, why: str) -> AdapterError:
    # PEFT saves an adapter that is not called "default" in a folder of its name, and trainers write checkpoints.
    missing = not Path(path).exists()
    inside = sorted(str(found.parent) for found in Path(path).parent.glob(f"*/{CONFIG_NAME}")) if missing else []
    return AdapterError(
        f"no usable {CONFIG_NAME}",
        where=str(path),
        why=why,
        help=f"there are adapters in {some(inside)}: name one"
        if inside
        else "name a folder that PEFT's save_pretrained() wrote; graft convert ADAPTER OUT --to peft makes one of "
        "MLX's or llama.cpp's form",
        code="adapter-config",
    )


def _checked_weights(folder: Path) -> Path:
    weights = folder / WEIGHTS_NAME
    if weights.is_file():
        return weights
    pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
    if pickle is not None:
        raise AdapterError(
            "the adapter's weights are a pickle, which can run code when it is loaded",
            where=str(folder / pickle),
            why=f"there is no {WEIGHTS_NAME} beside it",
            help="if you trust its source, load it with PEFT in a sandbox and call save_pretrained(), "
            "which writes safetensors",
            code="adapter-pickle",
        )
    raise AdapterError(
        "the adapter has no weights",
        where=str(folder),
        why=f"there is no {WEIGHTS_NAME}",
        help="save the adapter again with save_pretrained()",
        code="adapter-weights",
    )
