"""Configuration -> model class -> model on the meta device (shapes only, no weights)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The task heads to try, the most general generative one first. A configuration that names its own
# architecture never reaches this list.
_AUTO_CLASSES = (
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForCTC",
    "AutoModelForImageClassification",
    "AutoModel",
)


def model_class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that ``config`` would be loaded into.

    The first of ``config.architectures`` that transformers has, else the first task in a fixed order that
    knows the configuration's type.

    Raises:
        BuildError: no class of the installed transformers takes this configuration.
    """
    import transformers

    for name in config.architectures or ():
        named: Any = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for auto_name in _AUTO_CLASSES:
        mapping = getattr(transformers, auto_name)._model_mapping
        if type(config) in mapping.keys():  # noqa: SIM118 (a lazy mapping: `in` would test names)
            chosen = mapping[type(config)]
            return chosen[0] if isinstance(chosen, tuple) else chosen  # type: ignore[no-any-return]
    raise BuildError(
        f"no model class of transformers {transformers.__version__} takes {type(config).__name__}",
        where=config.model_type,
        why="the configuration names no architecture, and no auto class maps its type",
        help="pass the model itself: gk.survey(model)",
        code="no-model-class",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice about random weights and token ids out of the user's terminal."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def build_on_meta(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Build the model that ``config`` describes on the meta device: every shape and no storage.

    Raises:
        BuildError: the class refuses the configuration.
    """
    import torch
    from transformers.modeling_utils import set_zero3_state

    model_class = model_class or model_class_for(config)
    try:
        # Where ZeRO-3 is on, transformers would have DeepSpeed take the parameters apart, which have no storage.
        with torch.device("meta"), quiet_transformers(), set_zero3_state():
            return model_class._from_config(config)
    except Exception as error:
        raise BuildError(
            f"{model_class.__name__} cannot be built from this configuration",
            where=config.model_type,
            why=f"{type(error).__name__}: {error}",
            help="check the configuration's values against the class's documentation",
        ) from error
