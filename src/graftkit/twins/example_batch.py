"""A valid batch for a model: every modality it takes, with their placeholders and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from graftkit.errors import BuildError
from graftkit.families import family_of
from graftkit.modeling.device import cast_inputs
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.unwrapping import base_model_of
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.generic_inputs import GenericInputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MODALITIES = ("text", "image", "audio")

# Models up to this size run a batch before it is returned; of larger ones it is returned untried.
_TRIED_UP_TO = 200_000_000


def example_batch(
    model: PreTrainedModel,
    *,
    batch_size: int = 2,
    seed: int = 0,
    modalities: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Return model inputs, with labels, that ``model(**batch)`` takes and can be trained on.

    Text is (B, T) int64 ``input_ids`` with an ``attention_mask`` of ones and ``labels`` that ignore (-100)
    the placeholders of images and audio. Images and audio come as the model's forward names and shapes them,
    in its floating-point type. All tensors are on the model's device. A class that computes no loss gets no
    labels.

    Args:
        model: a transformers model, or a PEFT model around one.
        batch_size: number of rows.
        seed: of the random inputs; torch's global random state does not change.
        modalities: which of "text", "image", "audio" to feed; None for all that the model takes.

    Raises:
        BuildError: code ``twin``, where no valid batch is known for the model's class.
    """
    import torch

    wanted = frozenset(MODALITIES if modalities is None else modalities)
    if not wanted or not wanted <= set(MODALITIES):
        raise BuildError(
            f"no such modality: {', '.join(sorted(wanted - set(MODALITIES))) or 'none given'}",
            help=f"choose from {', '.join(MODALITIES)}",
            code="twin",
        )
    base = base_model_of(model)
    generator = torch.Generator().manual_seed(seed)
    try:
        with quiet_transformers():
            batch = cast_inputs(base, _inputs(base, batch_size, generator, wanted))
            _try(base, batch)
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(
            f"no example batch is known for {type(base).__name__}",
            where=getattr(getattr(base, "config", None), "model_type", None),
            why=f"{type(error).__name__}: {error}".strip(),
            help="pass your own batch",
            code="twin",
        ) from error
    return batch


def _inputs(
    model: PreTrainedModel, batch_size: int, generator: torch.Generator, modalities: frozenset[str]
) -> dict[str, torch.Tensor]:
    family = family_of(model.config.model_type)
    if family is not None and family.example_inputs is not None:
        return family.example_inputs(model, batch_size, generator, modalities)
    return GenericInputs(model, batch_size, generator, modalities).batch()


def _try(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Run a small model on the batch once, to know that it takes it."""
    import torch

    if model.device.type == "meta" or sum(p.numel() for p in model.parameters()) > _TRIED_UP_TO:
        return
    with torch.no_grad(), evaluating(model):
        model(**batch)
