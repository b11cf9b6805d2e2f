"""A valid batch for a model: every modality it takes, with their placeholders and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError, GraftError
from graftkit.families import family_of
from graftkit.families._known_twins import known_twin
from graftkit.modeling.device import cast_inputs
from graftkit.modeling.entry import parts_to_run
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.unwrapping import base_model_of
from graftkit.progress import Progress
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.twins.batches.recipe import MODALITIES, Recipe, is_recipe, make_batch
from graftkit.twins.batches.search import SECONDS, NoRecipe, find_recipe
from graftkit.twins.remembered import Fact, recall, remember

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
    A class that computes no loss gets no labels. A class without a forward gets the inputs of its parts, by their
    names, but for parts that nothing is known to feed.

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
    if parts := parts_to_run(base):
        tried = [
            _of_part(part, batch_size, seed, wanted, seconds / len(parts), on_progress) for part in parts.values()
        ]
        return _fed(base, dict(zip(parts, tried, strict=True)))
    refused: Exception | None = None
    with quiet_transformers():
        for make in _ways(base, batch_size, wanted, _Search(seconds, on_progress)):
            try:
                batch = cast_inputs(base, make(_generator(seed)))
                _try(base, batch)
            except Exception as error:
                refused = error if isinstance(error, NoRecipe) else refused or error
            else:
                return batch
    refused = refused or ValueError("it is too large to be searched")
    raise _no_batch(base, refused) from _cause(refused)


def _of_part(
    part: PreTrainedModel,
    batch_size: int,
    seed: int,
    modalities: frozenset[str],
    seconds: float,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, Any] | BuildError:
    """Return the inputs of a part, or why there are none."""
    try:
        return example_batch(
            part,
            batch_size=batch_size,
            seed=seed,
            modalities=modalities,
            seconds=seconds,
            on_progress=on_progress,
        )
    except BuildError as error:
        return error


def _fed(model: PreTrainedModel, tried: Mapping[str, dict[str, Any] | BuildError]) -> dict[str, Any]:
    """Return the inputs of the parts that have any, by name.

    Raises:
        BuildError: that of the first part, where none has.
    """
    fed = {name: batch for name, batch in tried.items() if isinstance(batch, dict)}
    if fed:
        return fed
    refused = next(error for error in tried.values() if isinstance(error, BuildError))
    raise _no_batch(model, refused) from refused


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
    for recipe in (known.batch if known else None, recall(Fact.BATCH, model_class)):
        if recipe and is_recipe(recipe):
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
class Searched:
    """The outcome of a search on one model.

    Attributes:
        batch: inputs on the model's device, that it ran on.
        recipe: what they were made from; None where the family's own code made them, or where they are of parts.
        unfed: why modalities are missing that the forward takes, by modality.
    """

    batch: Mapping[str, Any]
    recipe: Recipe | None = None
    unfed: Mapping[str, NoRecipe] = field(default_factory=dict)


def search_batch(model: PreTrainedModel, seconds: float = SECONDS) -> Searched:
    """Search for a batch on a small model, whatever is known or remembered of its class.

    Raises:
        BuildError: code ``twin``, where none is found.
    """
    family = family_of(model.config.model_type)
    if parts_to_run(model) or (family is not None and family.example_inputs is not None):
        return Searched(example_batch(model, seconds=seconds))
    try:
        with quiet_transformers():
            found = find_recipe(model, seconds=seconds)
            batch = cast_inputs(model, make_batch(found.recipe, model, 2, _generator(0)))
    except Exception as error:
        raise _no_batch(model, error) from error
    return Searched(batch, found.recipe, {m: NoRecipe(failure) for m, failure in found.unfed.items()})


def _no_batch(model: PreTrainedModel, error: Exception) -> BuildError:
    cause = _cause(error)
    return BuildError(
        f"no example batch is known for {type(model).__name__}",
        where=getattr(getattr(model, "config", None), "model_type", None),
        why=f"{type(cause).__name__}: {cause.what if isinstance(cause, GraftError) else cause}".strip(),
        help="pass your own batch",
        code="twin",
    )


def _cause(error: Exception) -> Exception:
    """Return what a model raised, where that is why a search found nothing."""
    return error.failure.error if isinstance(error, NoRecipe) and error.failure else error


@dataclass(frozen=True)
class _Search:
    seconds: float
    on_progress: Callable[[Progress], None] | None

    def recipe(self, model: PreTrainedModel) -> Recipe:
        recipe = find_recipe(model, seconds=self.seconds, on_progress=self.on_progress).recipe
        remember(Fact.BATCH, type(model), recipe)
        return recipe


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
