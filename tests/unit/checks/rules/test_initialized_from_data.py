"""GK213: an adapter that has its initializer's values, by whichever way, and one that has plain LoRA's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from tests.unit.checks.live_adapters import with_effect
from tests.unit.checks.observed import finding, seen
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.checks.doctor import doctor
from graftkit.checks.rehearse import rehearse
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.training import Training

ERROR, WARNING, INFO = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
Twins = Callable[[str], nn.Module]
# What PEFT says of EVA without low_cpu_mem_usage, and torch of LoRA-GA's hooks.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NEED_DATA = ("eva", "corda", "lora_ga")


def plan_of(model: nn.Module, init: str, **options: Any) -> gk.Plan:
    if init == "eva":
        options = {"eva_config": {"rho": 1.0}, **options}
    return gk.plan(model, targets="attention", init_lora_weights=init, **{"r": 2, **options})


def batches(model: Any, count: int = 2) -> list[dict[str, Any]]:
    return [gk.example_batch(model, seed=seed, batch_size=4) for seed in range(count)]


def on_model(model: PeftModel, **given: Any) -> Any:
    return seen("GK213", model=model, peft_config=model.peft_config["default"].to_dict(), **given)


@pytest.mark.rule_passes("GK213")
@pytest.mark.parametrize("init", NEED_DATA)
def test_gk213_our_own_initialization(twin_of: Twins, init: str) -> None:
    model = twin_of("llama")
    adapted = gk.initialize(model, plan_of(model, init), batches(model))
    assert on_model(adapted).severity is OK


def stock_eva(model: Any, **options: Any) -> PeftModel:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, **options)
    )
    adapted = get_peft_model(model, config)
    initialize_lora_eva_weights(adapted, batches(model), show_progress_bar=False)
    return adapted


def stock_corda(model: Any) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=_corda())
    one_row = gk.example_batch(model, batch_size=1)
    preprocess_corda(model, config, run_model=lambda: model(**one_row))
    return get_peft_model(model, config)


def _corda() -> Any:
    from peft.tuners.lora.config import CordaConfig

    return CordaConfig()


def stock_lora_ga(model: Any) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    batch = gk.example_batch(model)
    preprocess_loraga(model, config, lambda: model(**batch).loss.backward())
    return get_peft_model(model, config)


@pytest.mark.rule_passes("GK213")
@pytest.mark.parametrize(
    "make", [stock_eva, lambda model: stock_eva(model, whiten=True), stock_corda, stock_lora_ga]
)
def test_gk213_what_stock_peft_has_initialized_is_no_false_alarm(
    twin_of: Twins, make: Callable[[nn.Module], PeftModel]
) -> None:
    assert on_model(make(twin_of("llama"))).severity is OK


@pytest.mark.rule_fails("GK213")
@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_gk213_an_attached_adapter_without_data(twin_of: Twins, init: str) -> None:
    model = twin_of("llama")
    adapted = gk.attach(model, plan_of(model, init))
    report = gk.verify(adapted, gk.example_batch(model))
    found = finding(report, "GK213")
    assert found.severity is ERROR
    assert found.evidence["plain"] == found.evidence["layers"] == 8


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 24),
    features=st.integers(8, 512),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gk213_peft_s_own_draw_is_known_at_every_size(
    rank: int, features: int, seed: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    adapted = get_peft_model(
        nn.Sequential(nn.Linear(features, 8)), LoraConfig(r=rank, target_modules=["0"], init_lora_weights="eva")
    ).to(dtype)
    assert on_model(adapted).severity is ERROR


@pytest.mark.rule_fails("GK213")
def test_gk213_some_layers_that_peft_left_plain(twin_of: Twins) -> None:
    """PEFT's EVA leaves a layer plain that its state has no components for, with a warning."""
    model = twin_of("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="eva")
    adapted = get_peft_model(model, config)
    only = {n: torch.eye(2, m.in_features) for n, m in adapted.named_modules() if n.endswith("q_proj")}
    with pytest.warns(UserWarning, match="v_proj"):
        initialize_lora_eva_weights(adapted, eva_state_dict=only)
    found = on_model(adapted)
    assert found.severity is WARNING
    assert found.evidence["plain"] == found.evidence["layers"] // 2


@pytest.mark.parametrize(("init", "verdict"), [("eva", UNKNOWN), ("lora_ga", UNKNOWN), ("corda", OK)])
def test_gk213_a_trained_adapter_does_not_show_how_it_began(
    twin_of: Twins, init: str, verdict: gk.Severity
) -> None:
    model = twin_of("llama")
    adapted = gk.initialize(model, plan_of(model, init), batches(model))
    assert on_model(with_effect(adapted)).severity is verdict


def test_gk213_names_the_sites_that_eva_left_without_a_rank(twin_of: Twins) -> None:
    model = twin_of("llama")
    plan = gk.plan(model, r=1, init_lora_weights="eva", eva_config={"rho": 4.0, "tau": 0.5})
    adapted = gk.initialize(model, plan, [gk.example_batch(model, seed=n, batch_size=8) for n in range(4)])
    left = {a.path for a in plan.attached} - adapted_sites(adapted)
    found = on_model(adapted, plan=plan)
    assert left
    assert (found.severity, set(found.evidence["without_rank"])) == (INFO, left)


@pytest.mark.rule_fails("GK213")
def test_gk213_a_sharded_model_does_not_show_it() -> None:
    assert seen("GK213", peft_config={"init_lora_weights": "eva"}).severity is WARNING


@pytest.mark.rule_passes("GK213")
@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "olora"])
def test_gk213_initializers_without_data(init: Any) -> None:
    assert seen("GK213", peft_config={"init_lora_weights": init}).severity is OK


@pytest.mark.rule_fails("GK213")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_gk213_a_moved_base_is_no_reference(twin_of: Twins, init: str) -> None:
    adapted = gk.attach(model := twin_of("llama"), plan_of(model, init))
    assert on_model(adapted, training=Training(trainer="dpo", keeps_reference=True)).severity is ERROR
    assert on_model(adapted, training=Training()).severity is OK


# ---- recipes ----


def recipe_of(folder: Path, init: str, trainer: str = "sft", **fields: Any) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(
        f"model: qwen3\ntrainer: {trainer}\nadapter:\n  r: 2\n  options: {{init_lora_weights: {init}}}\n"
    )
    return read_recipe(file, [f"{name}={value}" for name, value in fields.items()])


@pytest.mark.parametrize("init", NEED_DATA)
def test_doctor_says_that_training_computes_the_values(tmp_path: Path, init: str) -> None:
    found = finding(doctor(recipe=recipe_of(tmp_path, init)), "GK213")
    assert (found.severity, found.evidence["initializer"]) == (INFO, init)


@pytest.mark.rule_fails("GK213")
@pytest.mark.parametrize(
    ("init", "trainer", "fields"),
    [
        pytest.param("pissa", "dpo", {}, id="reference"),
        pytest.param("lora_ga", "dpo", {}, id="reference, from data"),
        pytest.param("corda", "grpo", {"args.beta": 0.1}, id="reference, if asked for"),
        pytest.param("corda", "grpo", {}, id="prompts alone"),
        pytest.param("eva", "sft", {"args.deepspeed": "zero3.json"}, id="DeepSpeed"),
        pytest.param("pissa_niter_4", "sft", {"args.fsdp": "full_shard"}, id="FSDP"),
        pytest.param("lora_ga", "sft", {"adapter.method": "dora"}, id="DoRA"),
        pytest.param("corda", "sft", {"args.push_to_hub": "true"}, id="uploads"),
    ],
)
def test_doctor_refuses_what_training_would(
    tmp_path: Path, init: str, trainer: str, fields: dict[str, Any]
) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    found = finding(doctor(gk.survey("qwen3"), recipe=recipe_of(tmp_path, init, trainer, **fields)), "GK213")
    assert (found.severity, found.evidence["error"], found.line) == (ERROR, "initializer", 5)


@pytest.mark.rule_passes("GK213")
@pytest.mark.parametrize(
    ("init", "trainer"), [("pissa", "sft"), ("pissa", "grpo"), ("gaussian", "dpo"), ("pissa_niter_4", "sft")]
)
def test_doctor_lets_the_others_pass(tmp_path: Path, init: str, trainer: str) -> None:
    assert finding(doctor(recipe=recipe_of(tmp_path, init, trainer)), "GK213").severity is OK


@pytest.mark.rule_passes("GK213")
@pytest.mark.parametrize("init", NEED_DATA)
@pytest.mark.parametrize("stock", [False, True], ids=["planned", "stock"])
def test_a_rehearsal_initializes_from_example_batches(tmp_path: Path, init: str, stock: bool) -> None:
    recipe = recipe_of(tmp_path, init)
    if stock:
        own = {"eva": "rho: 1.0", "corda": "corda_method: kpm", "lora_ga": "scale: unit"}[init]
        config = f"{{target_modules: [q_proj, v_proj], r: 2, init_lora_weights: {init}, {init}_config: {{{own}}}}}"
        recipe = recipe_of(tmp_path, init, adapter=f"{{peft_config: {config}}}")
    report = rehearse(recipe)
    assert finding(report, "GK213").severity is OK
    assert not report.errors


def test_a_rehearsal_on_a_twin_that_is_too_small_is_unknown(tmp_path: Path) -> None:
    report = rehearse(recipe_of(tmp_path, "eva", **{"adapter.r": 64}))
    assert finding(report, "GK213").severity is UNKNOWN
    assert not report.errors
