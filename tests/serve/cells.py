"""The cells of the table: which adapters of which families are served, as PEFT saves them and converted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

import graftkit as gk

# Name in the table -> what ``gk.twin`` takes.
FAMILIES: Mapping[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "gemma3": "gemma3_text",
    "gemma4-E2B": "google/gemma-4-E2B-it",
    "gemma4-31B": "google/gemma-4-31B-it",
    "gemma4-26B-A4B": "google/gemma-4-26B-A4B-it",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "gpt_oss": "gpt_oss",
}
# Every layout an engine has a class for is covered by these; the options behave alike on all that are dense.
DENSE = (
    "llama",
    "qwen3",
    "gemma3",
    "gemma4-E2B",
    "gemma4-31B",
    "gemma4-26B-A4B",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
)
MIXTURES = ("gemma4-26B-A4B", "mixtral", "qwen3_moe", "gpt_oss")
TOWERS = ("gemma4-E2B", "gemma4-31B", "gemma4-26B-A4B")
TIED = ("gemma3", *TOWERS)
EVERY = tuple(FAMILIES)

R = 4
# Of the largest change of a log-probability, in nats: far above any engine's rounding, far below nonsense.
EFFECT = (0.5, 5.0)
_TOKENS = [5, 6, 7]
_FIRST_SPECIAL_ID = 400


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        name: in the table.
        families: that have it.
        targets, scope, method, options: of ``gk.plan``.
    """

    name: str
    families: tuple[str, ...]
    targets: tuple[str, ...] = ("attention",)
    scope: tuple[str, ...] = ("language",)
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("attention", EVERY),
    Kind("all-linear", EVERY, ("all-linear",)),
    # Where all linears are more than attention and MLP: keys that are values, projections of per-layer inputs.
    Kind("mlp", TOWERS, ("mlp",)),
    Kind("rslora", DENSE, method="rslora"),
    Kind("rank-pattern", DENSE, options={"rank_pattern": {"o_proj": 2 * R}}),
    Kind("alpha-pattern", DENSE, options={"alpha_pattern": {"o_proj": 2 * R}}),
    Kind("experts", MIXTURES, ("experts",)),
    Kind("router", MIXTURES, ("router",)),
    Kind("embeddings", tuple(f for f in EVERY if f not in TIED), ("embed_tokens",)),
    Kind("head", tuple(f for f in EVERY if f not in TIED), ("head",), ("head",)),
    Kind("per-layer-gates", ("gemma4-E2B",), ("per_layer_input_gate", "per_layer_projection")),
    Kind("per-layer-projection", ("gemma4-E2B",), ("per_layer_model_projection",)),
    Kind("per-layer-embeddings", ("gemma4-E2B",), ("embed_tokens_per_layer",)),
    Kind("language-and-tower", TOWERS, ("all-linear",), ("language", "vision")),
    Kind("dora", DENSE, method="dora"),
    Kind("loha", DENSE, method="loha"),
    Kind("pissa", DENSE, options={"init_lora_weights": "pissa"}),
    Kind("tokens", DENSE, options={"trainable_token_indices": _TOKENS}),
    Kind("saved-head", tuple(f for f in DENSE if f not in TIED), options={"modules_to_save": ["lm_head"]}),
    Kind("saved-norm", DENSE, options={"modules_to_save": ["input_layernorm"]}),
    Kind("bias", ("qwen2", "gpt_oss"), options={"bias": "lora_only"}),
    Kind("bias-of-none", ("llama",), options={"bias": "lora_only"}),
)

# Family -> the kinds that are also merged, and the checkpoint served: what no other form brings to every engine.
MERGED_KINDS: Mapping[str, tuple[str, ...]] = {
    "llama": ("dora",),
    "gemma4-E2B": ("per-layer-embeddings",),
    "gemma4-31B": ("all-linear",),
    "gemma4-26B-A4B": ("experts",),
    "mixtral": ("experts",),
    "gpt_oss": ("experts",),
}


@dataclass(frozen=True)
class Flags:
    """Options with which an engine takes what it refuses otherwise.

    Attributes:
        options: of the server.
        request: of the adapter's loading.
    """

    options: Mapping[str, Any]
    request: Mapping[str, Any]


# (engine, family, kind) -> the options it is also served with, as PEFT saves it.
_EXPERTS_AS_STACKED = Flags({"enable_mixed_moe_lora_format": True}, {"is_3d_lora_weight": True})
FLAGGED: Mapping[tuple[str, str, str], Flags] = {
    ("vllm", family, "experts"): _EXPERTS_AS_STACKED for family in ("gemma4-26B-A4B", "qwen3_moe")
}


def kinds_of(family: str) -> list[Kind]:
    """Return the kinds of adapter of one family."""
    return [kind for kind in KINDS if family in kind.families]


def prefixes() -> list[list[int]]:
    """Return token ids after which the next token's log-probabilities are compared."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, _FIRST_SPECIAL_ID, (24,), generator=generator).tolist()
    mixed = [*ids[:6], *_TOKENS, *ids[6:]]
    return [mixed[:length] for length in range(4, 25)]


def log_probabilities(model: nn.Module, wanted: list[list[int]]) -> Any:
    """Return the log-probabilities of the next token after each prefix: float64, (prefixes, vocabulary)."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, -1].double() for ids in wanted]
    return torch.log_softmax(torch.stack(rows), dim=-1).numpy()


def save_adapter(base: Any, kind: Kind, folder: Path) -> Any:
    """Save a random adapter of one kind as PEFT does; return the log-probabilities of its model.

    Raises:
        GraftError: nothing of that kind can be planned for the base.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {**kind.options, **({"r": R} if kind.method != "loha" else {"r": R, "alpha": R})}
        plan = gk.plan(base, targets=list(kind.targets), scope=list(kind.scope), method=kind.method, **options)
        model = gk.attach(copy.deepcopy(base), plan)
        model.eval()
        given = _given_effect(model)
    model.save_pretrained(folder)
    return given


def _given_effect(model: PeftModel) -> Any:
    """Add noise to what the adapter trains until its effect is within bounds; return the log-probabilities."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    noise = {name: torch.randn_like(p) for name, p in trained.items()}
    wanted = prefixes()
    before = log_probabilities(model, wanted)
    for std in _deviations():
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name] + std * noise[name])
        after = log_probabilities(model, wanted)
        if EFFECT[0] <= np.abs(after - before).max() <= EFFECT[1]:
            return after
    raise AssertionError(f"no noise gives {type(model).__name__} an effect within {EFFECT}")


def _deviations() -> Iterator[float]:
    """Yield standard deviations, from one that suits most adapters, each time a further step from it."""
    for step in range(12):
        yield 0.2 * 0.7**step
        yield 0.2 / 0.7**step
