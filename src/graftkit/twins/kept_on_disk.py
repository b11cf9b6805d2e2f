"""What took long to find out about a class of models, kept on disk for the next process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit._version import __version__
from graftkit.errors import OutputError
from graftkit.files import write_text
from graftkit.twins.source_hash import source_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DIGITS = 16


def kept_on_disk(
    what: str, model_class: type[PreTrainedModel], depends_on: Mapping[str, Any], find: Callable[[], Any]
) -> Any:
    """Return what ``find()`` found in an earlier process, or call it now and keep what it returns.

    Entries lie in huggingface_hub's folder for the assets of libraries. What was found with other versions of
    graftkit or transformers, or other sources of the class, is found again. Where the folder cannot be written,
    nothing is kept.

    Args:
        what: a name for the kind of knowledge, as in "unreached".
        model_class: the class that it is about.
        depends_on: whatever else decides the answer, as JSON.
        find: returns the answer, as JSON.
    """
    name = f"{model_class.__name__}-{_digest(model_class, depends_on)}.json"
    with suppress(OSError, ValueError):
        return json.loads((_folder(what) / name).read_text(encoding="utf-8"))
    found = find()
    with suppress(OSError, OutputError):
        write_text(_folder(what) / name, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found


def _folder(what: str) -> Path:
    import transformers
    from huggingface_hub import cached_assets_path

    version = f"transformers-{transformers.__version__}"
    return Path(cached_assets_path("graftkit", namespace=what, subfolder=version))


def _digest(model_class: type[PreTrainedModel], depends_on: Mapping[str, Any]) -> str:
    key = [__version__, source_hash(model_class), depends_on]
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:_DIGITS]
