"""Prove that the trained adapter is what was saved and survives reload and merge, by comparing logits."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.forward import difference, logits_of, tolerance
from graftkit.checks.verify import verify
from graftkit.findings import Finding, Report, Severity
from graftkit.recipes.settings import CheckSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Run by a new interpreter. The first line makes `import graftkit` impossible there, as on a machine without it.
_RELOAD = """
import sys
sys.modules["graftkit"] = None
from peft import PeftModel
from safetensors.torch import load_file, save_file
import torch, transformers

torch.set_num_threads(1)
base, adapter, batch, logits = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(base)
model = getattr(transformers, config.architectures[0]).from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(batch)).logits.float()}, logits)
assert not any(name.startswith("graftkit.") for name in sys.modules)
"""


def prove(model: PeftModel, batch: Mapping[str, Any], base: Path, adapter: Path, merged: Path) -> Report:
    """Compare the trained model with the saved one and with the merged one, in memory and reloaded.

    Args:
        model: the trained model, in eval mode.
        batch: keyword arguments of its forward.
        base: the folder that the base was loaded from.
        adapter: the folder that the adapter was saved to.
        merged: the folder to save the merged model to.
    """
    trained = _Trained.of(model, batch)
    return Report(
        (
            _fresh_process_reload(trained, base, adapter),
            _merged_in_memory(trained),
            _merged_checkpoint(trained, merged),
        )
    )


@dataclass(frozen=True)
class _Trained:
    """The trained model and what it computes.

    Attributes:
        logits: of the batch, float32.
        adapter_effect: how far the adapter moves them, relative to the largest logit.
    """

    model: PeftModel
    batch: Mapping[str, Any]
    logits: Tensor
    adapter_effect: float

    @classmethod
    def of(cls, model: PeftModel, batch: Mapping[str, Any]) -> _Trained:
        logits = logits_of(model, batch)
        with model.disable_adapter():
            effect = difference(logits, logits_of(model, batch))
        return cls(model, batch, logits, effect)

    def compare(self, code: str, title: str, logits: Tensor, *, problem: str = "") -> Finding:
        """Check that ``logits`` are the trained model's; a ``problem`` makes it an error in any case."""
        apart, allowed = difference(self.logits, logits), tolerance(self.model)
        same = apart <= allowed < self.adapter_effect
        seen = (
            f"logits differ by {apart:.1e} (allowed {allowed:.0e}); "
            f"the adapter changes them by {self.adapter_effect:.1e}"
        )
        return Finding(
            code=code,
            severity=Severity.OK if same and not problem else Severity.ERROR,
            title=title,
            message=problem or seen,
            evidence={"difference": apart, "adapter_effect": self.adapter_effect},
        )


def _fresh_process_reload(trained: _Trained, base: Path, adapter: Path) -> Finding:
    """Load base and adapter with stock transformers and PEFT, in a process that cannot import graftkit."""
    from safetensors.torch import load_file, save_file

    code = "fresh_process_reload"
    title = "the saved adapter computes the same in a process without graftkit"
    with tempfile.TemporaryDirectory(prefix="graftkit-") as folder:
        batch, logits = Path(folder, "batch.safetensors"), Path(folder, "logits.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in trained.batch.items()}, batch)
        done = subprocess.run(
            # Without the folder that it is called in, where a file may be called torch.py.
            [sys.executable, "-P", "-c", _RELOAD, base, adapter, batch, logits],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Finding(code, Severity.ERROR, title, f"the process failed: {last}")
        return trained.compare(code, title, load_file(logits)["logits"])


def _merged_in_memory(trained: _Trained) -> Finding:
    """Merge in memory, on a batch that reaches the wrappers' bounds."""
    (finding,) = verify(trained.model, trained.batch, settings=CheckSettings(select=("GK601",)))
    return replace(finding, code="merged_in_memory", title="the merged model computes the same, bounds active")


def _merged_checkpoint(trained: _Trained, folder: Path) -> Finding:
    """Save the merged model and load it again with stock transformers."""
    merged = copy.deepcopy(trained.model).merge_and_unload()
    merged.save_pretrained(folder)
    again, loading = type(merged).from_pretrained(folder, output_loading_info=True)
    lost = [*loading["missing_keys"], *loading["unexpected_keys"]]
    return trained.compare(
        "merged_checkpoint",
        "the merged checkpoint reloads completely and computes the same",
        logits_of(again, trained.batch),
        problem=f"keys missing or unexpected: {lost[0]}" if lost else "",
    )
