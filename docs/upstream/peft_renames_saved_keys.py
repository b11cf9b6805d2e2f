"""PEFT renames the keys of a saved LoRA once more when it loads them, and drops the tensors that fit no longer.

Saves a LoRA with `save_pretrained`, loads it with `PeftModel.from_pretrained`, and compares every tensor.
Needs torch, transformers and peft; runs on a CPU in seconds. Exits with 1 while the fault is there.
"""

import copy
import logging
import sys
import tempfile
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DetrConfig, SwinConfig

logging.disable(logging.WARNING)
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
LAGUNA = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
    "num_attention_heads_per_layer": [4, 4], "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
INKLING2 = {
    "head_dim": 16, "swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "layer_types": ["hybrid_sliding", "hybrid"],
    "unpadded_vocab_size": 64,
}  # fmt: skip
MISTRAL_LARGE4 = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8, "v_head_dim": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "index_head_dim": 8, "index_n_heads": 4,
    "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention", "indexed_attention"],
    "indexer_types": ["full", "full"],
}  # fmt: skip
SWIN = SwinConfig(
    image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)  # fmt: skip
DETR = DetrConfig(
    encoder_layers=1, decoder_layers=1, d_model=32, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=4,
)  # fmt: skip
MASKFORMER = {"backbone_config": SWIN, "decoder_config": DETR, "fpn_feature_size": 32, "mask_feature_size": 32}
# Model type -> its class, its small configuration, and the last parts of the linears' names.
CASES = {
    "laguna": (AutoModelForCausalLM, {**SMALL, **LAGUNA}, ["gate_proj", "up_proj", "down_proj"]),
    "inkling2_text": (AutoModelForCausalLM, {**SMALL, **INKLING2}, ["q_proj", "weight_proj"]),
    "mistral_large4_text": (AutoModel, {**SMALL, **MISTRAL_LARGE4}, ["gate_proj", "up_proj", "down_proj"]),
    "maskformer": (AutoModel, MASKFORMER, ["query", "value"]),
}


def lost(model_type: str) -> tuple[list[str], int]:
    """Return the tensors that are not the saved ones after loading, and how many were saved."""
    torch.manual_seed(0)
    auto, sizes, targets = CASES[model_type]
    base = auto.from_config(AutoConfig.for_model(model_type, **sizes))
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # among them "Found missing adapter keys while loading the checkpoint"
        adapted.save_pretrained(folder)
        loaded = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    saved = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    return [name for name, parameter in saved.items() if not torch.equal(parameter, loaded[name])], len(saved)


print("peft", version("peft"), "transformers", version("transformers"), "torch", version("torch"))
faulty = False
for case in CASES:
    names, saved = lost(case)
    faulty = faulty or bool(names)
    print(f"{case}: expected all {saved} tensors as saved; actual: {len(names)} are not")
    print(*(f"    {name}" for name in names[:4]), sep="\n")
sys.exit(1 if faulty else 0)
