"""Seconds and peak memory of a plan for a model of a trillion parameters, from a cold process.

Run: python benchmarks/plan.py
The geometry is DeepSeek V3's architecture at the size of Kimi K2 (61 layers, 384 experts; public configuration
figures). All linears and all experts are planned. The peer is the weights themselves: what is needed to
load the model before asking what could be adapted (bfloat16, computed).
"""

from __future__ import annotations

import json
import subprocess
import sys

_PLAN = """
import json, resource, time
started = time.perf_counter()
import graftkit as gk
from transformers import DeepseekV3Config
config = DeepseekV3Config(
    vocab_size=163840, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_attention_heads=64, num_key_value_heads=64, n_shared_experts=1,
    n_routed_experts=384, num_experts_per_tok=8, n_group=1, topk_group=1, first_k_dense_replace=1,
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)
imported = time.perf_counter()
model_map = gk.survey(config)
surveyed = time.perf_counter()
plan = gk.plan(model_map, targets=["all-linear", "experts"])
planned = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({
    "params": model_map.model.params, "sites": len(model_map), "attached": len(plan.attached),
    "trainable": plan.trainable_params, "import": imported - started, "survey": surveyed - imported,
    "plan": planned - surveyed, "total": planned - started, "peak": peak,
}))
"""


def main() -> None:
    """Print the figures of one cold run."""
    done = subprocess.run([sys.executable, "-c", _PLAN], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{figures['params'] / 1e12:.2f} T parameters, {figures['sites']} sites, {figures['attached']} adapted")
    steps = ", ".join(f"{name} {figures[name]:.1f} s" for name in ("import", "survey", "plan", "total"))
    print(f"{steps}; peak {figures['peak'] / 1e6:.0f} MB; the weights alone: {2 * figures['params'] / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
