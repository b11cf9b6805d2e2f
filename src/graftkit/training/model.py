"""The base model, its processor and the adapter's configuration that a recipe asks for, ready for a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftkit.errors import TrainingError
from graftkit.planning.plan import Plan
from graftkit.planning.quantization import plan_quantization
from graftkit.recipes.recipe import Recipe
from graftkit.surveying.quantized import quantization_of
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.sources.load_model import load_model
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.surveying.survey import survey
from graftkit.text import describe

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


# Arguments of from_pretrained with which the files mean something else than by themselves.
_OTHER_READING = frozenset({"key_mapping", "ignore_mismatched_sizes"})


@dataclass(frozen=True)
class LoadedBase:
    """A base model, and what a trainer needs to adapt it.

    Attributes:
        model: quantized where the recipe says so, without an adapter.
        processor: the model's processor, or its tokenizer for text alone.
        peft_config: a stock configuration, for the trainer to attach.
        plan: None for a configuration that was not planned.
    """

    model: PreTrainedModel
    processor: Any
    peft_config: PeftConfig
    map: ModelMap
    plan: Plan | None


def load_base(recipe: Recipe, modalities: tuple[str, ...], *, trust_remote_code: bool = False) -> LoadedBase:
    """Load the model and plan the adapter; nothing is attached yet.

    A recipe without a scope adapts the towers that every batch feeds; vision and audio towers must be named.

    Raises:
        SourceError, BuildError: the model cannot be found or loaded.
        TrainingError: ``no-processor``: the model has no tokenizer, or no processor for such data;
            ``model-options``: the model cannot be loaded with the recipe's options; ``no-generation``: its class
            generates no text.
        PlanError: the recipe's request cannot be met.
    """
    options = dict(recipe.args.get("model_init_kwargs") or {})
    name = recipe.fields.model
    # Survey the configuration: a model that ZeRO-3 shards as it is loaded has no shapes.
    model_map = survey(name, trust_remote_code=trust_remote_code)
    if recipe.fields.quantization is not None:
        options["quantization_config"] = plan_quantization(model_map, recipe.fields.quantization).config
    processor = _processor(name, modalities, trust_remote_code)
    try:
        model = load_model(name, trust_remote_code=trust_remote_code, **options)
    except (TypeError, ImportError) as error:  # an option that the class does not know, or a library it needs
        raise _refused_options(recipe, error) from error
    if getattr(model, "generation_config", None) is None:  # TRL's trainers set its tokens
        raise _generates_nothing(model, name)
    model_map = _as_quantized(model_map, model)
    if not _OTHER_READING.isdisjoint(options):
        # What loading missed is known, and what the files miss under their own names no longer counts.
        model_map = replace(model_map, checkpoint=None)
    stock = recipe.fields.adapter.peft_config
    plan = None if stock else recipe.plan(model_map)
    return LoadedBase(
        model=model,
        processor=processor,
        peft_config=plan.peft_config if plan else _stock(stock or {}),
        map=model_map,
        plan=plan,
    )


def _as_quantized(model_map: ModelMap, model: nn.Module) -> ModelMap:
    """Return the map with the sites marked that were quantized as the model was loaded."""
    quantized = {path: quantization_of(module) for path, module in model.named_modules()}
    sites = tuple(replace(site, quantized=quantized.get(site.path)) for site in model_map)
    return replace(model_map, sites=sites)


def _stock(fields: Mapping[str, Any]) -> PeftConfig:
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**fields)


def _processor(name: str, modalities: tuple[str, ...], trust_remote_code: bool) -> Any:
    """Load a tokenizer where the batches are text alone: TRL treats a processor's data as images."""
    from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

    text = set(modalities) <= {"text"}
    loader, kind = (AutoTokenizer, PreTrainedTokenizerBase) if text else (AutoProcessor, ProcessorMixin)
    try:
        with quiet_transformers():
            found = loader.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # each kind of file has its own
        raise _no_processor(name, text, describe(error)) from error
    # If a processor's own class cannot be loaded, AutoProcessor returns a part of it.
    if not isinstance(found, kind):
        raise _no_processor(name, text, f"a {type(found).__name__} was loaded instead")
    # Without files some tokenizer classes are made without a vocabulary, and encode every text as nothing.
    tokenizer = getattr(found, "tokenizer", found)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise _no_processor(name, text, "its vocabulary is empty")
    return found


def _generates_nothing(model: PreTrainedModel, name: str) -> TrainingError:
    return TrainingError(
        "the trainers take models that generate text",
        where=name,
        why=f"its config.json names {type(model).__name__}, which does not",
        help="train it with transformers' Trainer: gk.attach(model, plan), and gk.Guard(plan) among its callbacks",
        code="no-generation",
    )


def _refused_options(recipe: Recipe, error: Exception) -> TrainingError:
    return TrainingError(
        "the model cannot be loaded with the recipe's options",
        where=recipe.document.where(("args", "model_init_kwargs")),
        why=describe(error),
        help="args: {model_init_kwargs: …} takes the arguments of transformers' from_pretrained",
        code="model-options",
    )


def _no_processor(name: str, text: bool, why: str) -> TrainingError:
    what = "tokenizer" if text else "processor"
    return TrainingError(
        f"the model's {what} cannot be loaded",
        where=name,
        why=why,
        help=f"save it beside the model: {what}.save_pretrained(folder)",
        code="no-processor",
    )
