"""What was found out about unknown classes on this machine: once, not in every process."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit._version import __version__
from graftkit.errors import OutputError
from graftkit.files import write_text
from graftkit.twins.source_hash import source_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Fact(Enum):
    """What can be remembered of a class: the keys of ``graftkit.families._known_twins.KnownTwin``."""

    KEPT = "kept"
    BATCH = "batch"
    UNREACHED = "unreached"


def recall(fact: Fact, model_class: type[PreTrainedModel]) -> Any:
    """Return what was remembered of a class with the same sources and versions, as JSON has it, or None."""
    try:
        return json.loads(_place(fact, model_class).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(fact: Fact, model_class: type[PreTrainedModel], value: Any) -> None:
    """Keep something that JSON can hold for later processes; where nothing can be written they find it again."""
    try:
        write_text(_place(fact, model_class), json.dumps(value, indent=1))
    except (OSError, OutputError):
        return


def forget(model_class: type[PreTrainedModel]) -> None:
    """Forget what was remembered of a class."""
    for fact in Fact:
        _place(fact, model_class).unlink(missing_ok=True)


def _place(fact: Fact, model_class: type[PreTrainedModel]) -> Path:
    import transformers
    from huggingface_hub import cached_assets_path

    versions = f"{__version__}-transformers-{transformers.__version__}"
    folder = cached_assets_path("graftkit", namespace=fact.value, subfolder=versions)
    return Path(folder) / f"{model_class.__name__}-{source_hash(model_class)}.json"
