"""Every form of LoRA that PEFT saves, merged in files, against PEFT's own merge in double precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig
from safetensors.torch import load_file, save_file

from graftkit.errors import MergeError

if TYPE_CHECKING:
    from tests.unit.merging.conftest import Bench

TYPES = [torch.bfloat16, torch.float16, torch.float32]
ATTENTION = ["q_proj", "v_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "init_lora_weights": False, **options})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3}),
    "rank and alpha patterns": (
        "llama",
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.*v_proj": 32}},
    ),
    "a regular expression": ("llama", {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}),
    "dora": ("llama", {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "dora on weights stored as (in, out)": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "weights stored as (in, out)": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head": ("llama", {"target_modules": ["lm_head"]}),
    "a convolution": ("vit", {"target_modules": ["projection"]}),
    "dora on a convolution": ("vit", {"target_modules": ["projection"], "use_dora": True}),
    "a convolution over time": ("whisper", {"target_modules": ["conv1", "conv2"]}),
    "a trained bias": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "the base's biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "the targets' biases": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "a module saved whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "biases, and a module saved whole that has some": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["transform"]},
    ),
    "trained tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [3, 1, 7]}),
    "trained tokens by name": (
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [2]}},
    ),
    "experts stored one by one": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one parameter of the experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
    "experts stored as (in, out)": ("gpt_oss", {"target_parameters": ["mlp.experts.down_proj"]}),
    "a router": ("mixtral", {"target_parameters": ["mlp.gate.weight"]}),
}


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_a_form_of_lora_merges_exactly(name: str, dtype: torch.dtype, bench: Callable[..., Bench]) -> None:
    model, options = CASES[name]
    made = bench(model, dtype=dtype)
    adapter = made.adapter(lora(**options), spread=0.02)
    made.merge(adapter)
    made.assert_same_files()
    expected = made.exact(adapter)
    # The share is about half of what double rounding through 32 bits would leave in 16-bit floats.
    made.assert_exact(expected)
    made.assert_verifies(adapter)


def test_embeddings_saved_whole_that_are_in_the_file_twice(bench: Callable[..., Bench]) -> None:
    """PEFT writes them under their names in memory too where the vocabulary was resized, or if told to."""
    made = bench("llama")
    config = lora(target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"])
    adapter = made.adapter(config, spread=0.02, save_embedding_layers=True)
    assert {n for n in load_file(adapter / "adapter_model.safetensors") if ".original_module." in n}
    made.merge(adapter)
    made.assert_exact(made.exact(adapter), share=1e-3)
    made.assert_verifies(adapter)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"], ids=["as (out, in)", "as (in, out)"])
def test_square_experts_keep_their_orientation(name: str, bench: Callable[..., Bench]) -> None:
    """Only the class shows which axis is which: a guess from the shape merges the transposed update."""
    made = bench(name, overrides={"hidden_size": 64, "intermediate_size": 64})
    down = made.model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert down.shape[1] == down.shape[2]
    adapter = made.adapter(lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    made.merge(adapter)
    made.assert_exact(made.exact(adapter))


def test_tokens_alone(bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    adapter = made.adapter(
        TrainableTokensConfig(token_indices=[4, 2], target_modules=["embed_tokens"]), spread=0.1
    )
    made.merge(adapter)
    changed = made.assert_exact(made.exact(adapter))
    assert changed == {"model.embed_tokens.weight"}
    before, after = (made.stored(f)["model.embed_tokens.weight"] for f in (made.base, made.out))
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [2, 4]


def test_a_target_that_is_trained_whole_instead(bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    adapter = made.adapter(lora(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]), spread=0.05)
    made.merge(adapter)
    assert made.assert_exact(made.exact(adapter)) >= {"lm_head.weight"}


def test_a_swallowed_update_is_counted(bench: Callable[..., Bench]) -> None:
    """bfloat16 has 8 bits: most of an update of a ten-thousandth is below them."""
    made = bench("llama")
    adapter = made.adapter(lora(target_modules=ATTENTION, lora_alpha=1))
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * 1e-2 for n, t in load_file(file).items()}, file, {"format": "pt"})
    evidence = made.merge(adapter).evidence
    assert evidence.swallowed > 0.9 * evidence.moved > 0


# ---- several adapters ----


def test_adapters_add_up_by_weight(bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    one = made.adapter(lora(target_modules=ATTENTION), "one")
    two = made.adapter(lora(target_modules=["q_proj", "down_proj"], r=2, use_rslora=True), "two")
    made.merge(one, two, weights=[0.7, -0.3])
    before, first = made.stored(made.base), made.exact(one)
    second = made.exact(two)
    expected = {
        name: before[name].double()
        + 0.7 * (first[name] - before[name].double())
        - 0.3 * (second[name] - before[name].double())
        for name in before
    }
    changed = made.assert_exact(expected)
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_a_weight_scales_any_update(options: dict[str, Any], bench: Callable[..., Bench]) -> None:
    made = bench("llama", dtype=torch.float32)
    adapter = made.adapter(lora(target_modules=ATTENTION, **options), spread=0.02)
    made.merge(adapter, weights=[0.25])
    before, full = made.stored(made.base), made.exact(adapter)
    made.assert_exact({n: 0.75 * before[n].double() + 0.25 * full[n].double() for n in before}, share=1e-3)


# ---- layouts ----


@pytest.mark.parametrize(
    ("name", "targets", "options", "on_disk", "blocks"),
    [
        pytest.param("gte", ["q_proj", "v_proj"], {}, {"qkv_proj"}, True, id="one for three"),
        pytest.param("gte", ["q_proj"], {"bias": "lora_only"}, {"qkv_proj"}, True, id="and their biases"),
        pytest.param("gte", ["q_proj"], {"use_dora": True}, {"qkv_proj"}, False, id="a length of each row of one"),
        pytest.param("kimi_k25", ["attn.q_proj"], {}, {"wqkv"}, False, id="rows in another order"),
        pytest.param(
            "kimi_linear",
            ["o_proj"],
            {"modules_to_save": ["conv1d"]},
            {"q_conv1d", "k_conv1d", "v_conv1d", "o_proj"},
            True,
            id="three for one",
        ),
    ],
)
def test_fused_tensors_on_disk(
    name: str,
    targets: list[str],
    options: dict[str, Any],
    on_disk: set[str],
    blocks: bool,
    bench: Callable[..., Bench],
) -> None:
    """The disk fuses what the model splits (gte), or the other way round, or in another order."""
    made = bench(name)
    adapter = made.adapter(lora(target_modules=targets, **options), spread=0.02)
    report = made.merge(adapter)
    changed = made.assert_exact(made.exact(adapter))
    assert {name.split(".")[-2] for name in changed} == on_disk
    by_blocks = [part.blocks is not None for job in report.plan.jobs.values() for part in job.parts]
    assert all(by_blocks) == blocks


def test_adapters_of_single_experts_are_stacked_as_peft_does(bench: Callable[..., Bench]) -> None:
    """Adapters that were trained before experts were stacked: w1, w2 and w3 of each."""
    made = bench("mixtral")
    new = made.adapter(lora(target_modules=["q_proj"]), "new")
    old = made.folder / "old"
    old.mkdir()
    config = json.loads((new / "adapter_config.json").read_text())
    config.update(target_modules=["q_proj", "w1", "w2", "w3"], target_parameters=None)
    (old / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(new / "adapter_model.safetensors")
    shapes = {n: tuple(t.shape) for n, t in made.stored(made.base).items() if ".experts." in n}
    for name, (high, wide) in shapes.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, wide) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(high, 4) * 0.1
    save_file(tensors, old / "adapter_model.safetensors", {"format": "pt"})
    made.merge(old)
    changed = made.assert_exact(made.exact(old))
    assert set(shapes) <= changed


def test_a_base_without_its_prefix(bench: Callable[..., Bench]) -> None:
    """Named as by the inner model: transformers adds the prefix on loading, and the files keep their names."""
    made = bench("bert")
    path = made.base / "model.safetensors"
    save_file({key.removeprefix("bert."): t for key, t in load_file(path).items()}, path, {"format": "pt"})
    assert not any(name.startswith("bert.") for name in made.stored(made.base))
    adapter = made.adapter(lora(target_modules=["query"]))
    made.merge(adapter)
    made.assert_same_files()
    with made.quiet():
        merged: Any = PeftModel.from_pretrained(made.loaded(), str(adapter)).merge_and_unload()
    wanted = {n.removeprefix("bert."): t for n, t in merged.state_dict().items() if n.startswith("bert.")}
    assert len(made.assert_exact(wanted)) == 2


def test_conv_with_groups_is_refused(bench: Callable[..., Bench]) -> None:
    made = bench("qwen3_next")
    channels = next(m.groups for m in made.model.modules() if isinstance(m, torch.nn.Conv1d))
    adapter = made.adapter(lora(target_modules=["conv1d"], r=channels))
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-grouped-convolution"
    assert not made.out.exists()
