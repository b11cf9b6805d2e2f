"""An adapter folder, read without trusting it: a bounded JSON configuration, a safetensors header, no pickle."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import AdapterError, SourceError
from graftkit.surveying.checkpoint.headers import TensorHeader, parse_json, read_headers

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")

# A configuration that lists every module of a very large model by its full path takes some hundred kilobytes.
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """One adapter folder. The tensors stay on disk until one is asked for.

    Attributes:
        folder: where it is.
        config: ``adapter_config.json`` as it stands, a JSON object.
        tensors: tensor name -> dtype and shape, in file order.
        metadata: the weights file's own metadata, e.g. ``{"format": "pt"}``.
        repeated: names that the header holds more than once.
        repeated_fields: names that an object in the configuration holds more than once.
    """

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorHeader] = field(repr=False)
    metadata: Mapping[str, str]
    repeated: tuple[str, ...] = field(default=(), repr=False)
    repeated_fields: tuple[str, ...] = field(default=(), repr=False)

    @property
    def weights_path(self) -> Path:
        return self.folder / WEIGHTS_NAME

    @property
    def peft_type(self) -> str:
        """PEFT's name for the method, in capitals: "LORA"."""
        return str(self.config["peft_type"]).upper()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now, on the CPU.

        Raises:
            KeyError: there is none of that name.
        """
        from safetensors import safe_open

        if name not in self.tensors:
            raise KeyError(name)
        with safe_open(str(self.weights_path), framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter folder as PEFT's ``save_pretrained`` writes it. Nothing in it is executed or unpickled.

    Raises:
        AdapterError: ``adapter-not-found`` (no such folder), ``adapter-config`` (no ``adapter_config.json``, or
            one that is no JSON object of a reasonable size with a ``peft_type``), ``adapter-pickle`` (the weights
            are there as a pickle only), ``adapter-weights`` (no weights, or a malformed or truncated file).
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AdapterError(
            "no such adapter folder",
            where=str(folder),
            help=f"name the folder that holds {CONFIG_NAME}",
            code="adapter-not-found",
        )
    file = _read_folder(path)
    if not file.tensors:
        raise AdapterError(
            "the adapter's weights file holds no tensors",
            where=str(file.weights_path),
            help="save the adapter again, with the parameters gathered on one process",
            code="adapter-weights",
        )
    return file


def unreadable(file: AdapterFile) -> AdapterError | None:
    """Why the installed safetensors cannot open the weights, whose header is well-formed; None where it can."""
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


def without_tensors(folder: Path) -> AdapterFile | None:
    """The adapter, where its only fault is that a well-formed weights file holds no tensors."""
    try:
        file = _read_folder(folder)
    except AdapterError:
        return None
    return None if file.tensors else file


def _read_folder(path: Path) -> AdapterFile:
    config, repeated_fields = _parsed_config(path / CONFIG_NAME)
    weights = _checked_weights(path)
    try:
        headers = read_headers(weights)
    except SourceError as error:
        raise AdapterError(
            "the adapter's weights cannot be read",
            where=str(weights),
            why=error.why or error.what,
            help="fetch the file again, and compare its size with the original's",
            code="adapter-weights",
        ) from error
    known = MappingProxyType(config)
    return AdapterFile(path, known, headers.tensors, headers.metadata, headers.repeated, repeated_fields)


def raw_header(weights: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entries and its metadata, of a file whose header ``read_headers`` has checked."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", None)
    known = metadata if isinstance(metadata, dict) else {}
    return entries, {str(name): str(value) for name, value in known.items()}


def read_config(path: Path) -> dict[str, Any]:
    """An ``adapter_config.json`` as it stands.

    Raises:
        AdapterError: ``adapter-config``: it is missing, is no JSON object of a reasonable size, or has no
            ``peft_type``.
    """
    return _parsed_config(path)[0]


def _parsed_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The configuration, and the names that an object in it holds more than once."""
    try:
        config, repeated = parse_json(_bounded_bytes(path))
    except FileNotFoundError:
        raise _bad_config(path, "it is not there") from None
    except OSError as error:
        raise _bad_config(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _bad_config(path, f"it is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _bad_config(path, f"a JSON object was expected, not a {type(config).__name__}")
    if not isinstance(config.get("peft_type"), str):
        raise _bad_config(path, "it has no peft_type")
    return config, tuple(repeated)


def _bounded_bytes(path: Path) -> bytes:
    # Reading a pipe or a device would not end, and some files claim to be empty.
    if not stat.S_ISREG(path.stat().st_mode):
        raise _bad_config(path, "it is no regular file")
    with path.open("rb") as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise _bad_config(path, f"it is larger than {_MAX_CONFIG_BYTES:,} bytes")
    return content


def _bad_config(path: Path, why: str) -> AdapterError:
    return AdapterError(
        f"no usable {CONFIG_NAME}",
        where=str(path),
        why=why,
        help="point at a folder that save_pretrained() of a PEFT model has written",
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
            help="where you trust its source, load it with PEFT in a sandbox and call save_pretrained(): "
            "that writes safetensors",
            code="adapter-pickle",
        )
    raise AdapterError(
        "the adapter has no weights",
        where=str(folder),
        why=f"there is no {WEIGHTS_NAME}",
        help="save the adapter again with save_pretrained()",
        code="adapter-weights",
    )
