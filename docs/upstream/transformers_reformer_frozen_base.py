"""No adapter on transformers' Reformer gets a gradient: with a frozen base its layers compute none."""

from __future__ import annotations

import sys
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import ReformerConfig, ReformerForMaskedLM

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = ReformerConfig(
    is_decoder=False,
    vocab_size=32,
    hidden_size=16,
    feed_forward_size=16,
    num_attention_heads=2,
    attention_head_size=8,
    attn_layers=["local", "lsh"],
    axial_pos_embds=False,
    max_position_embeddings=64,
)


def loss(inputs_require_grads: bool) -> torch.Tensor:
    model = get_peft_model(ReformerForMaskedLM(config), LoraConfig(r=2, target_modules=["query", "value"]))
    if inputs_require_grads:
        model.enable_input_require_grads()
    ids = torch.randint(3, 30, (1, 64))
    return model.train()(input_ids=ids, labels=ids).loss


plain, with_inputs = loss(False).requires_grad, loss(True).requires_grad
print(f"transformers {transformers.__version__}, PEFT {peft.__version__}")
print("expected: the loss of a model in training mode depends on its adapter")
print(f"actual: it has a gradient: {plain}; after enable_input_require_grads(): {with_inputs}")
sys.exit(int(with_inputs and not plain))
