"""Configuration -> a live, tiny, random model of the same class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError, GraftError
from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.modeling.threads import one_thread
from graftkit.modeling.unwrapping import base_model_of
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.bounds import calibrate_bounds
from graftkit.twins.example_batch import example_batch
from graftkit.twins.shrink import no_twin, shrink
from graftkit.twins.weights import redraw_weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# A shrunk model with more parameters is not built: the rules do not know what makes it large.
_MOST_PARAMETERS = 200_000_000


def twin(
    source: Any,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Build a live, tiny model of the same architecture as ``source``: same class, random weights, on the CPU.

    The twin is in eval mode. Its weights are drawn so that logits depend on the input and every tower gets a
    gradient; wrappers with infinite clip bounds get bounds that clamp a few percent of their activations. The
    same ``seed`` gives the same weights, and torch's global random state does not change.

    Args:
        source: a model, a configuration, a path, a model type or a hub id.
        seed: of the weights.
        dtype: of the floating-point weights; float32 if None.
        overrides: configuration values the twin must have (see ``shrink``).
        trust_remote_code: let configuration and model code from the hub or from a directory run.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: ``source`` names no model.
        BuildError: code ``twin``: the class cannot be built from the shrunk configuration.
    """
    import torch

    config, model_class = _resolve(source, trust_remote_code, revision)
    small = shrink(config, overrides)
    # fork_rng() restores the CPU's generator; other devices' are not touched.
    with quiet_transformers(), one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(model_class, small, dtype or torch.float32)
        redraw_weights(model, torch.Generator().manual_seed(seed))
        model.eval()
        if bounded_wrappers(model):
            calibrate_bounds(model, _batch_or_none(model))
    return model


def _resolve(
    source: Any, trust_remote_code: bool, revision: str | None
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    from transformers import PreTrainedModel

    model = base_model_of(source)
    if isinstance(model, PreTrainedModel):
        return model.config, type(model)
    loaded = load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    try:
        return loaded.config, model_class_of(loaded)
    except GraftError:
        raise
    except Exception as error:
        what = f"the model class for {type(loaded.config).__name__} could not be found"
        raise no_twin(what, loaded.config, error, "pass the model itself: gk.twin(model)") from error


def _build(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    _refuse_large(model_class, config)
    try:
        return model_class._from_config(config, dtype=dtype)
    except Exception as error:
        what = f"{model_class.__name__} cannot be built from its shrunk configuration"
        help = "pass overrides for the values it names: gk.twin(source, overrides={...})"
        raise no_twin(what, config, error, help) from error


def _refuse_large(model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
    try:
        size = sum(p.numel() for p in build_on_meta(config, model_class).parameters())
    except BuildError:
        return  # some classes compute with values while they are built: _build() reports a failure
    if size > _MOST_PARAMETERS:
        what = f"shrunk, {model_class.__name__} would still have {size:,} parameters"
        why = "its configuration sets sizes under names that the shrinking rules do not know"
        raise no_twin(what, config, why, "pass overrides for its size fields: gk.twin(source, overrides={...})")


def _batch_or_none(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    try:
        return example_batch(model)
    except BuildError:
        return None
