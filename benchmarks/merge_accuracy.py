"""A merged checkpoint, every element compared with a sum in double precision; next to PEFT's ``merge_and_unload``.

A random bfloat16 model, and an adapter whose update is about as large as the weights, so that both nearly cancel
in many elements. The comparison reads files with safetensors, sums with torch in float64 and rounds with
integers; it shares no code with the merge. What is compared is the share of changed elements that are not the
correctly rounded sum: graftkit's has to be none, and the run fails where it is not.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, Turn, in_turns
from benchmarks.harness.processes import GRAFT, cold
from benchmarks.train import Scale, write_text_base

if TYPE_CHECKING:
    import torch

PEER = "merge_and_unload"
RANK = 16
# Elements that are compared at a time.
PART = 2**21
_PREFIX = "base_model.model."
# A weight's standard deviation, as the model draws it.
_SPREAD = 0.02


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield one contest; each of its turns has an adapter of its own."""
    hidden, layers = setting.of(quick=(128, 2), full=(512, 8))
    scale = Scale(hidden, layers, vision=64, steps=0, batch=0, words=1, rows=1, dtype="bfloat16")
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="graft-accuracy-") as name:
        write_text_base(Path(name), scale)
        size = f"bfloat16, {hidden} x {layers}"
        yield Contest(size, (Row("wrong elements", PEER, Figure.WRONG, aim=0),), partial(_turns, Path(name)))


def _turns(folder: Path, count: int) -> Iterator[Turn]:
    for seed in range(count):
        _write_adapter(folder, seed)
        sides = {"graftkit": partial(_ours, folder), PEER: partial(_peer, folder)}
        yield from in_turns(sides, warmups=0)(1)
        shutil.rmtree(folder / "adapter")


def _write_adapter(folder: Path, seed: int) -> None:
    """Write an adapter on every linear, in float32 as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, weights in adapted.named_parameters():
        if "lora_" in name:
            # The product of two such matrices has the spread of the weights.
            torch.nn.init.normal_(weights, std=(_SPREAD / RANK**0.5) ** 0.5)
    adapted.save_pretrained(folder / "adapter")


def _ours(folder: Path) -> Figures:
    from safetensors.torch import load_file

    cold(*GRAFT, "merge", folder / "base", folder / "adapter", folder / "out")
    merged = load_file(folder / "out" / "model.safetensors")
    shutil.rmtree(folder / "out")
    share = _wrong_share(folder, merged)
    if share:
        raise ValueError(f"a share of {share:.3g} of the changed elements is not the correctly rounded sum")
    return {Figure.WRONG: share}


def _peer(folder: Path) -> Figures:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    return {Figure.WRONG: _wrong_share(folder, merged.state_dict())}


def _wrong_share(folder: Path, merged: Mapping[str, torch.Tensor]) -> float:
    """Return the share of the elements that the adapter changes which are not the correctly rounded sum."""
    from safetensors.torch import load_file

    base = load_file(folder / "base" / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    wrong = elements = 0
    for key in (key for key in adapter if key.endswith(".lora_A.weight")):
        a, b = (adapter[key.replace("lora_A", side)].double() for side in ("lora_A", "lora_B"))
        name = key.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")
        step = PART // a.shape[1]
        for at in range(0, len(b), step):
            exact = base[name][at : at + step].double() + b[at : at + step] @ a
            wrong += int((merged[name][at : at + step].double() != _nearest(exact)).sum())
            elements += exact.numel()
    return wrong / elements


def _nearest(exact: torch.Tensor) -> torch.Tensor:
    """Round to the 8 bits of a bfloat16's significand, to nearest and ties to even, with integers."""
    import torch

    bits = exact.view(torch.int64)
    cut = 53 - 8
    rounded: torch.Tensor = (((bits + ((bits >> cut) & 1) + (2 ** (cut - 1) - 1)) >> cut) << cut).view(
        torch.float64
    )
    return rounded
