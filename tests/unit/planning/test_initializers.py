"""The table of initializers says what the installed PEFT does."""

from __future__ import annotations

import re
import typing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

from graftkit.planning.initializers import (
    INITIALIZERS,
    default_config,
    initializer_names,
    initializer_of,
    moves_base,
)

# The values that PEFT's own type lists, with a number of iterations where it asks for one, and LoRA-GA's.
VALUES = [name.replace("[number of iters]", "2") for name in initializer_names()]
CASES = (str.lower, str.upper, str.title)
# PEFT reads these from the base layer, where its preprocessing left them.
COLLECTED = {"corda": "eigens", "lora_ga": "_peft_loraga_grad"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*but `(eva|corda)_config` is not specified:UserWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with:UserWarning"),
]


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)  # type: ignore[no-any-return]


def options_of(value: str) -> dict[str, Any]:
    return {
        "loftq": {"loftq_config": LoftQConfig(loftq_bits=4)},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
    }.get(value, {})


def base(value: str) -> Linears:
    """A linear, with what the preprocessing of CorDA or LoRA-GA leaves on it."""
    torch.manual_seed(0)
    model = Linears()
    weight = model.site.weight.detach()
    if value.lower().startswith("corda"):
        u, s, v = torch.linalg.svd(weight)
        model.site.eigens = SimpleNamespace(U_WC=u[:, :2], S_WC=s[:2], V_WC=v.T[:, :2])
    if value.lower() == "lora_ga":
        model.site._peft_loraga_grad = torch.randn(8, 8)
    return model


def attached(value: str, model: Linears) -> torch.Tensor:
    """The base weight after PEFT attached an adapter with this initializer."""
    options = options_of(value)
    config = LoraConfig(r=2, target_modules=["site"], init_lora_weights=value, **options)  # type: ignore[arg-type]
    adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    return adapted.get_base_model().site.get_base_layer().weight.detach()  # type: ignore[no-any-return]


def refusal(value: str) -> str | None:
    try:
        attached(value, base(value))
    except (ValueError, AssertionError) as error:
        return str(error)
    return None


def test_every_value_of_peft_s_type_has_a_row() -> None:
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    literals = {n for arm in typing.get_args(hint) for n in typing.get_args(arm)}
    assert literals == set(initializer_names()) - {"lora_ga"}
    assert {row.name for v in VALUES if (row := initializer_of(v))} == {row.name for row in INITIALIZERS}


def test_every_value_that_peft_takes_moves_the_base_where_its_row_says_so() -> None:
    refusals = {v: refusal(v) for v in dict.fromkeys(case(v) for v in VALUES for case in CASES)}
    taken = [value for value, said in refusals.items() if said is None]
    assert {"olora", "OLORA", "Gaussian", "pissa_niter_2", "MICA", "corda", "lora_ga"} <= set(taken)
    # LoftQ's own name is taken, and quantizes on a GPU.
    unknown = {value for value, said in refusals.items() if said and "Unknown initialization" in said}
    assert set(refusals) - set(taken) - unknown <= {"loftq"}
    moved = {v: not torch.equal(attached(v, base(v)), base(v).site.weight) for v in taken}
    assert moved == {v: moves_base(v) for v in taken}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="LoftQ quantizes on a GPU")
def test_loftq_moves_the_base() -> None:
    model = base("loftq").cuda()
    assert not torch.equal(attached("loftq", model).cpu(), base("loftq").site.weight)


def test_without_their_data_corda_fails_and_lora_ga_leaves_the_base_as_it_is() -> None:
    models = {name: base(name) for name in COLLECTED}
    for name, note in COLLECTED.items():
        delattr(models[name].site, note)
    with pytest.raises(ValueError, match="eigens"):
        attached("corda", models["corda"])
    assert torch.equal(attached("lora_ga", models["lora_ga"]), base("lora_ga").site.weight)
    rows = [row for row in INITIALIZERS if row.name in COLLECTED]
    assert [(row.needs_data, row.rebuilt_on_load) for row in rows] == [(True, False)] * 2


def test_eva_starts_from_nothing_until_it_gets_data() -> None:
    model: Any = base("eva")
    attached("eva", model)
    assert not model.site.lora_B["default"].weight.any()
    assert [row.name for row in INITIALIZERS if row.needs_data] == ["eva", *COLLECTED]
    assert [row.name for row in INITIALIZERS if row.needs_conversion] == ["pissa_niter", *COLLECTED]


@pytest.mark.parametrize(
    "row", [row for row in INITIALIZERS if not row.needs_data and row.name != "loftq"], ids=lambda row: row.name
)
def test_what_is_rebuilt_on_loading_does_not_depend_on_the_random_state(row: Any) -> None:
    value = "pissa_niter_1" if row.name == "pissa_niter" else row.name
    bases = []
    for seed in (1, 2):
        model = base(value)
        torch.manual_seed(seed)
        bases.append(attached(value, model))
    assert torch.equal(*bases) is row.rebuilt_on_load


@pytest.mark.parametrize(
    ("name", "config_class"),
    [("loftq", LoftQConfig), ("eva", EvaConfig), ("corda", CordaConfig), ("lora_ga", LoraGAConfig)],
)
def test_an_initializer_gets_its_configuration_unless_it_is_given(name: str, config_class: type) -> None:
    field = f"{name}_config"
    assert default_config(name, {}) == {field: config_class()}
    assert default_config(name, {field: config_class()}) == {}


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_an_initializer_without_a_configuration_gets_none(init: object) -> None:
    assert default_config(init, {}) == {}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (True, None),
        (None, None),
        ("true", None),
        ("pissax", "pissa"),
        ("pissa_niter_16", "pissa_niter"),
        ("Corda", "corda"),
        ("evax", None),
    ],
)
def test_a_value_is_found_as_peft_reads_it(given: object, name: str | None) -> None:
    row = initializer_of(given)
    assert (row and row.name) == name


def test_names_are_in_lower_case() -> None:
    assert all(re.fullmatch("[a-z_]+", row.name) for row in INITIALIZERS)
