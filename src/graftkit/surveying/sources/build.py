"""Configuration -> model on the meta device: every shape, and no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.errors import BuildError
from graftkit.surveying.sources.model_class import model_class_for
from graftkit.surveying.sources.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_on_meta(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Build the model that ``config`` describes on the meta device.

    Raises:
        BuildError: the class refuses the configuration.
    """
    import torch
    from transformers.modeling_utils import set_zero3_state

    model_class = model_class or model_class_for(config)
    try:
        # Where ZeRO-3 is on, transformers would have DeepSpeed shard parameters that have no storage.
        with torch.device("meta"), quiet_transformers(), set_zero3_state():
            return model_class._from_config(config)
    except Exception as error:
        raise BuildError(
            f"{model_class.__name__} cannot be built from this configuration",
            where=config.model_type,
            why=f"{type(error).__name__}: {error}",
            help="check the configuration's values against the class's documentation",
        ) from error
