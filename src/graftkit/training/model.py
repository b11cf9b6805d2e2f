"""The base model, its processor and the plan that a recipe names, ready for a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import TrainingError
from graftkit.modeling.sharding import is_sharded
from graftkit.planning.plan import Plan
from graftkit.planning.quantization import plan_quantization
from graftkit.recipes.recipe import Recipe
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.sources.load_model import load_model
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.surveying.survey import survey
from graftkit.text import named

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Base:
    """What a trainer is made of.

    Attributes:
        model: the base model, quantized where the recipe says so, without an adapter.
        processor: its processor, or its tokenizer where it takes text alone.
        peft_config: the stock configuration that the trainer attaches.
        map: of the model.
        plan: where the configuration was planned; None for a stock one.
    """

    model: PreTrainedModel
    processor: Any
    peft_config: PeftConfig
    map: ModelMap
    plan: Plan | None


def load_base(recipe: Recipe, modalities: tuple[str, ...], *, trust_remote_code: bool = False) -> Base:
    """Load the model and plan the adapter; nothing is attached yet.

    A recipe without a scope adapts what every batch feeds; towers for pictures and sound have to be asked for.

    Raises:
        SourceError, BuildError: the model cannot be found or loaded.
        TrainingError: ``no-processor``: no tokenizer lies with the model, or no processor for such data.
        PlanError: the recipe's request cannot be met.
    """
    options = dict(recipe.args.get("model_init_kwargs") or {})
    name = recipe.fields.model
    shape = survey(name, trust_remote_code=trust_remote_code)
    if recipe.fields.quantization is not None:
        options["quantization_config"] = plan_quantization(shape, recipe.fields.quantization).config
    model = load_model(name, trust_remote_code=trust_remote_code, **options)
    # What ZeRO-3 has taken apart shows no shapes.
    found = shape if is_sharded(model) else survey(model)
    planned = None if recipe.fields.adapter.peft_config else recipe.plan(found)
    return Base(
        model=model,
        processor=_processor(name, modalities, trust_remote_code),
        peft_config=planned.peft_config if planned else _stock(recipe.fields.adapter.peft_config or {}),
        map=found,
        plan=planned,
    )


def _stock(fields: Mapping[str, Any]) -> PeftConfig:
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**fields)


def _processor(name: str, modalities: tuple[str, ...], trust_remote_code: bool) -> Any:
    """A tokenizer where the batches are text alone: TRL treats a processor's data as pictures."""
    from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

    text = set(modalities) <= {"text"}
    loader, kind = (AutoTokenizer, PreTrainedTokenizerBase) if text else (AutoProcessor, ProcessorMixin)
    try:
        with quiet_transformers():
            found = loader.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of file has its own
        raise _no_processor(name, modalities, named(error)) from error
    # Where a processor's own class cannot be loaded, AutoProcessor hands out a part of it.
    if not isinstance(found, kind):
        raise _no_processor(name, modalities, f"what lies there is a {type(found).__name__}")
    # Without files some tokenizer classes are made without a vocabulary, and turn every text into nothing.
    tokenizer = getattr(found, "tokenizer", found)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise _no_processor(name, modalities, "its vocabulary has no word")
    return found


def _no_processor(name: str, modalities: tuple[str, ...], why: str) -> TrainingError:
    what = "tokenizer" if set(modalities) <= {"text"} else "processor"
    return TrainingError(
        f"the model's {what} cannot be loaded",
        where=name,
        why=why,
        help=f"save it beside the model: {what}.save_pretrained(folder)",
        code="no-processor",
    )
