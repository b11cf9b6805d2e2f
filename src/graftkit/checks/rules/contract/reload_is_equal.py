"""Check that the saved adapter loads in stock PEFT and computes the same.

## Why it matters

Hours of training are lost if the file is not the adapter that was trained.

## Example

A tool redirects `q_proj` to the linear inside the wrapper and saves `target_modules: ["q_proj"]`: stock PEFT
refuses the adapter it wrote.

## How safe that is

Rewriting the configuration to inner paths (`gk.migrate`) changes no tensor.

## Sources

- https://github.com/huggingface/peft/issues/3129
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.adapters.file import WEIGHTS_NAME
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.forward import compare, room_for_copy, tolerance
from graftkit.checks.probes.live_adapter import moved_base, perturbing, without_adapter
from graftkit.checks.probes.merging import quantized_layer
from graftkit.findings import Severity
from graftkit.modeling.outputs import outputs_of
from graftkit.modeling.stock_peft import load

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def _check(context: CheckContext) -> Observation:
    from safetensors.torch import load_file

    model = context.model
    if (lacking := room_for_copy(model)) is not None:
        return unknown(lacking, help="run it on the twin: gk.twin(model)")
    if (moved := moved_base(model)) is not None:
        return unknown(
            f"{moved} moved part of the base weights into the adapter, so it only fits the original base",
            help="load the base from disk, load the adapter on it, and compare",
        )
    with perturbing(model), tempfile.TemporaryDirectory(prefix="graftkit-") as folder:
        adapted = outputs_of(model, context.batch)
        saved = _save(model, folder)
        tensors = len(load_file(saved / WEIGHTS_NAME))
        try:
            again, lost = _load(without_adapter(model), saved)
        except (ValueError, RuntimeError, KeyError) as error:
            return failed(f"stock PEFT cannot load what it saved: {error}", tensors=tensors)
        equal = _tensors_equal(model, again)
        reloaded = outputs_of(again, context.batch)
    compared, effect = compare(adapted, reloaded), compare(adapted, context.base_outputs).difference
    apart = compared.difference
    allowed = tolerance(model)
    figures: dict[str, Any] = {
        **compared.figures,
        "adapter_effect": effect,
        "tensors": tensors,
        "tolerance": allowed,
        "tensors_equal": equal,
    }
    if equal and not lost and quantized_layer(model) is not None:
        # Running a quantized base can repack it, so that two copies need not agree to the last digit.
        return passed(f"{tensors} tensors saved and loaded bit for bit (the base is quantized)", **figures)
    if lost or not equal or not apart <= allowed:
        return failed(_what_differs(lost, equal, apart), **figures)
    if not effect > allowed:
        return unknown(
            f"the adapter changes the outputs by {effect:.1e}, too little to show a lost tensor", **figures
        )
    return passed(
        f"{tensors} tensors saved; outputs differ by {apart:.1e} after reloading in stock PEFT", **figures
    )


def _save(model: PeftModel, folder: str) -> Path:
    """Save the adapter, and return the folder that has it."""
    with warnings.catch_warnings():
        # PEFT looks up the base model's configuration on the Hub to see whether the vocabulary grew.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT saves an adapter that is not called "default" in a folder of that name.
    return Path(folder, "" if model.active_adapter == "default" else model.active_adapter)


def _load(base: nn.Module, saved: Path) -> tuple[PeftModel, list[str]]:
    """Load the adapter onto a base, and return PEFT's warnings of tensors that it missed or had no place for."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        again = load(base, saved)
    return again, [str(w.message) for w in raised if "adapter keys" in str(w.message)]


def _what_differs(lost: list[str], equal: bool, apart: float) -> str:
    if lost:
        return lost[0].partition("[")[0].rstrip(": ")
    return f"outputs differ by {apart:.1e} after save and reload" + ("" if equal else ", and so do the tensors")


def _tensors_equal(model: PeftModel, again: PeftModel) -> bool:
    from peft import get_peft_model_state_dict

    saved, loaded = (
        get_peft_model_state_dict(of, adapter_name=of.active_adapter, save_embedding_layers=False)
        for of in (model, again)
    )
    return saved.keys() == loaded.keys() and all(saved[k].to(loaded[k]).equal(loaded[k]) for k in saved)


RULE = Rule(
    code="GK508",
    title="the saved adapter reloads in stock PEFT and computes the same",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="compare the file's keys with the model's: a prefix or the name of a wrapper may differ",
    since="0.1.0",
)
