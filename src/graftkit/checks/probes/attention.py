"""Whether transformers can use an implementation of attention for a model on this machine."""

from __future__ import annotations

from typing import Any

from graftkit.errors import GraftError
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.text import describe
from graftkit.twins.shrink import shrink


def attention_refusal(model: str, implementation: str) -> str | None:
    """Return why transformers refuses the implementation for this model, or None where it accepts it.

    Asked of the model's class, in the size of a twin, without weights.

    Raises:
        SourceError, BuildError: there is no such model to ask.
    """
    loaded = load_config(model)
    small, model_class = shrink(loaded.config), model_class_of(loaded)
    refusal = _build(model_class, small, implementation)
    # A class that cannot be built without weights says nothing about its attention.
    return None if refusal is None or _build(model_class, small, "eager") is not None else refusal


def _build(model_class: Any, config: Any, implementation: str) -> str | None:
    import torch

    try:
        with torch.device("meta"), quiet_transformers():
            model_class._from_config(config, attn_implementation=implementation)
    except GraftError:
        raise
    except Exception as error:  # ImportError and ValueError of transformers, anything of a kernel
        return describe(error)
    return None
