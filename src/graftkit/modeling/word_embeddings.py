"""Models without word embeddings: what PEFT has to be told of them before it adapts one, or loads an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.surveying.faults import hides_input_embeddings

if TYPE_CHECKING:
    from torch import nn

_FIELD = "tie_word_embeddings"


@contextmanager
def nothing_tied_to_words(model: nn.Module) -> Iterator[None]:
    """Have the configuration say, for the block, that no word embeddings are tied, where the class names none.

    PEFT asks such a model for its input embeddings, to see what is tied to them, unless the configuration says
    that nothing is. What is tied otherwise (two heads) stays so: while a model lives nothing else reads the field.
    Its value is restored, because loading the saved model reads it.
    """
    config: Any = getattr(model, "config", None)
    if not hides_input_embeddings(model):
        yield
        return
    kept = {name: value for name, value in vars(config).items() if name == _FIELD}
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        vars(config).pop(_FIELD, None)
        vars(config).update(kept)
