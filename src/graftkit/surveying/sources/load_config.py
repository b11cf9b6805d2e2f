"""What the user names -> a configuration: a config, a file, a directory, a model type or a hub id."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import ModelTypeError, SourceError, reraise_as
from graftkit.families import geometry
from graftkit.surveying.sources import hub
from graftkit.surveying.sources.build import quiet_transformers
from graftkit.text import some, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

# A config.json is a few kilobytes. Naming a weight file instead is an easy slip, and must not read it.
_MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Loaded:
    """A configuration and where it came from.

    Attributes:
        config: the transformers configuration.
        origin: "config", "file", "directory", "model type", "hub" (the hub answered), "cache" (it did not)
            or "family data" (neither had it; the public geometry that graftkit carries).
        name: what the user wrote, or the configuration's model type.
        revision: the commit of the hub's file, where there is one.
        code: the hub id or directory whose own code may run, where the model brings code and that was
            allowed; None otherwise. :func:`remote_model_class` reads it.
    """

    config: PretrainedConfig
    origin: str
    name: str
    revision: str | None = None
    code: str | None = None


def load_config(source: Any, *, trust_remote_code: bool = False, revision: str | None = None) -> Loaded:
    """Resolve anything that names a model to its configuration. First reader that takes it wins.

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
    from transformers import PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return Loaded(source, "config", source.name_or_path or source.model_type)
    if not isinstance(source, (str, Path)):
        raise SourceError(
            f"cannot read a model from {type(source).__name__}",
            help="pass a model, a configuration, a path, a model type or a hub id",
            code="source-type",
        )
    text = str(source)
    if isinstance(source, Path):
        readers: tuple[Callable[[], Loaded | None], ...] = (lambda: _from_path(text, trust_remote_code),)
    else:
        readers = (
            lambda: None if _is_known_word(text) else _from_path(text, trust_remote_code),
            lambda: _from_cache(text, trust_remote_code, revision),
            lambda: _from_model_type(text),
            lambda: _from_hub(text, trust_remote_code, revision),
        )
    for reader in readers:
        if (loaded := reader()) is not None:
            return loaded
    raise _not_found(source)


def remote_model_class(loaded: Loaded) -> type[PreTrainedModel] | None:
    """The model class that the model's own code defines, or None where it brings none that may run.

    Of the classes that ``auto_map`` names, the one that ``config.architectures`` names too, else the first
    one for a task, else ``AutoModel``'s.

    Raises:
        SourceError: ``remote-code-failed``, where the code cannot be fetched or run.
    """
    auto_map = getattr(loaded.config, "auto_map", None)
    if loaded.code is None or not isinstance(auto_map, dict):
        return None
    offered = [ref for key, ref in _tasks_first(auto_map) if isinstance(ref, str)]
    if not offered:
        return None
    wanted = set(loaded.config.architectures or ())
    reference = next((ref for ref in offered if ref.rpartition(".")[2] in wanted), offered[0])
    return _remote_class(reference, loaded.code, loaded.revision)  # type: ignore[no-any-return]


def _tasks_first(auto_map: Mapping[str, Any]) -> list[tuple[str, Any]]:
    models = [(key, value) for key, value in auto_map.items() if key.startswith("AutoModel")]
    return sorted(models, key=lambda item: item[0] == "AutoModel")


def _remote_class(reference: str, code: str, revision: str | None) -> Any:
    """A class from the model's own code: this runs that code, so the caller must have been allowed to."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(reference, code, revision=revision)
    except Exception as error:
        raise SourceError(
            f"the model's own code does not give {reference}",
            where=code,
            why=f"{type(error).__name__}: {error}",
            help="check that its requirements are installed, and that it supports this transformers",
            code="remote-code-failed",
        ) from error


def _is_known_word(text: str) -> bool:
    """Whether ``text`` is a name, although something that is no model may lie under it here."""
    from transformers import CONFIG_MAPPING

    is_name = text in CONFIG_MAPPING or ("/" not in text and hub.from_cache(text, "config.json") is not None)
    return is_name and not (Path(text) / "config.json").is_file()


def _from_path(text: str, trust_remote_code: bool) -> Loaded | None:
    path = Path(text).expanduser()
    try:
        is_file, is_directory = path.is_file(), path.is_dir()
    except OSError:
        # Too long for a path, or not ours to look at: whatever it names, it is no local model.
        return None
    if is_file:
        return _load_file(path, "file", text, str(path.parent), trust_remote_code)
    if not is_directory or not text:
        return None
    with reraise_as(_unreadable_folder, path):
        has_config = (path / "config.json").is_file()
        instead = "" if has_config else _what_it_is_instead(path)
    if not has_config:
        raise SourceError(
            "not a model directory: it has no config.json",
            where=str(path),
            why=instead,
            help="point at the folder that save_pretrained() wrote, or at a config.json",
            code="not-a-model-directory",
        )
    return _load_file(path / "config.json", "directory", text, str(path), trust_remote_code)


def _unreadable_folder(path: str, why: str) -> SourceError:
    return SourceError(
        "the folder cannot be read", where=path, why=why, help="check its permissions", code="not-readable"
    )


def _what_it_is_instead(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        base = hub.adapter_base(path / "adapter_config.json")
        return f"it holds an adapter; its base model is {base}" if base else "it holds an adapter"
    names = sorted(p.name for p in path.iterdir())
    return f"it holds {some(names, 5)}" if names else "it is empty"


def _from_cache(text: str, trust_remote_code: bool, revision: str | None) -> Loaded | None:
    # Only bare legacy ids ("gpt2"). One that was never fetched is more likely a typing error than an id.
    cached = None if "/" in text else hub.from_cache(text, "config.json", revision)
    return None if cached is None else _load_hub_file(cached, text, trust_remote_code)


def _from_model_type(text: str) -> Loaded | None:
    from transformers import CONFIG_MAPPING

    if text not in CONFIG_MAPPING:
        return None
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
    return Loaded(config, "model type", text)


def _from_hub(text: str, trust_remote_code: bool, revision: str | None) -> Loaded | None:
    if not hub.is_hub_id(text):
        return None
    try:
        file = hub.fetch_config(text, revision)
    except SourceError as error:
        # The public geometry is that of the main branch, and stands in only for a hub that cannot be asked.
        known = geometry(text) if error.code == "hub-offline" and revision in (None, "main") else None
        if known is None:
            raise
        return Loaded(_named(_known_config(dict(known), text), text), "family data", text)
    return _load_hub_file(file, text, trust_remote_code)


def _load_hub_file(file: hub.HubFile, repo_id: str, trust_remote_code: bool) -> Loaded:
    origin = "hub" if file.validated else "cache"
    return _load_file(file.path, origin, repo_id, repo_id, trust_remote_code, file.commit)


def _load_file(
    path: Path, origin: str, name: str, home: str, trust_remote_code: bool, commit: str | None = None
) -> Loaded:
    """Read a ``config.json``. ``home`` is the directory or hub id that its code and its weights lie in."""
    where = str(path) if commit is None else f"{home} ({path})"
    data = _read_json(path, where)
    auto_map = data.get("auto_map")
    code = home if trust_remote_code and isinstance(auto_map, dict) and auto_map else None
    config = _config(data, where=where, path=path, code=code, commit=commit)
    return Loaded(_named(config, home), origin, name, commit, code)


def _named(config: PretrainedConfig, name: str) -> PretrainedConfig:
    # As from_pretrained() does: PEFT writes this name into the adapter, as its base model.
    config.name_or_path = name
    return config


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise ValueError(f"{size} bytes is too large for a configuration")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            "config.json cannot be read",
            where=where,
            why=str(error),
            help="fetch the file again (hf download --force-download), or compare it with the model's page",
            code="config-corrupt",
        ) from error
    if isinstance(data, dict) and isinstance(data.get("model_type"), str):
        return data
    raise SourceError(
        "config.json does not describe a transformers model",
        where=where,
        why=_what_json_it_is_instead(data),
        help="point at the config.json of a model, not of an adapter, tokenizer or pipeline",
        code="config-without-model-type",
    )


def _what_json_it_is_instead(data: Any) -> str:
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}"
    if "peft_type" in data:
        return f"it configures an adapter for {data.get('base_model_name_or_path')}"
    return "it has no model_type"


def _config(
    data: dict[str, Any], *, where: str, path: Path, code: str | None, commit: str | None
) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = data["model_type"]
    auto_map = data.get("auto_map")
    reference = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
    if isinstance(reference, str) and code is not None:
        config_class = _remote_class(reference, code, commit)
        return _checked(lambda: config_class.from_dict(data), model_type, where)
    if model_type in CONFIG_MAPPING:
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


def _known_config(data: dict[str, Any], where: str) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    model_type = data["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise unknown_model_type(model_type, where)
    # A copy, since configuration classes change what they are given.
    return _checked(lambda: CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(data)), model_type, where)


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


def unknown_model_type(model_type: str, where: str | None, *, written_by: Any = None) -> ModelTypeError:
    """The error for a model type the installed transformers does not have (GK001).

    Args:
        model_type: the type asked for.
        where: the file or id that asks for it, or None where the user typed it.
        written_by: the configuration's ``transformers_version``, which says what would know the type.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    guess = suggest(model_type.lower(), sorted(CONFIG_MAPPING.keys()), 3)
    hints = [guess] if guess else []
    if where is not None or not guess:
        hints.append("pip install --upgrade transformers")
    if where is None:
        hints.append("a model on the hub is named as owner/name")
    writer = written_by if isinstance(written_by, str) else None
    newer = f"; the file was written by transformers {writer}" if writer else ""
    return ModelTypeError(
        f"transformers {transformers.__version__} does not know the model type {model_type!r}",
        where=where,
        why=f"the architecture is newer than this transformers, or its name is misspelt{newer}",
        help="; ".join(hints),
        config={"model_type": model_type, "transformers_version": writer},
    )


def _not_found(source: str | Path) -> SourceError:
    text = str(source)
    plain = text.replace("-", "_").replace(".", "_").isidentifier()
    is_word = isinstance(source, str) and plain and not text.endswith(".json")
    if is_word:
        return unknown_model_type(text, None)
    return SourceError(
        "no such file, directory or hub id",
        where=text,
        help="check the path, or name a hub id as owner/name",
        code="not-found",
    )
