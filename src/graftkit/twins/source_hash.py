"""A hash of the sources that what was found out about a class depends on."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 12


def source_hash(model_class: type[PreTrainedModel]) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of the modules that define a class and its configuration.

    Whole modules: a layer, a tower or a default that the forward depends on is seldom in the class itself. Sources
    that cannot be read (a class made in a session) count as their qualified names.
    """
    classes = (model_class, getattr(model_class, "config_class", None))
    texts = [_source(part) for part in classes if part is not None]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:_LENGTH]


def _source(part: type) -> str:
    module = inspect.getmodule(part)
    try:
        return inspect.getsource(module) if module is not None else inspect.getsource(part)
    except (OSError, TypeError):
        return f"{part.__module__}.{part.__qualname__}"
