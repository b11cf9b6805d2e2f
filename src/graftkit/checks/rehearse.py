"""``rehearse()``: a recipe run as far as its first batch, on the model itself or on its twin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import attach, attach_stock
from graftkit.checks.doctor import STATIC, static_facts
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Rule
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.probes.forward import leaving_no_trace, sits_in_layers
from graftkit.checks.rules import all_rules
from graftkit.errors import AttachError, BuildError, PlanError
from graftkit.findings import Report
from graftkit.planning.quantization import plan_quantization
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training, training_of
from graftkit.surveying.sources import hub
from graftkit.surveying.sources.build import quiet_transformers
from graftkit.surveying.sources.load_model import load_model
from graftkit.surveying.survey import survey
from graftkit.twins.batch import example_batch
from graftkit.twins.build import twin

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Facts that a rehearsal can supply.
LIVE = (*STATIC, "model", "batch")


def rehearse(
    recipe: Recipe,
    model: Any = None,
    *,
    on_twin: bool = True,
    seed: int = 0,
    settings: CheckSettings | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Callable[[str], None] = lambda _step: None,
) -> Report:
    """Do what training with this recipe would do up to the first batch, and run every rule on the result.

    What is adapted and what it costs is told of the real architecture; gradients, caches, packing and merging are
    tried on a live model: quantized, adapted, with checkpointing and with a batch as the recipe has them.

    Args:
        recipe: what is going to be trained, and how.
        model: instead of the recipe's: anything ``survey`` takes by name.
        on_twin: try it on a tiny random model of the same architecture; otherwise the weights are loaded.
        seed: of the twin and of its batch.
        settings: which rules, with which limits; those of the recipe if None.
        trust_remote_code: let the model's own code run.
        revision: branch, tag or commit of a hub id.
        progress: called with each step before it is taken.

    Raises:
        SourceError, BuildError: the model cannot be found, built or loaded.
    """
    progress("reading the architecture")
    source = recipe.fields.model if model is None else model
    place = _Place(source, trust_remote_code, revision)
    context = static_facts(
        source, recipe=recipe, settings=settings, trust_remote_code=trust_remote_code, revision=revision
    )
    context = replace(context, processor=place.processor())
    live = context
    if context.base is not None and context.recipe_refusal is None:
        progress("building the twin" if on_twin else "loading the model")
        live = _with_live(context, place, on_twin, seed)
    static, dynamic = _parted(all_rules())

    def tell(rule: Rule) -> None:
        progress(f"{rule.code} {rule.title}")

    told = replace(context, recipe_refusal=live.recipe_refusal, checkpoint=live.checkpoint)
    traceless = nullcontext() if live.model is None else leaving_no_trace(live.model)
    with quiet_transformers(), traceless:
        found = (*run(static, told, progress=tell), *run(dynamic, live, progress=tell))
    return Report(tuple(sorted(found, key=lambda finding: finding.code)))


def _parted(rules: tuple[Rule, ...]) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
    """Rules that look at the architecture, the real one, and rules that look at the model that is tried."""
    static = decidable(rules, STATIC)
    return static, tuple(rule for rule in decidable(rules, LIVE) if rule not in static)


# Source: bitsandbytes.nn.Linear4bit.forward.
_REPACKING = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class _Place:
    """Where the model comes from."""

    source: Any
    trust_remote_code: bool
    revision: str | None

    def live(self, on_twin: bool, seed: int) -> PreTrainedModel:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
        return twin(self.source, seed=seed, **options) if on_twin else load_model(self.source, **options)

    def processor(self) -> Any | None:
        """The model's processor or tokenizer where it lies on this machine; nothing is downloaded for it."""
        from transformers import AutoProcessor, AutoTokenizer

        if not isinstance(self.source, (str, Path)):
            return None
        for loader in (AutoProcessor, AutoTokenizer):
            with suppress(Exception), quiet_transformers():
                return loader.from_pretrained(
                    str(self.source),
                    trust_remote_code=self.trust_remote_code,
                    revision=self.revision or "main",
                    local_files_only=True,
                )
        return None

    def folder(self) -> Path | None:
        """The folder with the model's weights, where it lies on this machine."""
        if not isinstance(self.source, (str, Path)):
            return None
        if Path(self.source).is_dir():
            return Path(self.source)
        found = hub.from_cache(str(self.source), "config.json", self.revision)
        return None if found is None else found.path.parent


def _with_live(context: CheckContext, place: _Place, on_twin: bool, seed: int) -> CheckContext:
    """With the model in the state in which training would begin, and a batch for it."""
    assert context.recipe is not None
    training = training_of(context.recipe)
    try:
        adapted = _adapted(place.live(on_twin, seed), context.recipe)
    except (PlanError, AttachError) as error:
        return replace(context, recipe_refusal=error)
    if not sits_in_layers(adapted):
        return context
    _prepare(adapted, training)
    context = replace(
        context, model=adapted, base=survey(adapted), plan=None, checkpoint=None if on_twin else place.folder()
    )
    with suppress(BuildError):
        batch = example_batch(adapted.get_base_model(), seed=seed, modalities=training.modalities)
        context = replace(context, batch=batch)
    return context


def _adapted(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    if recipe.fields.quantization is not None:
        model = _quantized(model, recipe.fields.quantization)
    stock = recipe.fields.adapter.peft_config
    return attach(model, recipe.plan(model)) if stock is None else attach_stock(model, stock)


def _quantized(model: PreTrainedModel, bits: str) -> PreTrainedModel:
    """The model as it is loaded under bitsandbytes, with all left in 16 bit that a plan leaves there."""
    config = plan_quantization(survey(model), bits).config
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        loaded: PreTrainedModel = type(model).from_pretrained(folder, quantization_config=config)
    for module in loaded.modules():
        if hasattr(module, _REPACKING):
            # A faster CPU kernel repacks the weights for good, and refuses widths below 32, which twins have.
            setattr(module, _REPACKING, False)
    return loaded


def _prepare(model: PeftModel, training: Training) -> None:
    """What the trainer does to the model before its first step.

    Source: ``trl.trainer.sft_trainer.SFTTrainer.__init__`` and ``transformers.Trainer``: input gradients, then
    checkpointing with the options given.
    """
    if not training.checkpointing:
        return
    with suppress(ValueError):  # a class without checkpointing: the trainer would say so itself
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": training.reentrant})
        model.enable_input_require_grads()
