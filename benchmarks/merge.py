"""``graft merge`` of a LoRA adapter, next to ``cp`` and ``sync`` of the same files, and to PEFT's merge.

The checkpoint has the shapes of Gemma 4 31B with fewer layers and a smaller vocabulary, random values, bfloat16,
in shards of 2 GB; the adapter has rank 16 on every linear of the language model. Each figure comes from a new
process, imports included. ``cp`` is timed until the files are on the disk, because graftkit ends there too; PEFT
does not wait for the disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns
from benchmarks.harness.processes import GRAFT, cold

OURS, VERIFIED, COPY, PEFT = "graft merge --no-verify", "graft merge", "cp + sync", "merge_and_unload"
RANK = 16
SHARD_BYTES = 2_000_000_000
BLOCK = 2**25
# Standard deviation of the random values.
SPREAD = 0.02

_PEFT = """
import sys, warnings
warnings.simplefilter("ignore")
base, adapter, out = sys.argv[1:]
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="2GB")
"""


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield one contest of four sides."""
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="graft-merge-") as name:
        folder = Path(name)
        size = write_base(folder / "base", setting.of(quick=1_000_000_000, full=4_000_000_000))
        write_adapter(folder / "base", folder / "adapter")
        given = (folder / "base", folder / "adapter", folder / "out")
        commands: dict[str, tuple[str | Path, ...]] = {
            OURS: (*GRAFT, "merge", *given, "--no-verify", "--json"),
            VERIFIED: (*GRAFT, "merge", *given, "--json"),
            COPY: ("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', given[0], given[2]),
            PEFT: (sys.executable, "-c", _PEFT, *given),
        }
        sides = {side: partial(_run, *command) for side, command in commands.items()}
        rows = (
            Row("merge, not verified", COPY, Figure.SECONDS, aim=1.3, ours=OURS),
            Row("merge, verified", COPY, Figure.SECONDS, aim=1.6, ours=VERIFIED),
            Row("merge, verified", PEFT, Figure.SECONDS, ours=VERIFIED),
            Row("merge, verified", PEFT, Figure.PEAK, ours=VERIFIED),
        )
        cleared = partial(shutil.rmtree, folder / "out")
        yield Contest(f"{size / 1e9:.1f} GB", rows, in_turns(sides, after=cleared))


def _run(*command: str | Path) -> Figures:
    """Run a command while the disk has nothing else to write."""
    subprocess.run(["sync"], check=True)
    return cold(*command).figures


# ---- the checkpoint and the adapter ----


def write_base(folder: Path, wanted: int) -> int:
    """Write a checkpoint of about ``wanted`` bytes and return its actual size."""
    from graftkit.surveying.sources.build import build_on_meta

    folder.mkdir()
    config = _config(wanted)
    model = build_on_meta(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    ties = set(model.all_tied_weights_keys)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in ties}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes), 1):
        file = f"model-{number:05}.safetensors"
        _write(folder / file, {name: shapes[name] for name in names}, "BF16")
        weight_map.update(dict.fromkeys(names, file))
    total = sum(2 * _numel(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _config(wanted: int) -> Any:
    from transformers import CONFIG_MAPPING

    from graftkit.families import geometry

    known = geometry("google/gemma-4-31B-it")
    assert known is not None
    fields: dict[str, Any] = json.loads(json.dumps(dict(known)))
    text = {**fields["text_config"], "vocab_size": 32768}
    # A layer of that model has about 0.5 billion weights; every sixth has full attention, the last one too.
    layers = max(1, round((wanted - 2 * text["vocab_size"] * text["hidden_size"]) / 1e9))
    kinds = ["sliding_attention" if at % 6 else "full_attention" for at in range(layers)]
    fields["text_config"] = {**text, "num_hidden_layers": layers, "layer_types": kinds[::-1]}
    fields["vision_config"] = {**fields["vision_config"], "num_hidden_layers": 2}
    return CONFIG_MAPPING[known["model_type"]].from_dict(fields)


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, shape in shapes.items():
        size = 2 * _numel(shape)
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def write_adapter(base: Path, folder: Path) -> None:
    """Write a random adapter on every linear of the language model, in float32 as PEFT saves it.

    Args:
        base: a checkpoint of :func:`write_base`.
        folder: where to write it.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    from graftkit.surveying.sources.build import build_on_meta
    from graftkit.surveying.sources.load_config import load_config

    folder.mkdir()
    targets = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = build_on_meta(load_config(base).config)
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    shapes = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapted).items()}
    config.inference_mode = True
    config.save_pretrained(folder)
    _write(folder / "adapter_model.safetensors", shapes, "F32")


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Write a safetensors file of random values: one block of them repeated, at changing offsets."""
    import torch

    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SPREAD).to(kind)
    raw = memoryview(block.view(torch.uint8).numpy().tobytes())
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = _numel(shape) * kind.itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while end:
            file.write(raw[: min(end, len(raw))])
            end -= min(end, len(raw))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
