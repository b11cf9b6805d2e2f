"""vLLM: one engine serves the base and every adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# In a process of its own the engine could not be given loops for kernels, and its errors would come without words.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# The ranks that it makes room for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What is replaced on a CPU.
_MOE_KERNEL = "the Triton kernel of experts with LoRA, by a loop in torch over vLLM's own buffers"
# The CPU backend wants a multiple of this.
_BLOCK = 32


def start(job: dict[str, Any], _folder: Path) -> VllmSession:
    """Load the base; ``options`` are arguments of ``vllm.LLM``."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    on_cpu = _on_cpu()
    replaced = run_experts_in_torch() if on_cpu else []
    longest = max(len(prefix) for prefix in job["prefixes"])
    options: dict[str, Any] = {
        "model": job["base"],
        "dtype": "float32",
        # It is given token ids; but models that also take pictures want their tokenizer.
        "skip_tokenizer_init": not any(Path(job["base"]).glob("tokenizer*")),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": -(-(longest + 1) // _BLOCK) * _BLOCK,
        "max_logprobs": -1,
        "seed": 0,
    }
    if on_cpu:
        options |= {"block_size": _BLOCK}
    if job["adapters"]:
        rank = next((size for size in _RANKS if size >= job["max_rank"]), _RANKS[-1])
        options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
    engine = vllm.LLM(**{**options, **job.get("options", {})})
    return VllmSession(engine, job["prefixes"], job.get("requests", {}), str(vllm.__version__), replaced)


class VllmSession:
    """An engine with its base (see ``launch.Session``)."""

    def __init__(
        self,
        engine: Any,
        prefixes: list[list[int]],
        requests: dict[str, dict[str, Any]],
        version: str,
        replaced: list[str],
    ) -> None:
        self.version = version
        self.replaced = replaced
        self._engine = engine
        self._prefixes = prefixes
        self._requests = requests
        self._loaded = 0

    def base(self) -> Any:
        return self._log_probabilities(None)

    def load(self, name: str, path: str) -> Any:
        from vllm.lora.request import LoRARequest

        self._loaded += 1
        request = LoRARequest(name, self._loaded, path, **self._requests.get(name, {}))
        # Refused while it generates, the request would stay in the queue, and the next call would hang.
        self._engine.llm_engine.add_lora(request)
        return request

    def adapted(self, adapter: Any) -> Any:
        values = self._log_probabilities(adapter)
        self._engine.llm_engine.remove_lora(adapter.lora_int_id)
        return values

    def _log_probabilities(self, adapter: Any) -> Any:
        import numpy as np
        from vllm import SamplingParams

        # Of the next token alone: `prompt_logprobs` crashes with an adapter on the head.
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False, ignore_eos=True)
        prompts = [{"prompt_token_ids": prefix} for prefix in self._prefixes]
        outputs = self._engine.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        found = [output.outputs[0].logprobs[0] for output in outputs]
        values = np.full((len(found), 1 + max(max(row) for row in found)), -np.inf, dtype=np.float32)
        for row, logprobs in zip(values, found, strict=True):
            for token, entry in logprobs.items():
                row[token] = entry.logprob
        return values


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def run_experts_in_torch() -> list[str]:
    """Let experts that carry an adapter be computed by loops in torch: vLLM has a kernel for GPUs alone.

    The loops read the buffers that vLLM has filled from the adapter: they show what it made of the file, not what
    its kernel computes. Source: ``vllm/model_executor/layers/fused_moe/experts/triton_moe.py``, ``TritonExperts``.

    Returns:
        The names of what was replaced: empty until an expert is computed.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    replaced: list[str] = []

    def apply(
        experts: Any,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: Any,
        *_unused: Any,
        apply_router_weight_on_input: bool = False,
        **_more: Any,
    ) -> None:
        if not replaced:
            replaced.append(_MOE_KERNEL)
        lora = experts._lora_context
        output.zero_()
        for token, (chosen, weights) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
            adapter = -1 if lora is None else int(lora.punica_wrapper.token_lora_indices[token])
            for expert, weight in zip(chosen, weights, strict=True):
                hidden = _linear(hidden_states[token], w1[expert], experts.w1_bias, expert)
                if adapter >= 0:
                    hidden = hidden + _gate_up_update(
                        lora, hidden_states[token], adapter, expert, activation.value
                    )
                inner = _activated(hidden, activation.value)
                result = _linear(inner, w2[expert], experts.w2_bias, expert)
                if adapter >= 0:
                    result = result + _update(
                        lora.w2_lora_a_stacked, lora.w2_lora_b_stacked, inner, adapter, expert, 0
                    )
                output[token] += result if apply_router_weight_on_input else result * weight

    TritonExperts.apply = apply
    return replaced


def _linear(x: Any, weight: Any, bias: Any, expert: int) -> Any:
    return weight @ x if bias is None else weight @ x + bias[expert]


def _update(a: Any, b: Any, x: Any, adapter: int, expert: int, part: int) -> Any:
    """Return B·A·x from buffers of shape (adapters, experts, rank, in) and (adapters, experts, out, rank)."""
    first, second = a[part][adapter], b[part][adapter]
    # A factor that all experts share is kept once.
    return second[min(expert, len(second) - 1)] @ (first[min(expert, len(first) - 1)] @ x)


def _gate_up_update(lora: Any, x: Any, adapter: int, expert: int, activation: str) -> Any:
    """Return the update of gate and up together, ordered as the base's rows are."""
    import torch

    a, b = lora.w13_lora_a_stacked, lora.w13_lora_b_stacked
    parts = [_update(a, b, x, adapter, expert, part) for part in range(lora.w13_num_slices)]
    if len(parts) == 2 and activation == "swigluoai":
        return torch.stack(parts, dim=-1).flatten()
    return torch.cat(parts)


def _activated(hidden: Any, activation: str) -> Any:
    """Return the activation of gate times up, by the name that vLLM has for it.

    Raises:
        NotImplementedError: the model has another one.
    """
    from torch.nn import functional

    if activation == "swigluoai":  # rows of gate and up take turns; the limit and the slope are gpt-oss's
        gate, up = hidden[::2].clamp(max=7.0), hidden[1::2].clamp(min=-7.0, max=7.0)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    gate, up = hidden.chunk(2)
    if activation == "silu":
        return functional.silu(gate) * up
    if activation in {"gelu", "gelu_tanh"}:
        return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    raise NotImplementedError(f"experts with the activation {activation} cannot be computed without a GPU")
