"""What cannot be merged is refused before anything is written, with a code and the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from tests.unit.merging.conftest import Bench

from graftkit.adapters.trained_bounds import METADATA_KEY
from graftkit.errors import GraftError
from graftkit.merging.merge import plan_merge

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def made(bench: Callable[..., Bench]) -> Bench:
    return bench("llama")


@pytest.fixture
def adapter(made: Bench) -> Path:
    return made.adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def refusal(made: Bench, adapter: Path, **options: Any) -> GraftError:
    with pytest.raises(GraftError) as caught:
        made.merge(adapter, **options)
    assert caught.value.help
    assert sorted(p.name for p in made.folder.iterdir()) == ["adapter", "base"]
    return caught.value


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "alora": ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "merge-depends-on-input"),
    "qalora": ({"use_qalora": True}, "merge-depends-on-input"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "merge-layer-replication"),
    "corda": ({"init_lora_weights": "corda"}, "merge-base-lost"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "merge-base-lost"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        "merge-base-lost",
    ),
    "a random decomposition": ({"init_lora_weights": "pissa_niter_4"}, "merge-base-lost"),
    "targets that match nothing": ({"target_modules": ["nowhere"]}, "merge-does-not-fit"),
    "another rank": ({"r": 8}, "merge-does-not-fit"),
    "an unknown method": ({"peft_type": "NEWEST"}, "merge-config"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_refused(name: str, made: Bench, adapter: Path) -> None:
    fields, code = CONFIGS[name]
    set_config(adapter, **fields)
    assert refusal(made, adapter).code == code


def _empty(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(0) for name in tensors}


def _nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(tensors.values()))[0, 0] = torch.nan
    return tensors


def _one_less(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def _one_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "base_model.model.elsewhere.lora_A.weight": torch.ones(2, 2)}


def _resized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "base_model.model.lm_head.weight": torch.ones(3, 64)}


TENSORS = {
    "saved from partitions": (_empty, "merge-empty-tensors"),
    "a NaN": (_nan, "merge-not-finite"),
    "a tensor is missing": (_one_less, "merge-does-not-fit"),
    "a tensor too many": (_one_more, "merge-does-not-fit"),
    "a resized vocabulary": (_resized, "merge-resized"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_refused(name: str, made: Bench, adapter: Path) -> None:
    change, code = TENSORS[name]
    set_tensors(adapter, change)
    assert refusal(made, adapter).code == code


Tensors = dict[str, torch.Tensor]


def _without_an_expert(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if ".experts.3.w1." not in name}


def _other_names(tensors: Tensors) -> Tensors:
    return {name.replace(".w1.", ".v1."): t for name, t in tensors.items()}


def _all_in_one(tensors: Tensors) -> Tensors:
    stem = "base_model.model.model.layers.0.mlp.experts.w1"
    rest = {name: t for name, t in tensors.items() if ".experts." not in name}
    return {**rest, f"{stem}.lora_A.weight": torch.ones(8, 64), f"{stem}.lora_B.weight": torch.ones(128, 8)}


@pytest.mark.parametrize("change", [_without_an_expert, _other_names, _all_in_one], ids=lambda f: f.__name__)
def test_experts_in_an_unknown_layout_are_refused(
    change: Callable[[Tensors], Tensors], bench: Callable[..., Bench]
) -> None:
    made = bench("mixtral")
    adapter = made.adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    set_config(adapter, target_modules=["q_proj", "w1", "w2", "w3"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, stored in made.stored(made.base).items():
        if ".experts." in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.ones(2, stored.shape[1])
            tensors[f"{stem}.lora_B.weight"] = torch.ones(stored.shape[0], 2)
    save_file(change(tensors), adapter / "adapter_model.safetensors", {"format": "pt"})
    assert refusal(made, adapter).code == "merge-does-not-fit"


@pytest.mark.parametrize(
    ("parameter", "lost", "code"),
    [
        # The others are stacked, to another shape than the class has.
        pytest.param("down_proj", "w2", "weights-incomplete", id="of a stack"),
        # What is left cannot be joined at all.
        pytest.param("gate_up_proj", "w1", "merge-layout", id="of two stacks that are joined"),
    ],
)
def test_a_base_whose_experts_are_not_all_there_is_refused(
    bench: Callable[..., Bench], parameter: str, lost: str, code: str
) -> None:
    made = bench("mixtral")
    adapter = made.adapter(
        LoraConfig(r=2, target_parameters=[f"mlp.experts.{parameter}"], init_lora_weights=False)
    )
    path = made.base / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if f".0.block_sparse_moe.experts.3.{lost}." not in n}
    assert len(kept) == len(load_file(path)) - 1
    save_file(kept, path, {"format": "pt"})
    assert refusal(made, adapter).code == code


def test_prompts_are_refused(made: Bench) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert refusal(made, made.adapter(config)).code == "merge-prompt"


def test_a_lora_bias_without_a_bias_is_refused(made: Bench) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    assert refusal(made, made.adapter(config)).code == "merge-no-bias"


def test_a_quantized_base_is_refused(made: Bench, adapter: Path) -> None:
    path = made.base / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "quantization_config": {"quant_method": "fp8"}}))
    error = refusal(made, adapter)
    assert error.code == "merge-quantized-base"
    assert "fp8" in str(error.why)


def test_a_weight_stored_in_8_bits_is_refused(made: Bench, adapter: Path) -> None:
    path = made.base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    assert refusal(made, adapter).code == "merge-dtype"


def test_a_weight_that_no_file_holds_is_refused(made: Bench, adapter: Path) -> None:
    path = made.base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert refusal(made, adapter).code == "weights-incomplete"


def test_a_new_head_that_no_file_holds_is_refused(made: Bench) -> None:
    """A head may be absent from a base, but then nothing can be merged into it."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(made.model.config)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapter = Bench(made.folder, model).adapter(config)
    path = made.base / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "architectures": ["LlamaForSequenceClassification"]}))
    assert refusal(made, adapter).code == "merge-missing-weight"


# ---- trained without the clamps of the base ----


@pytest.fixture
def clamped(bench: Callable[..., Bench]) -> Bench:
    return bench("google/gemma-4-E2B-it")


def stating(made: Bench, bounds: str | None) -> Path:
    """An adapter on inner linears of towers, whose file states how it was trained."""
    config = LoraConfig(r=2, target_modules=r".*_tower.*q_proj\.linear", init_lora_weights=False)
    adapter = made.adapter(config)
    path = adapter / "adapter_model.safetensors"
    stated = {} if bounds is None else {METADATA_KEY: bounds}
    save_file(load_file(path), path, {"format": "pt", **stated})
    return adapter


@pytest.mark.parametrize(
    ("bounds", "code"),
    [("removed", "merge-trained-without-bounds"), ("unknown", "merge-trained-bounds-unknown")],
)
def test_an_adapter_trained_without_the_clamps_is_refused(clamped: Bench, bounds: str, code: str) -> None:
    adapter = stating(clamped, bounds)
    error = refusal(clamped, adapter)
    assert error.code == code
    assert error.where == str(adapter)
    # Where the base's bounds are infinite nothing is clamped, and the merge is exact.
    path = clamped.base / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("put_min", "put_max")):
            tensor.fill_(torch.inf)
    save_file(tensors, path, {"format": "pt"})
    assert plan_merge(clamped.base, adapter).jobs


@pytest.mark.parametrize("bounds", ["kept", "nonsense", None])
def test_an_adapter_trained_with_the_clamps_is_merged(clamped: Bench, bounds: str | None) -> None:
    assert plan_merge(clamped.base, stating(clamped, bounds)).jobs


def test_an_adapter_beside_the_clamps_is_merged(clamped: Bench) -> None:
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    path = clamped.adapter(config) / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", METADATA_KEY: "removed"})
    assert plan_merge(clamped.base, path.parent).jobs


@pytest.mark.parametrize("place", ["base", "adapter", "base/inside", "."], ids=str)
def test_the_output_is_a_place_of_its_own(place: str, made: Bench, adapter: Path) -> None:
    with pytest.raises(GraftError) as caught:
        plan_merge(made.base, adapter, made.folder / place)
    assert caught.value.code == "merge-same-place"


def test_a_link_to_the_base_is_the_base(made: Bench, adapter: Path) -> None:
    (made.folder / "link").symlink_to(made.base, target_is_directory=True)
    with pytest.raises(GraftError) as caught:
        plan_merge(made.folder / "link", adapter, made.base)
    assert caught.value.code == "merge-same-place"


def test_no_adapter_is_no_merge(made: Bench) -> None:
    with pytest.raises(GraftError) as caught:
        plan_merge(made.base, {}, made.out)
    assert caught.value.code == "merge-no-adapter"


def test_a_base_that_is_not_there(made: Bench, adapter: Path) -> None:
    with pytest.raises(GraftError) as caught:
        plan_merge(made.folder / "nowhere", adapter)
    assert caught.value.code == "not-found"
    with pytest.raises(GraftError) as caught:
        plan_merge("nobody/nothing", adapter)
    assert caught.value.code == "weights-not-local"


def test_somebody_elses_folder_is_left_alone(made: Bench, adapter: Path) -> None:
    made.out.mkdir()
    (made.out / "thesis.txt").write_text("years of work")
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.code == "output-not-empty"
    assert [p.name for p in made.out.iterdir()] == ["thesis.txt"]
