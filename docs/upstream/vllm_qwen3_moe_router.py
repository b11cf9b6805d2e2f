"""vLLM computes Qwen 3 MoE's routers without the LoRA that it has loaded for them.

Makes a tiny Qwen 3 MoE and a LoRA on its routers alone, and compares what vLLM answers with and without the LoRA
with transformers, where the update is added to the weights. Needs vllm, with the torch, transformers and
safetensors that it installs, and a GPU: the kernel of experts with LoRA has no CPU version. Exits with 1 while the
fault is there.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import vllm
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PROMPT, RANK, LAYERS = [5, 17, 42, 99, 3, 64, 28, 7], 8, 2


def log_probabilities(model: Qwen3MoeForCausalLM) -> torch.Tensor:
    """Return transformers' log-probabilities of the token after the prompt, (vocabulary,)."""
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(-1)


def served(engine: LLM, adapter: LoRARequest | None) -> torch.Tensor:
    """Return vLLM's log-probabilities of the token after the prompt, (vocabulary,)."""
    options = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], options, lora_request=adapter)
    found = answer.outputs[0].logprobs[0]
    return torch.tensor([found[token].logprob for token in range(len(found))])


torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
    norm_topk_prob=True, max_position_embeddings=128,
)  # fmt: skip
model = Qwen3MoeForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
with tempfile.TemporaryDirectory() as folder:
    base, lora = Path(folder, "base"), Path(folder, "lora")
    model.save_pretrained(base)
    before = log_probabilities(model)
    lora.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        a, b = torch.randn(RANK, 64), torch.randn(8, RANK)
        name = f"base_model.model.model.layers.{layer}.mlp.gate"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        with torch.no_grad():
            model.model.layers[layer].mlp.gate.weight.add_(b @ a)
    save_file(tensors, lora / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["gate"], "bias": "none"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    engine = LLM(
        str(base), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        max_logprobs=-1, enable_lora=True, max_lora_rank=RANK, block_size=32,
    )  # fmt: skip
    expected = float((log_probabilities(model) - before).abs().max())
    actual = float((served(engine, LoRARequest("router", 1, str(lora))) - served(engine, None)).abs().max())
print("vllm", vllm.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print(f"expected: the LoRA changes log-probabilities by {expected:.3f}; actual: by {actual:.3f}")
sys.exit(0 if abs(expected - actual) < 0.01 * expected else 1)
