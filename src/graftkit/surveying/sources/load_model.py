"""What the user names -> the live model with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError, SourceError
from graftkit.surveying.checkpoint.comparison import sort_absent
from graftkit.surveying.checkpoint.complete import incomplete
from graftkit.surveying.checkpoint.local_weights import local_checkpoint
from graftkit.surveying.sources import hub
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.hub_errors import weights_not_local
from graftkit.surveying.sources.load_config import LoadedConfig, load_config
from graftkit.surveying.sources.local import existing_path
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers reads weights from, or an index of such files.
_WEIGHTS = (".safetensors", ".bin", ".index.json")


def load_model(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model from a directory or hub id into the class its configuration names, in its own dtype.

    Args:
        name: a directory or a hub id.
        trust_remote_code: let the model's own code run.
        revision: branch, tag or commit of a hub id.
        options: further arguments of ``from_pretrained``.

    Raises:
        SourceError: ``name`` names no model; ``weights-not-local``, or another of the hub's codes, where the hub
            does not send its weights and they are not in the cache; ``weights-incomplete``: its files lack
            weights of the class, and transformers made up random ones.
        BuildError: ``weights-missing``: there is a configuration, and no weights that load into its class.
    """
    loaded = check_weights(name, trust_remote_code=trust_remote_code, revision=revision)
    model_class = model_class_of(loaded)
    refusal = _hub_refusal(loaded, revision)
    try:
        model, report = model_class.from_pretrained(
            name,
            config=loaded.config,
            revision=revision or "main",
            output_loading_info=True,
            **{"dtype": "auto", "local_files_only": refusal is not None, **options},
        )
    except (OSError, ValueError, RuntimeError) as error:
        # Where no weights are found at all; what is found and broken raises another error.
        if refusal is not None and isinstance(error, OSError):
            raise refusal from error
        raise _no_weights(name, first_line(error)) from error
    absent = sort_absent(model, report["missing_keys"])
    if absent.weights:
        raise incomplete(absent, name, renamed=_renamed(loaded, model_class))
    return model


def check_weights(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> LoadedConfig:
    """Return a model's configuration, unless a look at its files shows that no weights are there to be loaded.

    Raises:
        SourceError: ``name`` names no model.
        BuildError: ``weights-missing``.
    """
    folder = None if trust_remote_code else existing_path(name)  # a model's own code may read other files
    if folder is not None and (folder / "config.json").is_file() and not _has_weight_files(folder):
        raise _no_weights(name, f"no file in it ends with {' or '.join(_WEIGHTS)}")
    loaded = load_config(name, trust_remote_code=trust_remote_code, revision=revision)
    if loaded.origin == "model type":
        raise _no_weights(name, "a model type names an architecture, and brings no weights")
    return loaded


def _has_weight_files(folder: Path) -> bool:
    return any(file.name.endswith(_WEIGHTS) for file in folder.iterdir())


def _no_weights(name: str, why: str) -> BuildError:
    return BuildError(
        "the model's weights cannot be loaded",
        where=name,
        why=why,
        help="name a directory that holds the weights, or check only the architecture, with --twin",
        code="weights-missing",
    )


def _hub_refusal(loaded: LoadedConfig, revision: str | None) -> SourceError | None:
    """Return why the hub cannot send the weights; None where it can, or they come from a folder."""
    if loaded.origin not in {"cache", "family data"}:
        return None
    refusal = hub.why_not_asked(loaded.name, revision)
    if refusal is None or refusal.code != "hub-offline":
        return refusal
    return weights_not_local(loaded.name, revision, refusal.why)


def _renamed(loaded: LoadedConfig, model_class: type[PreTrainedModel]) -> Mapping[str, str]:
    """Return the other names that the files have for the weights, if that is all that is wrong."""
    found = local_checkpoint(loaded, build_on_meta(loaded.config, model_class))
    return found.renamed if found else {}
