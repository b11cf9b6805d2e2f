"""The weight files of a model that are on this machine, compared with its class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import SourceError
from graftkit.surveying.checkpoint.comparison import Checkpoint, compare
from graftkit.surveying.checkpoint.headers import INDEX, SINGLE, cached_weights, read_headers
from graftkit.surveying.sources.config_file import read_config_json
from graftkit.surveying.sources.load_config import LoadedConfig
from graftkit.surveying.sources.local import existing_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def local_checkpoint(loaded: LoadedConfig, model: PreTrainedModel) -> Checkpoint | None:
    """Compare a model's weight files with its class; None where no safetensors files of it are on this machine.

    Files that cannot be read are not compared, which ``Checkpoint.undecided`` says.
    """
    try:
        folder = _folder(loaded)
        return None if folder is None else compare(model, read_headers(folder))
    except SourceError as error:
        return None if error.code == "weights-not-found" else _unreadable(error)


def weights_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's safetensors files on this machine; None where not all of them are.

    Args:
        name: a folder or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: ``weights-header``: the cached index of a hub's model is malformed.
    """
    path = existing_path(name)
    if path is not None:
        return path if path.is_dir() and ((path / SINGLE).is_file() or (path / INDEX).is_file()) else None
    cached = cached_weights(name, revision)
    return None if cached is None else cached.path.parent


def stored_quantization(folder: Path) -> str | None:
    """Return how a folder's weights are quantized, as its configuration says ("gptq"); None where they are not.

    Raises:
        SourceError: ``config-corrupt``, ``config-without-model-type``.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    given = read_config_json(path, str(path)).get("quantization_config")
    if not isinstance(given, Mapping):
        return None
    method = str(given.get("quant_method", "unknown"))
    bits = "4-bit" if given.get("load_in_4bit") else "8-bit"
    return f"{method} {bits}" if method == "bitsandbytes" else method


def _folder(loaded: LoadedConfig) -> Path | None:
    if loaded.origin == "directory":
        return Path(loaded.name)
    return weights_folder(loaded.name, loaded.revision) if loaded.origin in {"hub", "cache"} else None


def _unreadable(error: SourceError) -> Checkpoint:
    return Checkpoint(0, 0, (), (), undecided=f"{error.what}: {error.why}")
