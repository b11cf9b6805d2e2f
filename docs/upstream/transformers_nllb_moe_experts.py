"""transformers computes NLLB-MoE with its first two experts, whatever the router chose."""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

EXPERTS = 8

torch.manual_seed(0)
config = NllbMoeConfig(d_model=16, num_experts=EXPERTS, expert_capacity=64)
layer = NllbMoeSparseMLP(config, ffn_dim=32).eval()
states = torch.randn(1, 64, 16)

chosen, _, _ = layer.router(states.view(-1, 16))
wanted = sorted({int(index) for index in chosen.argmax(-1)})
called: list[int] = []
for index in range(EXPERTS):
    layer.experts[f"expert_{index}"].register_forward_hook(lambda *_, index=index: called.append(index))
with torch.no_grad():
    layer(states)

print(f"transformers {transformers.__version__}")
print(f"expected: the experts that the router chose run: {wanted}")
print(f"actual: {called}")
sys.exit(int(called != wanted))
