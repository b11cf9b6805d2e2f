"""``rehearse()``: run a recipe up to its first batch, on the model or on its twin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import attach, attach_stock
from graftkit.attaching.initial_values.compute import as_plain, compute_initial_values
from graftkit.checks.doctor import STATIC, settings_of, static_inputs
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import Rule
from graftkit.checks.engine.runner import decidable, run
from graftkit.checks.probes.live_adapter import restoring_state, sits_in_layers
from graftkit.checks.probes.quantizing import quantized
from graftkit.checks.rules import all_rules
from graftkit.errors import AttachError, BuildError, PlanError
from graftkit.findings import Report
from graftkit.modeling.random_state import seeding
from graftkit.modeling.threads import one_thread
from graftkit.planning.plan import Plan
from graftkit.planning.plan import plan as make_plan
from graftkit.progress import Progress, timed
from graftkit.recipes.initializer import recipe_initializer
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training, training_of
from graftkit.surveying.sources.load_model import load_model
from graftkit.surveying.sources.local import local_folder
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.surveying.survey import survey
from graftkit.twins.description import TwinDescription, describe_twin
from graftkit.twins.example_batch import example_batch
from graftkit.twins.twin import twin

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The inputs that a rehearsal gives.
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
    on_progress: Callable[[Progress], None] | None = None,
    on_description: Callable[[TwinDescription], None] | None = None,
) -> Report:
    """Do what training with this recipe does up to the first batch, and run every rule on the result.

    Targets and costs are checked on the real architecture; gradients, caches, packing and merging on a live model
    with the recipe's quantization, adapter, checkpointing and batch.

    Args:
        model: instead of the recipe's: a name that ``survey`` takes.
        on_twin: use a tiny random model of the same architecture instead of loading the weights.
        seed: of the twin, of its fresh adapter and of its batch.
        settings: which rules, with which limits; those of the recipe if None.
        trust_remote_code: allow the model's own code to run.
        revision: branch, tag or commit of a hub id.
        on_progress: called before each step; the rules on the architecture and on the model are counted apart.
        on_description: called with what the twin has of the model, once it is built.

    Returns:
        One finding a rule; ``Report.seconds`` has "architecture", "model", "adapter" and "batch".

    Raises:
        SourceError, BuildError: the model cannot be found, built or loaded.
    """
    report = on_progress or (lambda _progress: None)
    report(Progress("reading the architecture", 0, None))
    seconds: dict[str, float] = {}
    origin = _ModelSource(recipe.fields.model if model is None else model, trust_remote_code, revision)
    with timed(seconds, "architecture"):
        given = static_inputs(origin.source, recipe=recipe, trust_remote_code=trust_remote_code, revision=revision)
    live = given
    if given.base is not None and given.recipe_refusal is None:
        report(Progress("building the twin" if on_twin else "loading the model", 0, None))
        given = given if on_twin else replace(given, checkpoint=origin.folder())
        try:
            with timed(seconds, "model"):
                built = origin.twin(seed, on_progress) if on_twin else origin.loaded()
            if on_twin and on_description is not None:
                on_description(describe_twin(built))
            live = _with_live(given, recipe, built, on_twin, seed, seconds)
        except (PlanError, AttachError) as error:
            live = given = replace(given, recipe_refusal=error)
    chosen = settings or settings_of(recipe)
    unchanged = nullcontext() if live.model is None else restoring_state(live.model)
    with quiet_transformers(), unchanged, one_thread() if on_twin else nullcontext():
        of_architecture = run(_static_rules(), CheckContext(given, chosen), on_progress=on_progress)
        of_model = run(_live_rules(), CheckContext(live, chosen), on_progress=on_progress)
    # No rule is in both.
    return Report(tuple(sorted((*of_architecture, *of_model), key=lambda finding: finding.code)), seconds)


def _static_rules() -> tuple[Rule, ...]:
    """Return the rules that look neither at the live model nor at its batch."""
    return tuple(rule for rule in decidable(all_rules(), STATIC) if set(rule.reads) <= set(STATIC))


def _live_rules() -> tuple[Rule, ...]:
    """Return the rules that look at the live model or at its batch."""
    static = _static_rules()
    return tuple(rule for rule in decidable(all_rules(), LIVE) if rule not in static)


# Example batches for an initializer that needs data, and the rows of each.
_BATCHES, _ROWS = 2, 8
# What a twin's small layers and random inputs may not give such an initializer, or no example batch is known for.
_OF_TWINS = frozenset({"initialize-few", "initialize-rank", "initialize-unsettled", "twin"})


@dataclass(frozen=True)
class _ModelSource:
    """Where the model comes from."""

    source: Any
    trust_remote_code: bool
    revision: str | None

    def twin(self, seed: int, on_progress: Callable[[Progress], None] | None) -> PreTrainedModel:
        return twin(self.source, seed=seed, on_progress=on_progress, **self._access)

    def loaded(self) -> PreTrainedModel:
        return load_model(self.source, **self._access)

    @property
    def _access(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}

    def folder(self) -> Path | None:
        """Return the folder with the model's weights if it is on this machine."""
        if not isinstance(self.source, (str, Path)):
            return None
        return local_folder(str(self.source), self.revision)


def _with_live(
    given: Inputs, recipe: Recipe, model: PreTrainedModel, on_twin: bool, seed: int, seconds: dict[str, float]
) -> Inputs:
    """Return the inputs with the model in the state in which training would begin, and a batch for it.

    Args:
        seconds: where the time that each step takes is added.
    """
    training = training_of(recipe)
    with timed(seconds, "adapter"), seeding(model, seed), one_thread() if on_twin else nullcontext():
        adapted = _adapted(model, recipe, training, on_twin, seed)
    if not sits_in_layers(adapted):
        return given
    _prepare(adapted, training)
    given = replace(given, model=adapted, base=survey(adapted), plan=None)
    with timed(seconds, "batch"), suppress(BuildError):
        batch = example_batch(adapted.get_base_model(), seed=seed, modalities=training.modalities)
        given = replace(given, batch=batch)
    return given


def _adapted(model: PreTrainedModel, recipe: Recipe, training: Training, on_twin: bool, seed: int) -> PeftModel:
    if recipe.fields.quantization is not None:
        model = quantized(model, recipe.fields.quantization)
    row, stock = recipe_initializer(recipe), recipe.fields.adapter.peft_config
    plan = _planned(recipe, model, on_twin) if stock is None else None
    if row is None or not row.needs_data:
        return attach(model, plan) if plan is not None else attach_stock(model, stock or {})
    if plan is not None:
        adapted = attach(model, replace(plan, peft_config=as_plain(plan.peft_config)))
        _initialize(adapted, plan.peft_config, training, on_twin, seed)
        return adapted
    from peft import PeftConfig

    stock = stock or {}
    others = {name: value for name, value in stock.items() if name != f"{row.name}_config"}
    adapted = attach_stock(model, {**others, "init_lora_weights": True})
    _initialize(adapted, PeftConfig.from_peft_type(**stock), training, on_twin, seed)
    return adapted


def _planned(recipe: Recipe, model: PreTrainedModel, on_twin: bool) -> Plan:
    """Plan the recipe's adapter; as plain LoRA on a twin, where the initializer has no room for its rank.

    Whether the model's own layers have that room is what its own plan says.
    """
    try:
        return recipe.plan(model)
    except PlanError as error:
        if not on_twin or error.code != "initializer-rank":
            raise
    wanted = {**recipe.fields.adapter.plan_kwargs(), "init_lora_weights": True}
    return make_plan(model, quantization=recipe.fields.quantization, **wanted)


def _initialize(adapted: PeftModel, config: Any, training: Training, on_twin: bool, seed: int) -> None:
    """Give an attached plain LoRA the values that its initializer computes from example batches.

    A twin may be too small for them: it is then left as it is, and GK213 says so.
    """
    base = adapted.get_base_model()
    options: dict[str, Any] = {"batch_size": _ROWS, "modalities": training.modalities}
    try:
        batches = [example_batch(base, seed=at, **options) for at in range(seed, seed + _BATCHES)]
        compute_initial_values(adapted, config, batches)
    except (AttachError, BuildError) as error:
        if not on_twin or error.code not in _OF_TWINS:
            raise
        adapted.peft_config["default"].init_lora_weights = config.init_lora_weights


def _prepare(model: PeftModel, training: Training) -> None:
    """Do what the trainer does to the model before its first step.

    Source: ``trl.trainer.sft_trainer.SFTTrainer.__init__`` and ``transformers.Trainer``: input gradients, then
    checkpointing with the options given.
    """
    if not training.checkpointing:
        return
    with suppress(ValueError):  # the class has no checkpointing, which the trainer reports
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": training.reentrant})
        model.enable_input_require_grads()
