"""That the trained adapter is what was saved, and survives reload and merge: compared by logits."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.clamps import wrapper_effect
from graftkit.checks.probes.forward import difference, logits_of, tolerance

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


@dataclass(frozen=True)
class Proof:
    """One comparison of logits.

    Attributes:
        title: what must be equal.
        verdict: "ok" or "failed".
        message: what was seen.
        difference: the largest difference, relative to the largest logit.
        adapter_effect: what the adapter itself changes, on the same scale.
    """

    title: str
    verdict: str
    message: str
    difference: float
    adapter_effect: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Run by a new interpreter. The first line makes `import graftkit` impossible there, as on a machine without it.
_RELOAD = """
import sys
sys.modules["graftkit"] = None
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
import torch, transformers

torch.set_num_threads(1)
folder, work = Path(sys.argv[1]), Path(sys.argv[2])
config = transformers.AutoConfig.from_pretrained(folder / "base")
base = getattr(transformers, config.architectures[0]).from_pretrained(folder / "base")
model = PeftModel.from_pretrained(base, folder / "adapter").eval()
with torch.no_grad():
    logits = model(**load_file(work / "batch.safetensors")).logits
save_file({"logits": logits.float()}, work / "logits.safetensors")
assert not any(name.startswith("graftkit.") for name in sys.modules)
"""


def fresh_process_reload(model: PeftModel, folder: Path, batch: Mapping[str, Any]) -> Proof:
    """Load ``folder/base`` and ``folder/adapter`` with stock transformers and PEFT, where graftkit is absent."""
    from safetensors.torch import load_file, save_file

    title = "the saved adapter computes the same in a process without graftkit"
    with tempfile.TemporaryDirectory(prefix="graftkit-") as work:
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, Path(work, "batch.safetensors"))
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder), work],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            return Proof(title, "failed", f"the process failed: {last[0]}", float("inf"), float("nan"))
        logits = load_file(Path(work, "logits.safetensors"))["logits"]
    return _compare(title, model, batch, logits)


def merged_in_memory(model: PeftModel, batch: Mapping[str, Any]) -> Proof:
    """Merge a copy in memory and compare, with the wrappers' bounds at work."""
    merged = copy.deepcopy(model).merge_and_unload()
    bounded, bitten = wrapper_effect(model, batch)
    proof = _compare("the merged model computes the same, bounds active", model, batch, logits_of(merged, batch))
    if bounded and not bitten:
        return Proof(proof.title, "failed", "no bound was reached", proof.difference, proof.adapter_effect)
    return Proof(
        proof.title,
        proof.verdict,
        f"{proof.message}; {bitten} of {bounded} bounded wrappers reached",
        proof.difference,
        proof.adapter_effect,
    )


def merged_checkpoint(model: PeftModel, target: Path, batch: Mapping[str, Any]) -> Proof:
    """Save the merged model to ``target``, load it again with stock transformers, and compare."""
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(target)
    again, info = type(merged).from_pretrained(target, output_loading_info=True)
    title = "the merged checkpoint reloads whole and computes the same"
    lost = [*info["missing_keys"], *info["unexpected_keys"]]
    proof = _compare(title, model, batch, logits_of(again, batch))
    if lost:
        return Proof(
            title, "failed", f"keys missing or unexpected: {lost[0]}", proof.difference, proof.adapter_effect
        )
    return proof


def _compare(title: str, model: PeftModel, batch: Mapping[str, Any], logits: Tensor) -> Proof:
    adapted = logits_of(model, batch)
    with model.disable_adapter():
        effect = difference(adapted, logits_of(model, batch))
    apart, allowed = difference(adapted, logits), tolerance(model)
    told = f"logits differ by {apart:.1e} (allowed {allowed:.0e}); the adapter changes them by {effect:.1e}"
    verdict = "ok" if apart <= allowed < effect else "failed"
    return Proof(title, verdict, told, apart, effect)
