"""``graft merge``, verified and not, next to ``cp`` of the same files to the disk, and to PEFT's merge in memory.

The checkpoint has the shapes of a Llama with 27 layers of 61 million weights and tied embeddings, random values,
bfloat16, in four files; the adapter has rank 16 on its seven projections. Each figure is of a new process,
imports included. ``cp`` ends with ``sync``, because graftkit ends when the files are on the disk too; PEFT does
not wait for the disk. The base is in the page cache, as after a download: the first turn puts it there.
PEFT runs in other turns, after those with ``cp``: it fills and frees gigabytes, which changes the machine for what
runs next.

Memory is that of the largest process. ``graft merge`` runs two for a few seconds: one plans, one writes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns
from benchmarks.harness.processes import GRAFT, cold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 16
FILES = 4
CP, PEFT = "cp + sync", "merge_and_unload"
UNVERIFIED, VERIFIED = "graft merge --no-verify", "graft merge"
PEFT_SCRIPT = Path(__file__).parent / "scripts" / "merge_by_peft.py"
# Random values that are drawn; they are repeated, at changing offsets.
_DRAWN = 2**25
# Standard deviation of the random values.
_SPREAD = 0.02
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield two contests: with ``cp``, and with PEFT."""
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="graft-merge-") as name:
        folder = Path(name)
        nbytes = write_base_and_adapter(folder, layers=setting.of(quick=1, full=27))
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        merging = (*GRAFT, "merge", base, adapter, out)
        peers = {
            CP: partial(_run, "sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', base, out),
            PEFT: partial(_run, sys.executable, PEFT_SCRIPT, base, adapter, out),
        }
        ours = {UNVERIFIED: partial(_run, *merging, "--no-verify"), VERIFIED: partial(_run, *merging)}
        for peer, run in peers.items():
            turns = in_turns({peer: run, **ours}, after=partial(_clear, out))
            yield Contest(f"{nbytes / 1e9:.1f} GB", tuple(_rows(peer)), turns)


def _rows(peer: str) -> Iterator[Row]:
    for side, what, aim in ((UNVERIFIED, "merge, not verified", 1.3), (VERIFIED, "merge, verified", 1.6)):
        if peer == CP:
            yield Row(what, CP, Figure.SECONDS, aim, ours=side)
        else:
            yield Row(what, PEFT, Figure.SECONDS, ours=side)
            yield Row(what, PEFT, Figure.PEAK, ours=side)


def _run(*command: str | Path) -> Figures:
    return cold(*command).figures


def _clear(out: Path) -> None:
    """Remove what a side wrote, and leave nothing that the disk is still busy with."""
    shutil.rmtree(out)
    os.sync()


# ---- the checkpoint and the adapter ----


def write_base_and_adapter(folder: Path, layers: int) -> int:
    """Write a checkpoint to ``base`` and an adapter to ``adapter``.

    Returns:
        The checkpoint's size in bytes, without the headers.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    from graftkit.surveying.sources.build import build_on_meta

    model = build_on_meta(_config(layers))
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    model.config.save_pretrained(folder / "base")
    nbytes = _write_shards(folder / "base", model)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    shapes = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapted).items()}
    config.inference_mode = True
    config.save_pretrained(folder / "adapter")
    _write(folder / "adapter" / "adapter_model.safetensors", shapes, "F32")
    return nbytes


def _config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )


def _write_shards(folder: Path, model: PreTrainedModel) -> int:
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    total: int = sum(2 * math.prod(shape) for shape in shapes.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_parts(shapes, total // FILES), 1):
        file = f"model-{number:05}-of-{FILES:05}.safetensors"
        _write(folder / file, {name: shapes[name] for name in names}, "BF16")
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _parts(shapes: Mapping[str, tuple[int, ...]], nbytes: int) -> Iterator[list[str]]:
    """Yield runs of names of at least that many bytes; the last one has what is left."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        names.append(name)
        filled += 2 * math.prod(shape)
        if filled >= nbytes:
            yield names
            names, filled = [], 0
    if names:
        yield names


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Write a safetensors file of random values."""
    import torch

    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    drawn = (torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)) * _SPREAD).to(kind)
    raw = memoryview(drawn.view(torch.uint8).numpy().tobytes())
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while end:
            file.write(raw[: min(end, len(raw))])
            end -= min(end, len(raw))
