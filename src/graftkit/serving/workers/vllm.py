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
# The CPU backend wants a multiple of this.
_BLOCK = 32


def start(job: dict[str, Any], _folder: Path) -> VllmSession:
    """Load the base; ``options`` are arguments of ``vllm.LLM``."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    on_cpu = _on_cpu()
    replaced = replace_gpu_kernels() if on_cpu else ()
    longest = max(len(prefix) for prefix in job["prefixes"])
    options: dict[str, Any] = {
        "model": job["base"],
        "dtype": "float32",
        "skip_tokenizer_init": True,
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
    return VllmSession(engine, job["prefixes"], job.get("requests", {}), str(vllm.__version__), tuple(replaced))


class VllmSession:
    """An engine with its base (see ``launch.Session``)."""

    def __init__(
        self,
        engine: Any,
        prefixes: list[list[int]],
        requests: dict[str, dict[str, Any]],
        version: str,
        replaced: tuple[str, ...],
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


def replace_gpu_kernels() -> list[str]:
    """Replace kernels that only a GPU runs by loops in torch, and return their names."""
    return []
