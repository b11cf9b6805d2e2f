"""Every floating-point output of a forward is found, by a stable name, and a loss depends on each of them."""

from __future__ import annotations

import copy
import random
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

import graftkit as gk
from graftkit.modeling.outputs import floating_outputs, loss_of, loss_over, main_output, outputs_of
from graftkit.modeling.random_state import seeding

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Plain:
    audio: torch.Tensor
    lengths: torch.Tensor


def test_every_container_is_searched() -> None:
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    output = CausalLMOutputWithPast(
        loss=torch.tensor(1.0),
        logits=torch.zeros(2),
        past_key_values=cache,
        hidden_states=(torch.ones(1), [torch.ones(2), {"deep": torch.ones(3)}]),
        attentions=(Pair(torch.ones(1), None), Plain(torch.ones(1), torch.ones(1, dtype=torch.long))),
    )
    assert list(floating_outputs(output)) == [
        "loss",
        "logits",
        "hidden_states.0",
        "hidden_states.1.0",
        "hidden_states.1.1.deep",
        "attentions.0.left",
        "attentions.1.audio",
    ]


@pytest.mark.parametrize(
    "name",
    ["past_key_values", "encoder_past_key_values", "cache_params", "padding_cache", "mems", "shared_kv_states"],
)
def test_what_one_pass_hands_to_the_next_is_no_output(name: str) -> None:
    handed = {name: ((torch.ones(1), torch.ones(1)),), "logits": torch.ones(1)}
    assert list(floating_outputs(handed)) == ["logits"]


def test_complex_numbers_are_compared_as_pairs() -> None:
    (found,) = floating_outputs(torch.tensor([1 + 2j])).values()
    assert found.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("output", "main"),
    [
        pytest.param(torch.tensor([3.0]), 3.0, id="a tensor"),
        pytest.param((torch.tensor([1]), torch.tensor([3.0])), 3.0, id="after an integer"),
        pytest.param({"loss": torch.tensor(1.0), "a": torch.tensor([3.0])}, 3.0, id="after a loss"),
        pytest.param({"a": torch.tensor([1.0]), "logits": torch.tensor([3.0])}, 3.0, id="logits"),
        pytest.param({"a": torch.tensor([1.0]), "logits": (torch.tensor([3.0]),)}, 3.0, id="several logits"),
        pytest.param({"loss": torch.tensor(3.0)}, 3.0, id="only a loss"),
    ],
)
def test_the_main_output(output: Any, main: float) -> None:
    assert main_output(output).item() == main


@pytest.mark.parametrize("read", [main_output, loss_over])
def test_an_output_without_numbers_is_refused(read: Any) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        read({"ids": torch.tensor([1])})


class TwoHeads(nn.Module):
    """A norm, and two heads of which the second is no part of the first output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.pooler = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> BaseModelOutputWithPooling:
        hidden = self.norm(self.body(x))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.pooler(hidden[:, 0]))


def test_the_loss_reaches_every_output() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    loss_of(model, {"x": torch.randn(2, 3, 8)}).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_passes_a_norm() -> None:
    """A mean of squares would leave nothing but rounding before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    loss_over(model(torch.randn(2, 3, 8))).backward()
    assert model[0].weight.grad is not None
    assert float(model[0].weight.grad.abs().max()) > 1e-3


def test_a_loss_of_the_models_own_is_taken() -> None:
    class WithLoss(TwoHeads):
        def forward(self, x: torch.Tensor) -> Any:
            return CausalLMOutputWithPast(loss=self.body(x).sum(), logits=x)

    model = WithLoss()
    x = torch.randn(2, 8)
    assert loss_of(model, {"x": x}) == model.body(x).sum()


def test_an_output_that_has_no_gradient_does_not_stop_the_others() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss_over({"mask": torch.full((2,), float("-inf")), "logits": weight * 2}).backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


class Samples(nn.Module):
    """Adds noise in every forward, from each of the generators that models draw from."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 4), draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.draw()


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: torch.randn(4), id="torch"),
        pytest.param(lambda: float(np.random.rand()), id="NumPy"),
        pytest.param(random.random, id="Python"),
    ],
)
def test_a_model_that_samples_repeats_itself_and_the_state_stays(draw: Any) -> None:
    model, x = Samples(draw), {"x": torch.ones(2, 4)}
    with seeding(model, 5):
        undisturbed = draw()
    first, second = outputs_of(model, x), outputs_of(model, x)
    assert torch.equal(first[""], second[""])
    assert not torch.equal(first[""], outputs_of(model, x, seed=1)[""])
    with seeding(model, 5):
        outputs_of(model, x)
        assert torch.equal(torch.as_tensor(draw()), torch.as_tensor(undisturbed))


def test_half_precision_becomes_single_and_double_stays() -> None:
    x = torch.ones(1, 4)
    assert outputs_of(nn.Linear(4, 4).bfloat16(), {"input": x.bfloat16()})[""].dtype == torch.float32
    assert outputs_of(nn.Linear(4, 4).double(), {"input": x.double()})[""].dtype == torch.float64


def test_what_adalora_adds_to_the_loss_is_left_out(tmp_path: Path) -> None:
    """Its orthogonality is no output of the data, trains what no data reach, and fails outside of training."""
    base = gk.twin("llama")
    batch = gk.example_batch(base)
    before = outputs_of(base, batch)
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(base), config)
    assert adapted(**batch).loss > before["loss"] + 0.01
    after = outputs_of(adapted, batch)
    assert {name: float((after[name] - before[name]).abs().max()) for name in before} == dict.fromkeys(before, 0.0)

    loss_of(adapted, batch).backward()
    matrices = [p for name, p in adapted.named_parameters() if "lora_A" in name or "lora_B" in name]
    assert matrices
    assert not any(p.grad.any() for p in matrices)

    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert outputs_of(again, batch)["loss"] == after["loss"]
