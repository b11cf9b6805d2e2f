"""``gk.attach`` against stock ``get_peft_model`` with an equivalent regular expression, as a ratio in one run.

Run: python benchmarks/attach.py
Both attach the same adapter to the same architecture on the meta device, alternating; each figure is the median of
five. What ``gk.attach`` adds is the check of its postconditions.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

ROUNDS = 5
GEMMA = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
QWEN = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj"


def main() -> None:
    """Print one line per model."""
    warnings.simplefilter("ignore")
    print(f"{'model':22} {'sites':>6} {'get_peft_model':>15} {'gk.attach':>10} {'ratio':>6}")
    for name, config, targets, regex in _cases():
        _measure(name, config, targets, regex)


def _cases() -> list[tuple[str, Any, list[str], str]]:
    from transformers import Qwen3MoeConfig

    from graftkit.surveying.sources.load_config import load_config

    gemma = load_config("google/gemma-4-31B-it").config
    qwen = Qwen3MoeConfig(num_experts=64, num_experts_per_tok=8, num_hidden_layers=48)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return [("Gemma 4 31B (meta)", gemma, seven, GEMMA), ("64 experts (meta)", qwen, ["attention"], QWEN)]


def _measure(name: str, config: Any, targets: list[str], regex: str) -> None:
    from peft import LoraConfig, get_peft_model

    import graftkit as gk
    from graftkit.surveying.sources.build import build_on_meta

    plan = gk.plan(config, targets=targets)
    stock = LoraConfig(target_modules=regex, task_type="CAUSAL_LM", r=16)
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(ROUNDS):
        times["stock"].append(_timed(lambda m: get_peft_model(m, copy.deepcopy(stock)), build_on_meta(config)))
        times["ours"].append(_timed(lambda m: gk.attach(m, plan), build_on_meta(config)))
    peer, ours = (statistics.median(times[key]) for key in ("stock", "ours"))
    print(f"{name:22} {len(plan.attached):6} {peer:14.2f}s {ours:9.2f}s {ours / peer:6.3f}")


def _timed(attach: Callable[[Any], Any], model: Any) -> float:
    started = time.perf_counter()
    attach(model)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
