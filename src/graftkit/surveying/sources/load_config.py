"""What the user names (a config, a file, a directory, a model type, a hub id) -> a configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import SourceError, reraise_as
from graftkit.families import geometry
from graftkit.surveying.sources import hub
from graftkit.surveying.sources.config_file import build_config, read_config_json
from graftkit.surveying.sources.hub_config import adapter_base, fetch_config
from graftkit.surveying.sources.local import existing_path
from graftkit.surveying.sources.model_types import is_model_type, similar_types, transformers_version
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.text import some, suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where it came from.

    Attributes:
        config: the transformers configuration.
        origin: "config", "file", "directory", "model type", "hub" (the hub answered), "cache" (it did not)
            or "family data" (neither had it; the public geometry that graftkit carries).
        name: what the user wrote, or the configuration's model type.
        revision: the commit of the hub's file, where there is one.
        code: the hub id or directory whose own code may run, None where the model brings none or it was not
            allowed.
    """

    config: PretrainedConfig
    origin: str
    name: str
    revision: str | None = None
    code: str | None = None


def load_config(source: Any, *, trust_remote_code: bool = False, revision: str | None = None) -> LoadedConfig:
    """Resolve anything that names a model to its configuration. The first reader that takes it wins.

    A path that exists wins over a hub id. A bare word is more often a name than a path: where it is a model
    type or a cached model's id, a directory of that name is meant only if it holds a ``config.json``. Write
    ``./gemma4``, or pass a ``Path``, to mean the path in any case. A bare legacy id (``"gpt2"``) is a cached
    model where there is one, else a model type, and is never looked up online.

    From the hub only ``config.json`` is fetched, never weights; with ``HF_HUB_OFFLINE=1`` nothing is.

    Args:
        source: a ``PretrainedConfig``, a path to a ``config.json`` or to a directory with one, a
            transformers model type (``"gemma4"``) or a hub id (``"google/gemma-4-E2B-it"``).
        trust_remote_code: let configuration and model code from the hub or from the directory run; as in
            transformers, it then goes before the built-in classes. Without it such code is not even fetched.
        revision: branch, tag or commit of a hub id; other sources have none.

    Raises:
        SourceError: with a code that says which step failed and how to go on: ``source-type``,
            ``not-found``, ``not-a-model-directory``, ``config-corrupt``, ``config-without-model-type``,
            ``config-invalid``, ``model-type-unknown``, ``remote-code``, ``remote-code-failed``,
            ``hub-offline``, ``hub-not-found``, ``hub-gated``, ``hub-no-config``, ``hub-no-revision``,
            ``hub-file-too-large``, ``hub-cache`` or ``hub-error``.
    """
    if not isinstance(source, (str, Path)):
        return _given(source)
    text = str(source)
    if isinstance(source, Path):
        loaded = _from_path(text, trust_remote_code)
    else:
        loaded = (
            (None if _is_known_word(text) else _from_path(text, trust_remote_code))
            or _from_cache(text, trust_remote_code, revision)
            or _from_model_type(text)
            or _from_hub(text, trust_remote_code, revision)
        )
    if loaded is None:
        raise _not_found(source)
    return loaded


def _given(source: Any) -> LoadedConfig:
    from transformers import PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return LoadedConfig(source, "config", source.name_or_path or source.model_type)
    raise SourceError(
        f"cannot read a model from {type(source).__name__}",
        help="pass a model, a configuration, a path, a model type or a hub id",
        code="source-type",
    )


def _is_known_word(text: str) -> bool:
    """Check whether ``text`` is a name, even where there is a file or folder of that name that is not a model."""
    is_name = is_model_type(text) or ("/" not in text and hub.from_cache(text, "config.json") is not None)
    return is_name and not (Path(text) / "config.json").is_file()


def _from_path(text: str, trust_remote_code: bool) -> LoadedConfig | None:
    path = existing_path(text)
    if path is None or not (path.is_file() or path.is_dir()):
        return None
    if path.is_file():
        return _load_file(path, "file", text, str(path.parent), trust_remote_code)
    with reraise_as(_unreadable_folder, path):
        if not (path / "config.json").is_file():
            raise SourceError(
                "not a model directory: it has no config.json",
                where=str(path),
                why=_why_no_model_directory(path),
                help="point at the folder that save_pretrained() wrote, or at a config.json",
                code="not-a-model-directory",
            )
    return _load_file(path / "config.json", "directory", text, str(path), trust_remote_code)


def _unreadable_folder(path: str, why: str) -> SourceError:
    return SourceError(
        "the folder cannot be read", where=path, why=why, help="check its permissions", code="not-readable"
    )


def _why_no_model_directory(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        base = adapter_base(path / "adapter_config.json")
        return f"it holds an adapter; its base model is {base}" if base else "it holds an adapter"
    names = sorted(p.name for p in path.iterdir())
    return f"it holds {some(names, 5)}" if names else "it is empty"


def _from_cache(text: str, trust_remote_code: bool, revision: str | None) -> LoadedConfig | None:
    # Only bare legacy ids ("gpt2"). One that was never fetched is more likely a typing error than an id.
    cached = None if "/" in text else hub.from_cache(text, "config.json", revision)
    return None if cached is None else _load_hub_file(cached, text, trust_remote_code)


def _from_model_type(text: str) -> LoadedConfig | None:
    if not is_model_type(text):
        return None
    from transformers import CONFIG_MAPPING

    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[text]()
    except Exception as error:
        raise SourceError(
            f"the model type {text!r} has no default configuration",
            where=text,
            why=f"{type(error).__name__}: {error}",
            help="name a hub id, a directory or a config.json of such a model",
            code="config-invalid",
        ) from error
    return LoadedConfig(config, "model type", text)


def _from_hub(text: str, trust_remote_code: bool, revision: str | None) -> LoadedConfig | None:
    if not hub.is_hub_id(text):
        return None
    try:
        file = fetch_config(text, revision)
    except SourceError as error:
        # The public geometry is that of the main branch, and stands in only for a hub that cannot be asked.
        known = geometry(text) if error.code == "hub-offline" and revision in (None, "main") else None
        if known is None:
            raise
        return LoadedConfig(_named(build_config(dict(known), text), text), "family data", text)
    return _load_hub_file(file, text, trust_remote_code)


def _load_hub_file(file: hub.HubFile, repo_id: str, trust_remote_code: bool) -> LoadedConfig:
    origin = "hub" if file.validated else "cache"
    return _load_file(file.path, origin, repo_id, repo_id, trust_remote_code, file.commit)


def _load_file(
    path: Path, origin: str, name: str, home: str, trust_remote_code: bool, commit: str | None = None
) -> LoadedConfig:
    """Read a ``config.json``. ``home`` is the directory or hub id that holds its code and its weights."""
    where = str(path) if commit is None else f"{home} ({path})"
    data = read_config_json(path, where)
    auto_map = data.get("auto_map")
    code = home if trust_remote_code and isinstance(auto_map, dict) and auto_map else None
    config = build_config(data, where, path=path, code=code, commit=commit)
    return LoadedConfig(_named(config, home), origin, name, commit, code)


def _named(config: PretrainedConfig, name: str) -> PretrainedConfig:
    # As from_pretrained() does: PEFT writes this name into the adapter, as its base model.
    config.name_or_path = name
    return config


def _not_found(source: str | Path) -> SourceError:
    text = str(source)
    if isinstance(source, str) and _is_word(text):
        return _unknown_word(text)
    return SourceError(
        "no such file, directory or hub id",
        where=text,
        why="there is no file or folder of that name, and a hub id has the form owner/name",
        help=_nearby(text) or "check the path, or name a hub id as owner/name",
        code="not-found",
    )


def _is_word(text: str) -> bool:
    """Check whether ``text`` can be a model type: one word, and no file's name ("config.txt", not "qwen3.6")."""
    is_file_name = re.fullmatch(r".+\.[A-Za-z]\w*", text)
    return text.replace("-", "_").replace(".", "_").isidentifier() and not is_file_name


def _unknown_word(text: str) -> SourceError:
    guess = _nearby(text) or similar_types(text)
    newer = "pip install --upgrade transformers, if it is the type of a newer model"
    return SourceError(
        f"no model is called {text!r} here",
        where=text,
        why=f"there is no file or folder of that name, and transformers {transformers_version()} has no such"
        " model type",
        help=f"{guess or newer}; a model on the hub is named as owner/name",
        code="model-type-unknown",
    )


def _nearby(text: str) -> str | None:
    """Suggest what is in the folder that the path leads to, and has nearly the name that was given."""
    try:
        path = Path(text).expanduser()
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError, RuntimeError):  # no such folder, a null byte, no such user
        return None
    return suggest(path.name, [str(path.parent / name) for name in names])
