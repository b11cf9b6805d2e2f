"""Linears whose class is not torch's: found by their sizes and by what they compute, reached as parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graftkit as gk
from graftkit.surveying.obstacles import is_linear_of_its_own


class Own(nn.Module):
    def __init__(self, in_features=3, out_features=4, twist=0.0):
        super().__init__()
        self.in_features, self.out_features, self.twist = in_features, out_features, twist
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + self.twist, None


class WithoutSizes(Own):
    def __init__(self):
        super().__init__()
        del self.in_features


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        (Own(), True),
        (Own(twist=0.1), False),
        (WithoutSizes(), False),
        (nn.Linear(3, 4), False),
        (nn.ReLU(), False),
    ],
    ids=["a linear", "something more", "no sizes", "torch's", "no weight"],
)
def test_a_linear_is_known_by_what_it_computes(module, is_one):
    assert is_linear_of_its_own(module) is is_one


def test_all_linear_reaches_them_as_parameters():
    model = gk.twin("ibert")
    made = gk.plan(model, targets=["all-linear"])
    assert {one.via for one in made.attached} == {"target_parameters"}
    assert {one.site.path.rpartition(".")[2] for one in made.attached} == {"weight"}
    roles = {one.site.role for one in made.attached}
    assert {"attention.q", "attention.k", "attention.v", "attention.o", "mlp.down"} <= roles
    batch = gk.example_batch(model)
    adapted = gk.attach(copy.deepcopy(model), made)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
        changed = adapted(**batch).logits
        merged = adapted.merge_and_unload()(**batch).logits
        assert not torch.allclose(changed, model(**batch).logits, atol=1e-3)
    torch.testing.assert_close(merged, changed)
