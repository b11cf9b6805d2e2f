"""What a run knows: its inputs, and costly values computed from them once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from graftkit.errors import GraftError, SourceError
from graftkit.recipes.settings import CheckSettings
from graftkit.text import some

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor

    from graftkit.adapters.file import AdapterFile
    from graftkit.adapters.fingerprints.weights import Comparison
    from graftkit.adapters.record import AdapterRecord
    from graftkit.checks.adapter_files.base_fit import BaseFit
    from graftkit.checks.adapter_files.converted import Converted
    from graftkit.checks.adapter_files.saved_adapter import SavedAdapter, TensorData
    from graftkit.checks.peft_config.resolved import ResolvedTargets
    from graftkit.checks.probes.gradients import Gradients
    from graftkit.engines import Engine
    from graftkit.engines.outcome import Served
    from graftkit.env import Machine
    from graftkit.errors import AdapterError
    from graftkit.merging.verify import Evidence
    from graftkit.planning.plan import Plan
    from graftkit.recipes.recipe import Recipe
    from graftkit.recipes.training import Training
    from graftkit.surveying.checkpoint.comparison import Checkpoint
    from graftkit.surveying.checkpoint.headers import Headers
    from graftkit.surveying.sites import ModelMap


T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a command can give to rules; None where it has no such thing.

    Attributes:
        environment: package -> installed version, None where it is not installed.
        machine: what the machine that trains can compute; given where the training is to happen here.
        config: the model's configuration as a mapping, sub-configurations nested.
        base: the map of the base model.
        base_files: what the base's weight files hold, against what its class expects.
        peft_config: the fields of the stock PEFT configuration in question.
        plan: the plan that this configuration was made from.
        model_refusal: why the recipe's model cannot be found or built.
        recipe_refusal: why the recipe cannot be planned or attached.
        recipe: the training recipe.
        training: the settings of the training, from the recipe or the caller.
        processor: the tokenizer or processor, with its chat template.
        checkpoint: a folder with the base's weights, or those of a saved full model.
        merge: the result of comparing a merged checkpoint with its base and its adapters.
        folder: the folder of a saved adapter.
        adapter: the saved adapter, read from headers alone; None where it cannot be read.
        refusal: why the saved adapter cannot be read.
        data: the adapter's tensors, read when first asked for.
        record: what the saved adapter says of its own training; None where it has no such file.
        record_refusal: why that file cannot be read.
        base_folder: the folder of the base's weight files.
        form: the engine's form that the saved adapter is in; None for stock PEFT's.
        converted: the saved adapter, where it is in an engine's form and was read as that engine reads it.
        converted_refusal: why it cannot be read so.
        engine: the engine that is to serve the adapter.
        served: what an engine that was started with the adapter made of it.
        model: the live adapted model.
        batch: one valid batch for it, labels included where it computes a loss.
        rows: reads the rows that are trained on, as the trainer gets them: a dataset, or what is like one.
    """

    environment: Mapping[str, str | None] | None = None
    machine: Machine | None = None
    config: Mapping[str, Any] | None = None
    base: ModelMap | None = None
    base_files: Checkpoint | None = None
    peft_config: Mapping[str, Any] | None = None
    plan: Plan | None = None
    model_refusal: GraftError | None = None
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
    record: AdapterRecord | None = None
    record_refusal: AdapterError | None = None
    base_folder: Path | None = None
    form: str | None = None
    converted: Converted | None = None
    converted_refusal: GraftError | None = None
    engine: Engine | None = None
    served: Served | None = None
    model: PeftModel | None = None
    batch: Mapping[str, Any] | None = None
    rows: Callable[[], Any] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The inputs that were given."""
        return tuple(name for name, value in vars(self).items() if value is not None)


class UndecidableError(Exception):
    """What a rule asks cannot be known on this run; the runner reports the rule as unknown.

    Attributes:
        evidence: what the finding records beside the message.
    """

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(message)
        self.evidence = evidence


class MissingInputError(UndecidableError):
    """A rule needs inputs that were not given."""

    def __init__(self, *names: str) -> None:
        super().__init__(f"needs {', '.join(names)}", missing=names)


class _Input(Generic[T]):
    """An attribute that reads the input of the same name, or raises `MissingInputError`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, context: CheckContext, owner: type) -> T:
        value: T | None = getattr(context.given, self._name)
        if value is None:
            raise MissingInputError(self._name)
        return value


@dataclass(frozen=True)
class CheckContext:
    """What a rule reads. Reading an input that was not given raises `MissingInputError`; ``given`` allows None."""

    given: Inputs = Inputs()
    settings: CheckSettings = field(default_factory=CheckSettings)

    environment = _Input[Mapping[str, "str | None"]]()
    machine = _Input["Machine"]()
    config = _Input[Mapping[str, Any]]()
    base = _Input["ModelMap"]()
    base_files = _Input["Checkpoint"]()
    peft_config = _Input[Mapping[str, Any]]()
    plan = _Input["Plan"]()
    recipe = _Input["Recipe"]()
    training = _Input["Training"]()
    processor = _Input[Any]()
    checkpoint = _Input["Path"]()
    merge = _Input["Evidence"]()
    folder = _Input["Path"]()
    adapter = _Input["AdapterFile"]()
    data = _Input["TensorData"]()
    record = _Input["AdapterRecord"]()
    base_folder = _Input["Path"]()
    form = _Input[str]()
    converted = _Input["Converted"]()
    engine = _Input["Engine"]()
    served = _Input["Served"]()
    model = _Input["PeftModel"]()
    batch = _Input[Mapping[str, Any]]()
    rows = _Input[Callable[[], Any]]()

    @property
    def modalities(self) -> tuple[str, ...] | None:
        """The modalities of the batches; None where they are not known."""
        return None if self.given.training is None else self.training.modalities

    def require(self, names: Iterable[str]) -> None:
        """Check that these inputs were given.

        Raises:
            MissingInputError: names all that were not.
        """
        missing = [name for name in names if name not in self.given.names]
        if missing:
            raise MissingInputError(*missing)

    @cached_property
    def resolved(self) -> ResolvedTargets:
        """What stock PEFT would do with the configuration on the base.

        Raises:
            UndecidableError: PEFT cannot use the configuration.
        """
        from graftkit.checks.peft_config.resolved import ResolvedTargets

        resolved = ResolvedTargets(self.peft_config, self.base)
        if resolved.problems:
            message = f"the configuration cannot be used: {some(resolved.problems)}"
            raise UndecidableError(message, problems=len(resolved.problems))
        return resolved

    @cached_property
    def training_rows(self) -> Any:
        """The rows that are trained on.

        Raises:
            UndecidableError: they cannot be read.
        """
        try:
            return self.rows()
        except GraftError as error:
            why = f": {error.why}" if error.why else ""
            raise UndecidableError(f"{error.what}{why}", code=error.code) from error

    @cached_property
    def checkpoint_headers(self) -> Headers:
        """The headers of the checkpoint's weights.

        Raises:
            UndecidableError: they cannot be read.
        """
        from graftkit.surveying.checkpoint.headers import read_headers

        try:
            return read_headers(self.checkpoint)
        except SourceError as error:
            raise UndecidableError(f"the checkpoint cannot be read: {error.why or error.what}") from error

    @cached_property
    def base_comparison(self) -> Comparison:
        """How the base's weight files compare with those that the adapter was trained on.

        Raises:
            UndecidableError: the record has no fingerprint of them, or they cannot be read.
        """
        from graftkit.adapters.fingerprints.weights import compare_weights

        known = self.record.base
        if known is None or known.fingerprint is None:
            raise UndecidableError("its graftkit.json has no fingerprint of the base's weights")
        if self.given.base_folder is None:
            raise UndecidableError("the base's weight files are not on this machine")
        try:
            return compare_weights(known.fingerprint, self.base_folder)
        except SourceError as error:
            raise UndecidableError(f"the base's weights cannot be read: {error.why or error.what}") from error

    @cached_property
    def base_outputs(self) -> dict[str, Tensor]:
        """Every floating-point output on the batch with the adapter switched off, by path."""
        from graftkit.modeling.outputs import outputs_of

        with self.model.disable_adapter():
            return outputs_of(self.model, self.batch)

    @cached_property
    def pristine_outputs(self) -> dict[str, Tensor]:
        """Every floating-point output on the batch of a copy of the base without PEFT's layers, by path."""
        from graftkit.checks.probes.live_adapter import without_adapter
        from graftkit.modeling.outputs import outputs_of

        return outputs_of(without_adapter(self.model), self.batch)

    @cached_property
    def gradients(self) -> Gradients:
        """The adapter's gradients on the batch, computed once for each mode of activation checkpointing."""
        from graftkit.checks.probes.gradients import Gradients

        return Gradients(self.model, self.batch)

    @cached_property
    def saved(self) -> SavedAdapter:
        """The saved adapter, with its configuration read as PEFT reads it.

        Raises:
            UndecidableError: PEFT cannot use the configuration.
        """
        if self.config_problems:
            raise UndecidableError(f"the configuration cannot be used: {some(self.config_problems)}")
        return self._saved

    @property
    def config_problems(self) -> tuple[str, ...]:
        """What is wrong with the fields of the saved adapter's configuration."""
        return self._saved.problems

    @cached_property
    def _saved(self) -> SavedAdapter:
        from graftkit.checks.adapter_files.saved_adapter import SavedAdapter

        return SavedAdapter(self.adapter, () if self.given.base is None else self.base.module_paths)

    @cached_property
    def fit(self) -> BaseFit:
        """How the saved adapter fits the base, whether or not PEFT can use its configuration."""
        from graftkit.checks.adapter_files.base_fit import BaseFit

        return BaseFit(self._saved, self.base)
