"""Seconds and peak memory of a survey from a cold process, next to building the same model on the CPU.

Run: python benchmarks/survey.py
Each figure comes from a new process: import, read the configuration, survey, exit. The peer is what
people do without a survey, ``AutoModel.from_config`` on the CPU; its memory for the large geometries is
computed from the parameter count (bfloat16), because building them would not fit most machines.
"""

from __future__ import annotations

import json
import subprocess
import sys

GEOMETRIES = ("E2B", "E4B", "26B-A4B", "31B")

_SURVEY = """
import json, resource, sys, time
started = time.perf_counter()
import graftkit as gk
model_map = gk.survey(sys.argv[1])
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "sites": len(model_map), "params": model_map.model.params}))
"""

_PEER = """
import json, resource, sys, time
started = time.perf_counter()
import torch
from transformers import AutoModel, CONFIG_MAPPING
from graftkit.families import geometry
known = dict(geometry(sys.argv[1]))
model = AutoModel.from_config(CONFIG_MAPPING[known["model_type"]].from_dict(known), dtype=torch.bfloat16)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""

# The largest model whose weights the peer builds here; beyond it only the arithmetic is shown.
_PEER_LIMIT = 6e9


def main() -> None:
    """Print one line per geometry."""
    columns = f"{'geometry':10} {'sites':>6} {'survey':>8} {'peak':>9}"
    print(f"{columns} | {'from_config':>12} {'peak':>9} {'time ratio':>10}")
    for name in GEOMETRIES:
        survey = _measure(_SURVEY, name)
        ours = f"{name:10} {survey['sites']:6} {survey['seconds']:7.1f}s {survey['peak'] / 1e6:6.0f} MB"
        if survey["params"] > _PEER_LIMIT:
            print(f"{ours} | {'not built':>12} {2 * survey['params'] / 1e6:6.0f} MB  (weights alone, computed)")
            continue
        peer = _measure(_PEER, name)
        ratio = peer["seconds"] / survey["seconds"]
        print(f"{ours} | {peer['seconds']:11.1f}s {peer['peak'] / 1e6:6.0f} MB {ratio:9.1f}x")


def _measure(code: str, name: str) -> dict[str, float]:
    hub_id = f"google/gemma-4-{name}-it"
    done = subprocess.run([sys.executable, "-c", code, hub_id], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
