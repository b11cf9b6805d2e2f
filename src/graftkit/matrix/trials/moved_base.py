"""Initializers that move part of the base into the adapter: the rules lack the original base, a twin is here."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.forward import compare, tolerance
from graftkit.checks.probes.live_adapter import perturbed
from graftkit.matrix.cell import Outcome, Verdict
from graftkit.matrix.trials.outcomes import plain
from graftkit.modeling.outputs import outputs_of
from graftkit.modeling.stock_peft import load

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def identity(original: PreTrainedModel, adapted: PeftModel, batch: Mapping[str, Any]) -> Outcome:
    """Check that the fresh adapter on the base that it moved computes what the original base does."""
    compared = compare(outputs_of(original, batch), outputs_of(adapted, batch))
    said = f"outputs of the original base and of the fresh adapter differ by {compared.difference:.1e}"
    verdict = Verdict.PROVEN if compared.difference <= tolerance(adapted) else Verdict.FAILED
    return _outcome(verdict, said, "GK115", compared.figures)


def reload(original: PreTrainedModel, adapted: PeftModel, batch: Mapping[str, Any]) -> Outcome:
    """Check that stock PEFT moves the original base again as it loads the saved adapter, and computes the same."""
    with perturbed(adapted), tempfile.TemporaryDirectory(prefix="graftkit-") as folder:
        expected = outputs_of(adapted, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.save_pretrained(folder, save_embedding_layers=False)
            base = copy.deepcopy(original)
            again = load(base, folder)
        compared = compare(expected, outputs_of(again, batch))
        effect = compare(expected, outputs_of(original, batch)).difference
    said = f"loaded on the original base by stock PEFT, outputs differ by {compared.difference:.1e}"
    allowed = tolerance(adapted)
    verdict = Verdict.PROVEN if compared.difference <= allowed else Verdict.FAILED
    if verdict is Verdict.PROVEN and not effect > allowed:
        verdict = Verdict.UNKNOWN
    return _outcome(verdict, said, "GK508", {**compared.figures, "adapter_effect": effect, "tolerance": allowed})


def _outcome(verdict: Verdict, said: str, code: str, figures: Mapping[str, Any]) -> Outcome:
    evidence = {name: plain(value) for name, value in figures.items()}
    return Outcome(verdict, said, () if verdict is Verdict.PROVEN else (code,), evidence)
