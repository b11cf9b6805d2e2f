"""The facts a run can supply to its rules: given ones, and costly ones computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.recipes.settings import CheckSettings

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor

    from graftkit.adapters.file import AdapterFile
    from graftkit.checks.adapter_files.against_base import Fit
    from graftkit.checks.adapter_files.view import Saved, TensorData
    from graftkit.checks.engine.rule import Rule
    from graftkit.checks.peft_config.resolved import ResolvedTargets
    from graftkit.checks.probes.gradients import Gradients
    from graftkit.engines import Engine
    from graftkit.errors import AdapterError, GraftError
    from graftkit.merging.verify import Evidence
    from graftkit.planning.plan import Plan
    from graftkit.recipes.recipe import Recipe
    from graftkit.recipes.training import Training
    from graftkit.surveying.sites import ModelMap


@dataclass(frozen=True)
class CheckContext:
    """What is known about one run. A field that is None is missing, and rules that need it stay unknown.

    Attributes:
        environment: package -> installed version, None where it is not installed.
        config: the model's configuration as a mapping, sub-configurations nested.
        base: the map of the base model.
        peft_config: the fields of the stock PEFT configuration in question.
        plan: what the user meant, where that configuration was planned.
        recipe_refusal: why the recipe cannot be planned or attached, or None. No rule needs it.
        recipe: the training recipe.
        training: what the recipe, or the caller, will train with.
        processor: the tokenizer or processor, with its chat template.
        checkpoint: a folder with the base's weights, or those of a saved full model.
        merge: what comparing a merged checkpoint with its base and its adapters has found.
        folder: of a saved adapter.
        adapter: what that folder holds, read from headers alone; None where it cannot be read.
        refusal: why it cannot be read, or None. No rule needs it: it explains a missing adapter.
        data: the adapter's data, read when it is first asked for.
        engine: the engine that is to serve the adapter.
        model: the live adapted model.
        batch: one valid batch for it, labels included where it computes a loss.
        settings: which rules the user wants, and with which limits.
    """

    environment: Mapping[str, str | None] | None = None
    config: Mapping[str, Any] | None = None
    base: ModelMap | None = None
    peft_config: Mapping[str, Any] | None = None
    plan: Plan | None = None
    recipe_refusal: GraftError | None = None
    recipe: Recipe | None = None
    training: Training | None = None
    processor: Any | None = None
    checkpoint: Path | None = None
    merge: Evidence | None = None
    folder: Path | None = None
    adapter: AdapterFile | None = None
    refusal: AdapterError | None = None
    data: TensorData | None = None
    engine: Engine | None = None
    model: PeftModel | None = None
    batch: Mapping[str, Any] | None = None
    settings: CheckSettings = field(default_factory=CheckSettings)

    def missing(self, needs: tuple[str, ...]) -> tuple[str, ...]:
        """The needed facts that this run does not have."""
        return tuple(name for name in needs if getattr(self, name) is None)

    def limit(self, rule: Rule, name: str) -> Any:
        """A setting of a rule: the user's value, or the rule's default."""
        return self.settings.rules.get(rule.code, {}).get(name, rule.settings[name].default)

    @cached_property
    def resolved(self) -> ResolvedTargets:
        """What stock PEFT would do with the configuration on the base."""
        from graftkit.checks.peft_config.resolved import ResolvedTargets

        assert self.peft_config is not None
        assert self.base is not None
        return ResolvedTargets(self.peft_config, self.base)

    @cached_property
    def base_logits(self) -> Tensor:
        """The base model's logits on the batch, with the adapter switched off."""
        from graftkit.checks.probes.forward import logits_of

        assert self.model is not None
        assert self.batch is not None
        with self.model.disable_adapter():
            return logits_of(self.model, self.batch)

    @cached_property
    def pristine_logits(self) -> Tensor:
        """The logits of the base model as it was before PEFT put layers into it (a copy is made for it)."""
        from graftkit.checks.probes.forward import logits_of, without_adapter

        assert self.model is not None
        assert self.batch is not None
        return logits_of(without_adapter(self.model), self.batch)

    @cached_property
    def gradients(self) -> Gradients:
        """The adapter's gradients on the batch, in each mode of activation checkpointing that is asked for."""
        from graftkit.checks.probes.gradients import Gradients

        assert self.model is not None
        assert self.batch is not None
        return Gradients(self.model, self.batch)

    @cached_property
    def saved(self) -> Saved:
        """The adapter, with its configuration read as PEFT reads it."""
        from graftkit.checks.adapter_files.view import Saved

        assert self.adapter is not None
        return Saved(self.adapter, () if self.base is None else self.base.module_paths)

    @cached_property
    def fit(self) -> Fit:
        """The adapter held against the base."""
        from graftkit.checks.adapter_files.against_base import Fit

        assert self.base is not None
        return Fit(self.saved, self.base)
