"""transformers' TVP takes one video at a time."""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import ResNetConfig, TvpConfig, TvpModel

torch.manual_seed(0)
backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"])
config = TvpConfig(
    backbone_config=backbone,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_frames=2,
    max_img_size=128,
    visual_prompt_size=16,
    vocab_size=32,
)
model = TvpModel(config).eval()


def outcome(rows: int) -> str:
    try:
        with torch.no_grad():
            ids = torch.randint(1, 32, (rows, 4))
            model(input_ids=ids, pixel_values=torch.randn(rows, 2, 3, 128, 128))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "it runs"


print(f"transformers {transformers.__version__}")
print("expected: one video and two run")
one, two = outcome(1), outcome(2)
print(f"actual: one: {one}; two: {two}")
sys.exit(int(one == "it runs" and two != "it runs"))
