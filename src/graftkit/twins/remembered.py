"""What was found out about classes on this machine: once, not in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit._version import __version__
from graftkit.errors import OutputError
from graftkit.files import write_text
from graftkit.twins.source_hash import source_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DIGITS = 16


class Fact(Enum):
    """What can be remembered of a class: the keys of ``graftkit.families._known_twins.KnownTwin``."""

    KEPT = "kept"
    BATCH = "batch"
    UNREACHED = "unreached"


def recall(fact: Fact, model_class: type[PreTrainedModel], depends_on: Mapping[str, Any] | None = None) -> Any:
    """Return what was remembered of a class, as JSON has it, or None.

    What was found with other versions of graftkit or transformers, or other sources of the class, is not recalled.

    Args:
        fact: the kind of knowledge.
        model_class: the class that it is about.
        depends_on: what else it was remembered with, as JSON.
    """
    try:
        return json.loads(_place(fact, model_class, depends_on).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(
    fact: Fact, model_class: type[PreTrainedModel], value: Any, depends_on: Mapping[str, Any] | None = None
) -> None:
    """Keep something that JSON can hold for later processes; where nothing can be written they find it again.

    Args:
        fact, model_class: as for ``recall``.
        value: it lies in huggingface_hub's folder for the assets of libraries.
        depends_on: whatever decides the value beside the class.
    """
    try:
        write_text(_place(fact, model_class, depends_on), json.dumps(value, indent=1) + "\n")
    except (OSError, ValueError, OutputError):  # the folder cannot be made, or not be written
        return


def forget(model_class: type[PreTrainedModel]) -> None:
    """Forget what was remembered of a class, whatever it depended on."""
    for fact in Fact:
        for place in _folder(fact).glob(f"{model_class.__name__}-*.json"):
            place.unlink(missing_ok=True)


def _place(fact: Fact, model_class: type[PreTrainedModel], depends_on: Mapping[str, Any] | None) -> Path:
    key = json.dumps([source_hash(model_class), depends_on], sort_keys=True, default=str)
    digest = hashlib.sha256(key.encode()).hexdigest()[:_DIGITS]
    return _folder(fact) / f"{model_class.__name__}-{digest}.json"


def _folder(fact: Fact) -> Path:
    import transformers
    from huggingface_hub import cached_assets_path

    versions = f"{__version__}-transformers-{transformers.__version__}"
    return Path(cached_assets_path("graftkit", namespace=fact.value, subfolder=versions))
