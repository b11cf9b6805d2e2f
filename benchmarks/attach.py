"""``gk.attach`` against stock ``get_peft_model`` with an equivalent regular expression.

Both attach the same adapter to the same architecture on the meta device, each to a model of its own. What
``gk.attach`` adds is the check of its postconditions.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns

PEER = "get_peft_model"
GEMMA = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
QWEN = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield one contest for a large dense model, and one for a model of experts."""
    from transformers import Qwen3MoeConfig

    from graftkit.surveying.sources.load_config import load_config

    gemma = load_config(f"google/gemma-4-{setting.of(quick='E2B', full='31B')}-it").config
    yield _contest("Gemma 4", gemma, SEVEN, GEMMA)
    layers = setting.of(quick=4, full=48)
    experts = Qwen3MoeConfig(num_experts=64, num_experts_per_tok=8, num_hidden_layers=layers)
    yield _contest("64 experts", experts, ["attention"], QWEN)


def _contest(name: str, config: Any, targets: list[str], regex: str) -> Contest:
    from peft import LoraConfig, get_peft_model

    import graftkit as gk

    plan = gk.plan(config, targets=targets)
    stock = LoraConfig(target_modules=regex, task_type="CAUSAL_LM", r=16)
    sides = {
        "graftkit": partial(_timed, lambda model: gk.attach(model, plan), config),
        PEER: partial(_timed, lambda model: get_peft_model(model, copy.deepcopy(stock)), config),
    }
    return Contest(f"{name}, {len(plan.attached)} sites", (Row("gk.attach", PEER, Figure.CPU),), in_turns(sides))


def _timed(attach: Callable[[Any], Any], config: Any) -> Figures:
    from graftkit.surveying.sources.build import build_on_meta

    model = build_on_meta(config)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.process_time()
        attach(model)
    return {Figure.CPU: time.process_time() - started}
