"""A checkpoint's adapter, compared with the one in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.adapters.file import AdapterFile, read_adapter
from graftkit.checks.adapter_files.saved_adapter import TensorData
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.rule import unknown
from graftkit.checks.engine.runner import run
from graftkit.checks.rules import all_rules
from graftkit.errors import AdapterError, TrainingError
from graftkit.findings import Finding, Report
from graftkit.modeling.sharding import is_sharded
from graftkit.recipes.settings import CheckSettings

if TYPE_CHECKING:
    from peft import PeftModel

# Empty; another than the one in memory; NaN and infinities.
_CODES = ("GK401", "GK403", "GK503")
# A model's shards, saved as shards (accelerate.utils.fsdp_utils.save_fsdp_model).
_SHARDS = "pytorch_model_fsdp*"


def check_checkpoint(folder: Path, model: PeftModel, settings: CheckSettings | None = None) -> Report:
    """Run the rules on every adapter of the model that a trainer has saved into ``folder``.

    Raises:
        TrainingError: ``saved-adapter``: an adapter of the model is not there, or cannot be read.
    """
    rules = [rule for rule in all_rules() if rule.code in _CODES]
    if is_sharded(model) and any(folder.glob(_SHARDS)):
        advice = "state_dict_type: FULL_STATE_DICT saves the adapter"
        return Report(tuple(r.finding(unknown("FSDP saved the model as shards", help=advice)) for r in rules))
    findings: list[Finding] = []
    for name in model.peft_config:
        file = _adapter(folder if name == "default" else folder / name)
        given = Inputs(folder=file.folder, adapter=file, data=TensorData(file), model=model)
        context = CheckContext(given, settings or CheckSettings())
        findings += run(rules, context).findings
    return Report(tuple(findings))


def _adapter(folder: Path) -> AdapterFile:
    try:
        return read_adapter(folder, allow_empty=True)
    except AdapterError as error:
        raise TrainingError(
            "the checkpoint has no adapter that can be read",
            where=str(folder),
            why=f"{error.what}: {error.why}" if error.why else error.what,
            help="save with model.save_pretrained(folder); full weights of the base are not an adapter",
            code="saved-adapter",
        ) from error
