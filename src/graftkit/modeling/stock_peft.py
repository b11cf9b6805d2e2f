"""Stock PEFT on any model: attaching a configuration, and loading a saved adapter.

Around PEFT's own call stands what some models and tuners need while it runs; what it makes is PEFT's, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftkit.modeling.extensions import own_extension_folder
from graftkit.surveying.faults import hides_input_embeddings

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_FIELD = "tie_word_embeddings"


def adapt(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """Attach a configuration with ``peft.get_peft_model``, which changes the model, and edits the configuration.

    Args:
        options: of ``get_peft_model``.

    Raises:
        Exception: whatever PEFT raises.
    """
    from peft import get_peft_model

    with own_extension_folder(), _nothing_tied_to_words(model):
        return cast("PeftModel", get_peft_model(cast("PreTrainedModel", model), config, **options))


def load(model: nn.Module, folder: str | Path) -> PeftModel:
    """Load a saved adapter on its base with ``PeftModel.from_pretrained``, which changes the model.

    Raises:
        Exception: whatever PEFT raises.
    """
    from peft import PeftModel

    with own_extension_folder(), _nothing_tied_to_words(model):
        return PeftModel.from_pretrained(model, str(folder))


@contextmanager
def _nothing_tied_to_words(model: nn.Module) -> Iterator[None]:
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
