"""A valid batch for a model: every modality it takes, with their placeholders and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError
from graftkit.families import family_of
from graftkit.families._known_twins import known_twin
from graftkit.modeling.device import cast_inputs
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.unwrapping import base_model_of
from graftkit.progress import Progress
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.batches.found import cache_recipe, cached_recipe
from graftkit.twins.batches.recipe import MODALITIES, Recipe, make_batch
from graftkit.twins.batches.search import SECONDS, NoRecipe, find_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Models up to this size run a batch before it is returned, and are searched; larger ones are not run at all.
_TRIED_UP_TO = 200_000_000


def example_batch(
    model: PreTrainedModel,
    *,
    batch_size: int = 2,
    seed: int = 0,
    modalities: Iterable[str] | None = None,
    seconds: float = SECONDS,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Return model inputs, with labels, that ``model(**batch)`` takes and can be trained on.

    Text is (B, T) int64 ``input_ids`` with an ``attention_mask`` of ones and ``labels`` that ignore (-100)
    the placeholders of images and audio. Other modalities come as the model's forward names and shapes them,
    in its floating-point type. All tensors are on the model's device; flags such as ``use_cache`` are Python's.
    A class that computes no loss gets no labels.

    What a class takes is known for those of transformers. For another it is searched on the model, and kept on
    disk.

    Args:
        model: a transformers model, or a PEFT model around one.
        batch_size: number of rows.
        seed: of the random inputs; torch's global random state does not change.
        modalities: which of "text", "image", "audio", "video" to feed; None for all that the model takes.
        seconds: how long a search may take.
        on_progress: called while a batch is searched.

    Raises:
        BuildError: code ``twin``, where no valid batch is known for the model's class.
    """
    wanted = frozenset(MODALITIES if modalities is None else modalities)
    if not wanted or not wanted <= set(MODALITIES):
        raise BuildError(
            f"no such modality: {', '.join(sorted(wanted - set(MODALITIES))) or 'none given'}",
            help=f"choose from {', '.join(MODALITIES)}",
            code="twin",
        )
    base = base_model_of(model)
    refused: Exception | None = None
    with quiet_transformers():
        for make in _ways(base, batch_size, wanted, _Search(seconds, on_progress)):
            try:
                batch = cast_inputs(base, make(_generator(seed)))
                _try(base, batch)
            except NoRecipe as error:
                refused = error.failure.error if error.failure else error
            except Exception as error:
                refused = refused or error
            else:
                return batch
    raise BuildError(
        f"no example batch is known for {type(base).__name__}",
        where=getattr(getattr(base, "config", None), "model_type", None),
        why=f"{type(refused).__name__}: {refused}".strip(),
        help="pass your own batch",
        code="twin",
    ) from refused


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _ways(
    model: PreTrainedModel,
    batch_size: int,
    modalities: frozenset[str],
    search: _Search,
) -> Iterator[Callable[[torch.Generator], dict[str, Any]]]:
    """Yield ways to make a batch, the surest first: the family's own, the known recipe, one found by searching."""
    family = family_of(model.config.model_type)
    if family is not None and family.example_inputs is not None:
        make = family.example_inputs
        yield lambda generator: make(model, batch_size, generator, modalities)
        return
    model_class = type(model)
    known = known_twin(model_class.__name__)
    for recipe in (known.batch if known else None, cached_recipe(model_class)):
        if recipe:
            yield partial(_made, model, batch_size, modalities, recipe)
    if _is_small(model):
        yield lambda generator: _made(model, batch_size, modalities, search.recipe(model), generator)


def _made(
    model: PreTrainedModel,
    batch_size: int,
    modalities: frozenset[str],
    recipe: Recipe,
    generator: torch.Generator,
) -> dict[str, Any]:
    return make_batch(recipe, model, batch_size, generator, modalities)


@dataclass(frozen=True)
class _Search:
    seconds: float
    on_progress: Callable[[Progress], None] | None

    def recipe(self, model: PreTrainedModel) -> Recipe:
        found = find_recipe(model, seconds=self.seconds, on_progress=self.on_progress).recipe
        cache_recipe(type(model), found)
        return found


def _is_small(model: PreTrainedModel) -> bool:
    size: int = sum(p.numel() for p in model.parameters())
    return model.device.type != "meta" and size <= _TRIED_UP_TO


def _try(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Run a small model on the batch once, to know that it takes it."""
    import torch

    if not batch:
        raise ValueError("its forward takes none of the wanted modalities")
    if _is_small(model):
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
            model(**batch)
