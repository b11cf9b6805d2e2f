"""mlx-lm's adapters: its names and layouts, one rank, and every update as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.unit.converting.served import Served, factors_of, largest_difference, served_twin

import graftkit as gk
from graftkit.converting.delta import Deltas
from graftkit.converting.dialects.mlx import DIALECT
from graftkit.converting.dialects.peft import DIALECT as PEFT
from graftkit.converting.errors import ConvertError
from graftkit.converting.join import joined
from graftkit.engines import Feature
from graftkit.errors import AdapterError

TWINS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "gemma3": {},
    "google/gemma-4-26B-A4B-it": {},
}
# For each: what mlx-lm calls the gate of the first layer's experts, and transformers the parameter with it.
EXPERTS = {
    "mixtral": ("model.layers.0.block_sparse_moe.switch_mlp.gate_proj", "model.layers.0.mlp"),
    "qwen3_moe": ("model.layers.0.mlp.switch_mlp.gate_proj", "model.layers.0.mlp"),
    "gpt_oss": ("model.layers.0.mlp.experts.gate_proj", "model.layers.0.mlp"),
    "google/gemma-4-26B-A4B-it": (
        "language_model.model.layers.0.experts.switch_glu.gate_proj",
        "model.language_model.layers.0",
    ),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def make(name: str) -> Served:
        if name not in made:
            made[name] = served_twin(name, tmp_path_factory.mktemp("base"), **TWINS[name])
        return made[name]

    return make


def written(deltas: Deltas, served: Served, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Write an mlx-lm adapter that nothing speaks against, and return its tensors and its configuration."""
    assert DIALECT.refusals(deltas, served.base) == {}
    folder.mkdir()
    DIALECT.write(deltas, served.base, folder)
    return load_file(folder / "adapters.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", TWINS)
def test_every_update_comes_back(base_of, name, tmp_path):
    served = base_of(name)
    targets = ["all-linear", "experts"] if name in EXPERTS else "all-linear"
    deltas = served.deltas(tmp_path / "peft", targets=targets, scope="language", r=3)
    written(deltas, served, tmp_path / "mlx")
    assert largest_difference(deltas, DIALECT.read(tmp_path / "mlx", served.base), served.base) == 0.0


def test_a_linear_is_stored_transposed(base_of, tmp_path):
    served = base_of("llama")
    deltas = served.deltas(tmp_path / "peft", targets=["q_proj", "down_proj"], r=4, alpha=6)
    tensors, config = written(deltas, served, tmp_path / "mlx")
    a, b = factors_of(deltas, "model.layers.1.mlp.down_proj.weight").read()
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.lora_a"], a.T)
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.lora_b"], b.T)
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["scale"] == 1.5
    leaves = ("self_attn.q_proj", "mlp.down_proj")
    assert set(config["lora_parameters"]["keys"]) == {
        f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in leaves
    }


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_stacked_as_mlx_lm_has_them(base_of, name, tmp_path):
    served = base_of(name)
    deltas = served.deltas(tmp_path / "peft", targets=["experts"], scope="language", r=3)
    tensors, _ = written(deltas, served, tmp_path / "mlx")
    module, holder = EXPERTS[name]
    for expert in range(4):
        a, b = factors_of(deltas, f"{holder}.experts.gate_up_proj", expert).read()
        gate = b[::2] if name == "gpt_oss" else b[: len(b) // 2]
        assert torch.equal(tensors[f"{module}.lora_a"][expert], a)
        assert torch.equal(tensors[f"{module}.lora_b"][expert], gate)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.dictionaries(st.sampled_from(["q_proj", "v_proj", "down_proj"]), st.integers(1, 6), max_size=3),
    alphas=st.dictionaries(st.sampled_from(["q_proj", "down_proj"]), st.sampled_from([0, 1, -3, 0.1]), max_size=2),
    rslora=st.booleans(),
    alpha=st.sampled_from([0, 1, 5, 0.3]),
)
def test_ranks_and_scales_of_any_kind_are_kept(base_of, tmp_path_factory, ranks, alphas, rslora, alpha):
    served = base_of("llama")
    folder = tmp_path_factory.mktemp("patterns")
    config = LoraConfig(
        r=3,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=["q_proj", "v_proj", "embed_tokens", "down_proj"],
    )
    deltas = served.deltas(folder / "peft", config)
    tensors, config = written(deltas, served, folder / "mlx")
    assert {t.shape[-1] for name, t in tensors.items() if name.endswith("lora_a")} == {
        config["lora_parameters"]["rank"]
    }
    back = DIALECT.read(folder / "mlx", served.base)
    assert largest_difference(deltas, back, served.base) <= DIALECT.rounding + 2**-48
    (folder / "back").mkdir()
    PEFT.write(joined(back, served.base), served.base, folder / "back")
    assert largest_difference(deltas, served.read(folder / "back"), served.base) <= 2 * DIALECT.rounding + 2**-48


def test_there_and_back_again(base_of, tmp_path):
    served = base_of("mixtral")
    adapter = served.adapter(tmp_path / "peft", targets=["experts", "attention", "router"], r=3)
    gk.convert(adapter, tmp_path / "mlx", to="mlx", base=served.folder)
    gk.convert(tmp_path / "mlx", tmp_path / "back", to="peft", base=served.folder)
    first, second = served.read(adapter), served.read(tmp_path / "back")
    assert largest_difference(first, second, served.base) <= DIALECT.rounding


def test_an_adapter_names_its_base_as_mlx_lm_does(base_of, tmp_path):
    served = base_of("llama")
    adapter = served.adapter(tmp_path / "peft", targets=["q_proj"], r=3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(served.folder)})
    )
    gk.convert(adapter, tmp_path / "mlx", to="mlx")
    done = gk.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    assert done.base == str(served.folder)


# ---- what is no adapter for this base ----


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(64, 2)}, "adapter-does-not-fit"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64)}, "adapter-does-not-fit"),
        ({f"model.layers.7.self_attn.q_proj.lora_{k}": torch.ones(2, 2) for k in "ab"}, "adapter-does-not-fit"),
        ({f"model.layers.0.self_attn.q_proj.lora_{k}": torch.ones(2, 2) for k in "ab"}, "adapter-does-not-fit"),
        ({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(64, 2, dtype=torch.int8)}, "adapter-weights"),
        ({}, "adapter-weights"),
    ],
    ids=["half a pair", "a whole weight", "no such layer", "another shape", "another dtype", "nothing"],
)
def test_what_does_not_fit_is_an_error(base_of, tmp_path, tensors, code):
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapters.safetensors")
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path, base_of("llama").base)
    assert error.value.code == code


@pytest.mark.parametrize("config", [{}, {"fine_tune_type": "lora"}, {"lora_parameters": {"scale": True}}, []])
def test_a_configuration_without_a_scale_is_an_error(base_of, tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x.lora_a": torch.ones(1, 1)}, tmp_path / "adapters.safetensors")
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path, base_of("llama").base)
    assert error.value.code == "adapter-config"


@pytest.mark.parametrize(
    ("kind", "feature"), [("dora", Feature.DORA), ("full", Feature.MODULES_TO_SAVE)], ids=["dora", "full"]
)
def test_what_is_no_lora_is_refused(base_of, tmp_path, kind, feature):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps({"fine_tune_type": kind}))
    save_file({"x.lora_a": torch.ones(1, 1)}, tmp_path / "mlx" / "adapters.safetensors")
    assert [other.feature for other in DIALECT.read(tmp_path / "mlx", base_of("llama").base).others] == [feature]
    with pytest.raises(ConvertError) as error:
        gk.convert(tmp_path / "mlx", tmp_path / "out", to="peft", base=base_of("llama").folder)
    assert error.value.code == "convert-unsupported"
    assert not (tmp_path / "out").exists()


def test_towers_are_refused(base_of, tmp_path):
    served = base_of("gemma3")
    deltas = served.deltas(tmp_path / "peft", targets="attention", scope=["language", "vision"])
    refused = DIALECT.refusals(deltas, served.base)
    assert refused
    assert all(".vision_tower." in name for name in refused)
