"""A checkpoint's adapter, read back and held against the one in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.adapters.file import AdapterFile, read_adapter, without_tensors
from graftkit.checks.adapter_files.saved_adapter import TensorData
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import Rule, unknown
from graftkit.checks.engine.runner import run
from graftkit.checks.rules import rules_of
from graftkit.errors import AdapterError, TrainingError
from graftkit.findings import Finding, Report, Severity
from graftkit.modeling.sharding import is_sharded
from graftkit.recipes.settings import CheckSettings

if TYPE_CHECKING:
    from peft import PeftModel

# Empty; another than the one in memory; NaN and infinities.
_CODES = ("GK401", "GK403", "GK503")
# How accelerate calls a model's parts, saved as parts (accelerate.utils.fsdp_utils.save_fsdp_model).
_PARTS = "pytorch_model_fsdp*"


def read_back(folder: Path, model: PeftModel, settings: CheckSettings | None = None) -> Report:
    """What the rules say of every adapter that a trainer has just saved into ``folder``.

    Raises:
        TrainingError: ``saved-adapter``: an adapter of the model is not there, or cannot be read.
    """
    rules = rules_on_saved()
    if is_sharded(model) and any(folder.glob(_PARTS)):
        advice = "state_dict_type: FULL_STATE_DICT saves the adapter"
        return Report(tuple(r.finding(unknown("FSDP saved the model in parts", help=advice)) for r in rules))
    findings: list[Finding] = []
    for name in model.peft_config:
        file = _adapter(folder if name == "default" else folder / name)
        given = Inputs(folder=file.folder, adapter=file, data=TensorData(file), model=model)
        context = CheckContext(given, settings or CheckSettings())
        findings += run(rules, context).findings
    return Report(tuple(findings))


def rules_on_saved() -> tuple[Rule, ...]:
    """The rules that hold a file against what it was written from."""
    return tuple(rule for area in ("adapter", "saving") for rule in rules_of(area) if rule.code in _CODES)


def refusal(findings: Iterable[Finding], folder: Path, good: Path | None) -> TrainingError | None:
    """The error that stops a run whose checkpoint is not the adapter in memory, or None."""
    wrong = [finding for finding in findings if finding.severity is Severity.ERROR]
    if not wrong:
        return None
    return TrainingError(
        "the adapter that was saved is not the one that is trained",
        where=str(folder),
        why="; ".join(f"{finding.code} {finding.message}" for finding in wrong),
        help=f"{wrong[0].help}; {told_good(good)}",
        code="saved-adapter",
    )


def told_good(good: Path | None) -> str:
    """Where to go on from."""
    return "no checkpoint is known to be good" if good is None else f"the last good checkpoint is {good}"


def _adapter(folder: Path) -> AdapterFile:
    try:
        return read_adapter(folder)
    except AdapterError as error:
        empty = without_tensors(folder)
        if empty is not None:
            return empty
        raise TrainingError(
            "the checkpoint holds no adapter that can be read",
            where=str(folder),
            why=f"{error.what}: {error.why}" if error.why else error.what,
            help="save with model.save_pretrained(folder); full weights of the base are no adapter",
            code="saved-adapter",
        ) from error
