"""config.json -> a configuration of the installed transformers, or of the model's own code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import ModelTypeError, SourceError
from graftkit.surveying.sources.model_types import is_model_type, similar_types, transformers_version
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.surveying.sources.remote_code import remote_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A config.json is a few kilobytes. Naming a weight file instead is an easy slip, and must not read it.
MAX_CONFIG_BYTES = 16 * 2**20


def read_config_json(path: Path, where: str) -> dict[str, Any]:
    """Read a ``config.json``, and check that it describes a model.

    Raises:
        SourceError: ``config-corrupt`` or ``config-without-model-type``.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"{size} bytes is too large for a configuration")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            "config.json cannot be read",
            where=where,
            why=str(error),
            help="correct the file, or fetch it again (hf download --force-download)",
            code="config-corrupt",
        ) from error
    if isinstance(data, dict) and isinstance(data.get("model_type"), str):
        return data
    raise SourceError(
        "config.json does not describe a transformers model",
        where=where,
        why=_why_no_model(data),
        help="point at the config.json of a model, not of an adapter, tokenizer or pipeline",
        code="config-without-model-type",
    )


def _why_no_model(data: Any) -> str:
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}"
    if "peft_type" in data:
        return f"it configures an adapter for {data.get('base_model_name_or_path')}"
    return "it has no model_type"


def build_config(
    data: dict[str, Any],
    where: str,
    *,
    path: Path | None = None,
    code: str | None = None,
    commit: str | None = None,
) -> PretrainedConfig:
    """Build the configuration that the content of a ``config.json`` describes.

    Args:
        data: the content.
        where: what errors name.
        path: the file, None where there is none.
        code: the hub id or directory whose own code may run, or None.
        commit: of that code.

    Raises:
        SourceError: ``config-invalid``, ``model-type-unknown``, ``remote-code`` or ``remote-code-failed``.
    """
    model_type = data["model_type"]
    auto_map = data.get("auto_map")
    reference = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
    if isinstance(reference, str) and code is not None:
        config_class = remote_class(reference, code, commit)
        return _checked(lambda: config_class.from_dict(data), model_type, where)
    if is_model_type(model_type):
        from transformers import CONFIG_MAPPING, AutoConfig

        if path is None:
            # A copy, since configuration classes change what they are given.
            return _checked(lambda: CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(data)), model_type, where)
        # Through the file rather than the mapping: transformers redirects some files to another type.
        return _checked(lambda: AutoConfig.from_pretrained(str(path), trust_remote_code=False), model_type, where)
    if isinstance(reference, str):
        raise SourceError(
            "this model brings its own code, and it was not allowed to run",
            where=where,
            why=f"auto_map names {reference}",
            help="read that code, then repeat with --trust-remote-code (trust_remote_code=True)",
            code="remote-code",
        )
    raise unknown_model_type(model_type, where, written_by=data.get("transformers_version"))


def _checked(build: Callable[[], Any], model_type: str, where: str) -> PretrainedConfig:
    try:
        with quiet_transformers():
            return build()
    except Exception as error:
        raise SourceError(
            f"config.json is not a valid {model_type} configuration",
            where=where,
            why=f"{type(error).__name__}: {error}",
            help="compare the file with the one on the model's page",
            code="config-invalid",
        ) from error


def unknown_model_type(model_type: str, where: str, *, written_by: Any = None) -> ModelTypeError:
    """Return the error for a file with a model type that the installed transformers does not have (GK001).

    Args:
        model_type: the type asked for.
        where: the file or id that asks for it.
        written_by: the configuration's ``transformers_version``.
    """
    guess = similar_types(model_type)
    hints = [*([guess] if guess else []), "pip install --upgrade transformers"]
    writer = written_by if isinstance(written_by, str) else None
    newer = f"; the file was written by transformers {writer}" if writer else ""
    return ModelTypeError(
        f"transformers {transformers_version()} does not know the model type {model_type!r}",
        where=where,
        why=f"the architecture is newer than this transformers, or its name is misspelt{newer}",
        help="; ".join(hints),
        config={"model_type": model_type, "transformers_version": writer},
    )
