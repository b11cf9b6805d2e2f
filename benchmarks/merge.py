"""Merging a LoRA adapter: seconds and peak memory of graftkit, of ``cp`` of the same files, and of PEFT.

Run: python benchmarks/merge.py [--gigabytes 4] [--rounds 3] [--skip-peft] [--folder DIR]
The checkpoint has the shapes of Gemma 4 31B with fewer layers and a smaller vocabulary, random values, bfloat16,
in shards of 2 GB; the adapter has rank 16 on every linear of the language model. Each figure comes from a new
process, imports included; the three take turns, and the medians are compared. ``cp`` is timed until the files
are on the disk (``sync``), because graftkit ends there too; PEFT does not wait for the disk. With ``--skip-peft``
sizes can be tried that PEFT's memory would not allow.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RANK = 16
SHARD_BYTES = 2_000_000_000
BLOCK = 2**25
# Standard deviation of the random values.
SPREAD = 0.02

_CP = """
import json, resource, subprocess, sys, time
base, adapter, out = sys.argv[1:]
started = time.perf_counter()
subprocess.run(["cp", "-r", base, out], check=True)
copied = time.perf_counter() - started
subprocess.run(["sync", "-f", out], check=True)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "unsynced": copied}))
"""

_OURS = """
import json, os, resource, subprocess, sys, time
base, adapter, out = sys.argv[1:]
started = time.perf_counter()
graft = os.path.join(os.path.dirname(sys.executable), "graft")
subprocess.run([graft, "merge", base, adapter, out, "--json"], check=True, capture_output=True)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""

# The peak is the kernel's figure for this program: getrusage() starts with the memory of the parent.
_PEFT = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
base, adapter, out = sys.argv[1:]
started = time.perf_counter()
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="2GB")
seconds = time.perf_counter() - started
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def main() -> None:
    """Print one line for each method, and the ratios."""
    options = _options()
    warnings.simplefilter("ignore")
    ways = {"cp": _CP, "graftkit": _OURS} | ({} if options.skip_peft else {"peft": _PEFT})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="graft-merge-") as name:
        folder = Path(name)
        size = write_base(folder / "base", int(options.gigabytes * 1e9))
        write_adapter(folder / "base", folder / "adapter")
        print(f"{size / 1e9:.1f} GB in {len(list((folder / 'base').glob('*.safetensors')))} files, r={RANK}")
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, code in ways.items():
                runs[way].append(_measure(code, folder))
    _show(runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--folder", default=None)
    return parser.parse_args()


def _show(runs: Mapping[str, list[dict[str, float]]]) -> None:
    cp = statistics.median(run["seconds"] for run in runs["cp"])
    print(f"{'':10} {'seconds':>8} {'x cp':>6} {'peak':>9}   all runs")
    for way, measured in runs.items():
        seconds = statistics.median(run["seconds"] for run in measured)
        peak = max(run["peak"] for run in measured)
        every = " ".join(f"{run['seconds']:.1f}" for run in measured)
        print(f"{way:10} {seconds:7.1f}s {seconds / cp:6.2f} {peak / 1e6:6.0f} MB   {every}")
    unsynced = statistics.median(run["unsynced"] for run in runs["cp"])
    print(f"cp without waiting for the disk: {unsynced:.1f} s")
    if "peft" in runs:
        ours = statistics.median(run["seconds"] for run in runs["graftkit"])
        print(f"peft / graftkit: {statistics.median(r['seconds'] for r in runs['peft']) / ours:.1f}")


def _measure(code: str, folder: Path) -> dict[str, float]:
    out = folder / "out"
    subprocess.run(["sync"], check=True)
    command = [sys.executable, "-c", code, str(folder / "base"), str(folder / "adapter"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


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


def write_adapter(base: Path, folder: Path, spread: float = SPREAD) -> None:
    """Write a random adapter on every linear of the language model, in float32 as PEFT saves it.

    Args:
        base: a checkpoint of :func:`write_base`.
        folder: where to write it.
        spread: standard deviation of its values.
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
    _write(folder / "adapter_model.safetensors", shapes, "F32", spread)


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, spread: float = SPREAD) -> None:
    """Write a safetensors file of random values: one block of them repeated, at changing offsets."""
    import torch

    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * spread).to(kind)
    raw = memoryview(block.view(torch.uint8).numpy())
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


if __name__ == "__main__":
    main()
