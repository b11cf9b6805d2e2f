"""A plan for a model of a trillion parameters, from a cold process, next to PEFT's adapter on the same model.

The geometry is DeepSeek V3's architecture at the size of Kimi K2 (61 layers, 384 experts; public configuration
figures). All linears and all experts are planned. Without a plan one builds the model on the meta device and puts
the adapter on it, to see what PEFT makes of the targets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns
from benchmarks.harness.processes import Ran, cold, told

PEER = "PEFT on meta"

_CONFIG = """
import json, sys, warnings
warnings.simplefilter("ignore")
layers, experts = map(int, sys.argv[1:])
from transformers import DeepseekV3Config
config = DeepseekV3Config(
    vocab_size=163840, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=layers, num_attention_heads=64, num_key_value_heads=64, n_shared_experts=1,
    n_routed_experts=experts, num_experts_per_tok=8, n_group=1, topk_group=1, first_k_dense_replace=1,
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)
"""

_OURS = """
import graftkit as gk
model_map = gk.survey(config)
plan = gk.plan(model_map, targets=["all-linear", "experts"], r=16)
print(json.dumps({"params": model_map.model.params}))
"""

_PEER = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
    params = model.num_parameters()
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=16, target_modules="all-linear", target_parameters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
print(json.dumps({"params": params}))
"""


_SIDES = {"graftkit": _OURS, PEER: _PEER}


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield one contest."""
    layers, experts = setting.of(quick=("3", "16"), full=("61", "384"))
    params = {name: told(_run(code, layers, experts))["params"] for name, code in _SIDES.items()}
    if len(set(params.values())) != 1:
        raise ValueError(f"the sides should build one model: {params}")
    sides = {name: partial(_figures, code, layers, experts) for name, code in _SIDES.items()}
    rows = tuple(Row("survey and plan", PEER, figure) for figure in (Figure.CPU, Figure.PEAK))
    # Both have just run once.
    yield Contest(f"{params[PEER] / 1e12:.2g} T parameters", rows, in_turns(sides, warmups=0))


def _figures(code: str, layers: str, experts: str) -> Figures:
    return _run(code, layers, experts).figures


def _run(code: str, layers: str, experts: str) -> Ran:
    return cold(sys.executable, "-c", _CONFIG + code, layers, experts)
