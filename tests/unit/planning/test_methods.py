"""Methods as PEFT has them: the right class, the right names, and what cannot be said before it costs a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.errors import PlanError
from graftkit.planning import cost
from graftkit.planning.config.hyperparameters import field_values
from graftkit.planning.config.methods import method_named, method_names
from graftkit.planning.cost import count_by_group, trainable_params
from graftkit.planning.decisions import LeftAlone
from graftkit.planning.initializers import initializer_names
from graftkit.planning.trials.skeleton import Answer, Slot, ask, slots_of

E2B = "google/gemma-4-E2B-it"
MOE = "google/gemma-4-26B-A4B-it"
NEEDS: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}, "frod": {"progressbar": False}}
# BOFT looks for a compiler and says so; BEFT and lora_bias warn that nothing can be merged without a bias.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", method_names())
def test_every_method_is_planned_with_its_own_class_and_counted_exactly(
    twin_of: Callable[[str], nn.Module], method: str
) -> None:
    model = twin_of("llama")
    plan = gk.plan(model, targets=["attention", "mlp"], method=method, **small(method), **NEEDS.get(method, {}))
    assert type(plan.peft_config) is method_named(method).config_class
    adapted = get_peft_model(model, plan.peft_config)
    assert adapted_sites(adapted) == {a.path for a in plan.attached}
    assert trainable(adapted) == plan.trainable_params


def small(method: str) -> dict[str, int]:
    return {"r": 2} if method_named(method).defaults.get(method_named(method).rank_field or "") else {}


@pytest.mark.parametrize("method", ["lora", "vera", "ia3", "loha", "oft", "randlora", "vblora", "delora"])
def test_counting_by_group_gives_what_counting_the_whole_gives(
    twin_of: Callable[[str], nn.Module], method: str
) -> None:
    plan = gk.plan(twin_of(E2B), scope="all", targets=["attention", "mlp"], method=method, **small(method))
    slots = slots_of(plan.model, [a.site for a in plan.attached])
    assert count_by_group(plan.peft_config, slots) == plan.trainable_params


@pytest.mark.parametrize(
    ("layers", "names"),
    [pytest.param(200, 7, id="few groups of many"), pytest.param(16, 24, id="many groups of few")],
)
def test_counting_attaches_as_few_sites_as_it_can(
    layers: int, names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = [
        Slot(f"layers.{at}.p{name}", "linear", (8, 8 + name)) for at in range(layers) for name in range(names)
    ]
    config = LoraConfig(r=2, target_modules=[f"p{name}" for name in range(names)])
    attached = []

    def counted(config: Any, slots: Sequence[Slot]) -> Answer:
        attached.append(len(slots))
        return ask(config, slots)

    monkeypatch.setattr(cost, "ask", counted)
    assert trainable_params(config, slots) == layers * sum(2 * (8 + 8 + name) for name in range(names))
    assert sum(attached) == min(len(slots), cost.attached_by_group(slots))


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        pytest.param("lora", {}, {"r": 16, "lora_alpha": 16}, id="lora scales by 1"),
        pytest.param(
            "lora", {"r": 4, "alpha": 8, "dropout": 0.1}, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, id="lora"
        ),
        pytest.param("dora", {"r": 4}, {"r": 4, "lora_alpha": 4, "use_dora": True}, id="dora"),
        pytest.param("rslora", {}, {"r": 16, "use_rslora": True}, id="rslora"),
        pytest.param("loha", {"r": 4}, {"r": 4, "alpha": 4}, id="loha's alpha"),
        pytest.param("gralora", {"r": 16}, {"r": 16, "alpha": 32}, id="gralora keeps its ratio of 2"),
        pytest.param("psoft", {"r": 4, "alpha": 8}, {"r": 4, "psoft_alpha": 8}, id="psoft's own names"),
        pytest.param(
            "adalora", {"r": 4, "total_step": 9}, {"target_r": 4, "init_r": 6, "r": 8}, id="adalora's two ranks"
        ),
        pytest.param("oft", {"r": 4}, {"r": 4, "oft_block_size": 0}, id="oft by rank"),
        pytest.param("oft", {}, {"r": 0, "oft_block_size": 32}, id="oft by block"),
        pytest.param("vera", {}, {"r": 256}, id="vera keeps its default"),
        pytest.param("c3a", {}, {"block_size": 64}, id="c3a's block divides every width"),
        pytest.param("vblora", {"r": 2}, {"vector_length": 64}, id="vblora's vectors divide every width"),
        pytest.param("boft", {"boft_block_size": 2}, {"boft_block_size": 2}, id="boft as asked"),
    ],
)
def test_numbers_go_under_the_method_s_own_names(
    twin_of: Callable[[str], nn.Module], method: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = gk.plan(twin_of("llama"), targets=["attention"], method=method, **given).peft_config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(("given", "kind"), [(8.0, int), (8, int), (8.5, float)])
def test_a_whole_alpha_is_an_integer_as_peft_declares_it(given: float, kind: type) -> None:
    assert type(field_values(method_named("loha"), 4, given, None)["alpha"]) is kind


def test_ia3_scales_the_input_where_an_mlp_comes_back(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, method="ia3", scope=["language", "vision"])
    adapted = get_peft_model(e2b, plan.peft_config)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if hasattr(m, "is_feedforward")}
    assert {n for n, m in layers.items() if m.is_feedforward} == {
        a.path for a in plan.attached if a.site.role == "mlp.down"
    }


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        pytest.param({"method": "ia3", "r": 4}, "rank-unknown", "ia3", id="rank of ia3"),
        pytest.param({"method": "fourierft", "r": 4}, "rank-unknown", "n_frequency=1000", id="rank of fourierft"),
        pytest.param({"method": "vera", "alpha": 4}, "alpha-unknown", "vera", id="alpha of vera"),
        pytest.param({"method": "oft", "dropout": 0.1}, "dropout-unknown", "module_dropout", id="dropout of oft"),
        pytest.param({"method": "prefix_tuning"}, "method-not-for-layers", "lora", id="prompts"),
        pytest.param({"method": "trainable_tokens"}, "method-not-for-layers", "lora", id="tokens"),
        pytest.param({"method": "lokrr"}, "method-unknown", "lokr", id="misspelt"),
        pytest.param({"method": "adalora"}, "option-invalid", "total_step", id="adalora without steps"),
        pytest.param(
            {"method": "adalora", "total_step": 9, "rank_pattern": {"q_proj": 2}},
            "option-decided",
            "rank_pattern",
            id="adalora's own pattern",
        ),
        pytest.param({"method": "c3a", "block_size": 24}, "size-not-dividing", "block_size=", id="c3a block"),
        pytest.param(
            {"method": "oft", "oft_block_size": 24}, "size-not-dividing", "oft_block_size=", id="oft block"
        ),
        pytest.param({"method": "shira", "r": 60}, "method-refused", "rank 60", id="shira's rank"),
        pytest.param(
            {"method": "loha", "targets": ["embeddings"]}, "method-kind", "Embedding", id="loha embeddings"
        ),
        pytest.param({"method": "ia3", "feedforward_modules": []}, "option-decided", "targets", id="ia3 modules"),
        pytest.param(
            {"layer_replication": [(0, 2)]}, "option-decided", "layer_replication", id="layer replication"
        ),
        pytest.param({"init_lora_weights": "pisa"}, "initializer-unknown", "pissa", id="misspelt initializer"),
        pytest.param(
            {"init_lora_weights": "pissa_niter_x"}, "initializer-unknown", "pissa", id="pissa iterations"
        ),
        pytest.param({"init_lora_weights": "orthogonal", "r": 3}, "method-refused", "even", id="an odd rank"),
        pytest.param(
            {"targets": ["embeddings"], "init_lora_weights": "eva"},
            "initializer-kind",
            "linear",
            id="eva embeddings",
        ),
        pytest.param(
            {"modules_to_save": ["lm_haed"]}, "modules-to-save-unmatched", "lm_head", id="misspelt module to save"
        ),
        pytest.param(
            {"trainable_token_indices": {"embed_tokns": [1]}},
            "token-indices-unmatched",
            "embed_tokens",
            id="misspelt embedding",
        ),
        pytest.param(
            {"targets": ["attention", "lm_head"], "modules_to_save": ["lm_head"]},
            "modules-to-save-targeted",
            "lm_head",
            id="a target that is trained whole",
        ),
        pytest.param(
            {"modules_to_save": ["self_attn"]}, "modules-to-save-targeted", "self_attn", id="a target inside one"
        ),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_reason(
    twin_of: Callable[[str], nn.Module], request_: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(twin_of("qwen3"), **{"targets": ["attention"], **request_})
    assert caught.value.code == code
    assert said in str(caught.value)
    assert caught.value.help


@pytest.mark.parametrize("initializer", [n for n in initializer_names() if "[" not in n and n != "gaussian"])
def test_experts_take_no_initializer_that_reads_a_weight(
    twin_of: Callable[[str], nn.Module], initializer: str
) -> None:
    with pytest.raises(PlanError) as caught:
        gk.plan(twin_of(MOE), targets=["experts"], init_lora_weights=initializer)
    assert caught.value.code == "expert-option"


def test_experts_are_bare_parameters_which_only_lora_takes(twin_of: Callable[[str], nn.Module]) -> None:
    plan = gk.plan(twin_of(MOE), targets=["experts"], method="ia3")
    assert {a.via for a in plan.attached} == {"target_modules"}
    assert {s.cause for s in plan.skipped if s.site.role == "expert"} == {LeftAlone.NOT_BY_METHOD}


def test_a_method_skips_the_kinds_it_does_not_take(e2b: nn.Module) -> None:
    plan = gk.plan(e2b, scope=["audio"], targets=["attention", "conv"], method="lokr")
    assert {a.site.kind for a in plan.attached} == {"linear", "conv"}


@pytest.mark.parametrize(
    "initializer", [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica"]
)
def test_initializers_that_need_no_data_attach_on_wrapped_linears(e2b: nn.Module, initializer: Any) -> None:
    plan = gk.plan(e2b, r=2, scope=["vision"], targets=["attention"], init_lora_weights=initializer)
    adapted = gk.attach(e2b, plan)
    assert trainable(adapted) == plan.trainable_params


@pytest.mark.parametrize(
    ("initializer", "option"),
    [("eva", "eva_config"), ("corda", "corda_config"), ("lora_ga", "lora_ga_config"), ("loftq", "loftq_config")],
)
def test_an_initializer_gets_the_configuration_it_needs(e2b: nn.Module, initializer: str, option: str) -> None:
    plan = gk.plan(e2b, targets=["attention"], init_lora_weights=initializer)
    assert getattr(plan.peft_config, option)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"modules_to_save": ["lm_head"]}, id="a head"),
        pytest.param({"modules_to_save": ["norm"]}, id="norms"),
        pytest.param({"trainable_token_indices": [1, 5]}, id="tokens"),
        pytest.param({"trainable_token_indices": {"embed_tokens": [1, 5, 7]}}, id="tokens by name"),
        pytest.param(
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, id="other tokens of each"
        ),
        pytest.param({"trainable_token_indices": {"lm_head": [1, 5]}}, id="tokens of the head"),
        pytest.param({"bias": "all"}, id="every bias"),
        pytest.param({"bias": "lora_only"}, id="the biases of adapted layers"),
        pytest.param({"lora_bias": True}, id="a bias on B"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_what_is_trained_besides_is_counted(
    twin_of: Callable[[str], nn.Module], name: str, options: dict[str, Any]
) -> None:
    model = twin_of(name)
    if name == "bert":
        own = {"lm_head": "decoder", "norm": "LayerNorm", "embed_tokens": "word_embeddings"}
        options = {
            option: [own[v] for v in value]
            if option == "modules_to_save"
            else {own[k]: v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for option, value in options.items()
        }
    plan = gk.plan(model, r=2, targets=["attention"], **options)
    adapted = get_peft_model(model, plan.peft_config)
    assert isinstance(adapted, PeftModel)
    assert trainable(adapted) == plan.trainable_params


@pytest.mark.parametrize(("name", "rows"), [("gemma2", 2), ("llama", 4)])
def test_the_same_tokens_of_a_shared_weight_are_trained_once(
    twin_of: Callable[[str], nn.Module], name: str, rows: int
) -> None:
    model: Any = twin_of(name)
    both = {"embed_tokens": [1, 5], "lm_head": [1, 5]}
    plan = gk.plan(model, r=2, targets=["attention"], trainable_token_indices=both)
    alone = gk.plan(model, r=2, targets=["attention"]).trainable_params
    assert plan.trainable_params - alone == rows * model.config.hidden_size
    assert trainable(gk.attach(model, plan)) == plan.trainable_params


def test_alpha_keeps_pefts_ratio_to_the_rank() -> None:
    assert field_values(method_named("randlora"), 16, None, None) == {"r": 16, "randlora_alpha": 320}
    assert field_values(method_named("randlora"), None, None, None) == {}


def test_planning_leaves_the_random_state_alone(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    before = torch.random.get_rng_state()
    gk.plan(model, targets=["attention"], init_lora_weights="pissa")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("initializer", "said"),
    [
        ("pissa", "float32, float16, or bfloat16"),
        ("corda", "corda"),
        ("lora_ga", "lora_ga"),
        ("olora", ""),
    ],
)
def test_a_quantized_base_takes_no_initializer_that_rewrites_it(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, initializer: str, said: str
) -> None:
    from transformers import BitsAndBytesConfig

    model: Any = twin_of("llama")
    model.save_pretrained(tmp_path)
    quantized = type(model).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    if not said:
        assert gk.plan(quantized, targets=["attention"], init_lora_weights=initializer).attached
        return
    with pytest.raises(PlanError, match=said) as caught:
        gk.plan(quantized, targets=["attention"], init_lora_weights=initializer)
    assert caught.value.code == "initializer-quantized"
