"""Adapters as other tools, and older versions, lay them out: each update arrives, or the adapter is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.unit.converting.served import Served, largest_difference, served_twin

import graftkit as gk
from graftkit.converting.delta import Deltas
from graftkit.converting.dialects.peft import DIALECT
from graftkit.errors import AdapterError, MergeError

Tensors = dict[str, torch.Tensor]
Layout = Callable[[Deltas], Tensors]
PREFIX = "base_model.model."
RANK, ALPHA = 3, 5


@pytest.fixture(scope="module")
def base_of(tmp_path_factory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def make(name: str) -> Served:
        if name not in made:
            made[name] = served_twin(name, tmp_path_factory.mktemp("base"))
        return made[name]

    return make


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Save an adapter as it came from some tool."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def original(served: Served, folder: Path, targets: list[str]) -> Deltas:
    return served.deltas(folder, targets=targets, scope="language", r=RANK, alpha=ALPHA)


def linears(deltas: Deltas) -> Tensors:
    """Return the factors of what is no expert, under stock names."""
    found = {}
    for factors in deltas:
        if factors.at.expert is None:
            module = PREFIX + factors.at.parameter.removesuffix(".weight")
            found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = factors.read()
    return found


def experts(deltas: Deltas) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return, for each stacked parameter, A (experts, r, in) and B (experts, out, r)."""
    found = defaultdict(list)
    for factors in deltas:
        if factors.at.expert is not None:
            found[factors.at.parameter].append(factors.read())
    return {name: (torch.stack([a for a, _ in p]), torch.stack([b for _, b in p])) for name, p in found.items()}


def projections(deltas: Deltas) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Return the factors of gate, up and down by (path of the experts, projection)."""
    found = {}
    for name, (a, b) in experts(deltas).items():
        holder, _, leaf = name.rpartition(".")
        if leaf == "down_proj":
            found[holder, "down_proj"] = a, b
        else:
            gate, up = b.chunk(2, dim=1)
            found[holder, "gate_proj"], found[holder, "up_proj"] = (a, gate), (a, up)
    return found


def one_by_one(names: Mapping[str, str], holder: str) -> Layout:
    """Each expert's projection has a pair, as transformers 4 named them."""

    def lay_out(deltas: Deltas) -> Tensors:
        found = linears(deltas)
        for (path, leaf), (a, b) in projections(deltas).items():
            for expert in range(len(a)):
                at = f"{PREFIX}{path.replace('mlp.experts', holder)}.{expert}.{names[leaf]}"
                found[f"{at}.lora_A.weight"], found[f"{at}.lora_B.weight"] = a[expert], b[expert]
        return found

    return lay_out


def stacked(deltas: Deltas) -> Tensors:
    """Tinker: the experts of a projection in one tensor."""
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    found = linears(deltas)
    for (path, leaf), (a, b) in projections(deltas).items():
        at = f"{PREFIX}{path}.{names[leaf]}"
        found[f"{at}.lora_A.weight"], found[f"{at}.lora_B.weight"] = a, b
    return found


def inputs_first(deltas: Deltas) -> Tensors:
    """NeMo AutoModel: (experts, in, r) and (experts, r, out)."""
    found = linears(deltas)
    for name, (a, b) in experts(deltas).items():
        holder, _, leaf = name.rpartition(".")
        kind = "down" if leaf == "down_proj" else "gate_and_up"
        found[f"{PREFIX}{holder}.lora_{kind}_A"] = a.transpose(1, 2)
        found[f"{PREFIX}{holder}.lora_{kind}_B"] = b.transpose(1, 2)
    return found


def exchanged(deltas: Deltas) -> Tensors:
    """PEFT before it exchanged inputs and outputs: A (experts * r, out), B (in, r * experts)."""
    found = linears(deltas)
    for name, (a, b) in experts(deltas).items():
        holder, _, leaf = name.rpartition(".")
        inner = "" if leaf == "down_proj" else ".base_layer"
        found[f"{PREFIX}{holder}{inner}.lora_A.weight"] = b.transpose(1, 2).flatten(0, 1)
        found[f"{PREFIX}{holder}{inner}.lora_B.weight"] = a.permute(2, 1, 0).flatten(1)
    return found


QWEN = {leaf: leaf for leaf in ("gate_proj", "up_proj", "down_proj")}
LAYOUTS: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "transformers 4, mixtral": (
        "mixtral",
        one_by_one({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}, "block_sparse_moe.experts"),
        {"target_modules": ["q_proj", "v_proj", "w1", "w2", "w3"]},
    ),
    "mixtral under qwen's names": ("mixtral", one_by_one(QWEN, "mlp.experts"), {}),
    "transformers 4, qwen3_moe": (
        "qwen3_moe",
        one_by_one(QWEN, "mlp.experts"),
        {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "tinker": ("qwen3_moe", stacked, {}),
    "tinker, mixtral": ("mixtral", stacked, {}),
    "automodel": ("qwen3_moe", inputs_first, {}),
    "automodel, 26B": ("google/gemma-4-26B-A4B-it", inputs_first, {}),
    "inputs and outputs exchanged": (
        "qwen3_moe",
        exchanged,
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_update_of_a_layout_arrives(base_of, tmp_path, layout):
    name, lay_out, config = LAYOUTS[layout]
    served = base_of(name)
    deltas = original(served, tmp_path / "stock", ["experts", "q_proj", "v_proj"])
    save(tmp_path / "foreign", lay_out(deltas), **config)
    found = DIALECT.read(tmp_path / "foreign", served.base)
    assert largest_difference(deltas, found, served.base) <= 2**-48


def test_a_layout_becomes_stock_peft(base_of, tmp_path):
    served = base_of("qwen3_moe")
    deltas = original(served, tmp_path / "stock", ["experts", "q_proj"])
    save(tmp_path / "foreign", inputs_first(deltas))
    gk.convert(tmp_path / "foreign", tmp_path / "back", to="peft", base=served.folder)
    assert largest_difference(deltas, served.read(tmp_path / "back"), served.base) <= DIALECT.rounding


def test_a_factor_that_experts_share_is_used_for_each(base_of, tmp_path):
    served = base_of("qwen3_moe")
    experts_in_layer, (outs, ins) = 4, served.base.matrix("model.layers.0.mlp.experts.down_proj")
    a, b = torch.randn(1, RANK, ins), torch.randn(experts_in_layer, outs, RANK)
    at = f"{PREFIX}model.layers.0.mlp.experts.w2"
    save(tmp_path / "shared", {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b})
    found = {f.at.expert: f.read() for f in DIALECT.read(tmp_path / "shared", served.base)}
    assert set(found) == set(range(experts_in_layer))
    for expert, (own_a, own_b) in found.items():
        assert torch.equal(own_a, a[0])
        assert torch.equal(own_b, b[expert])


@pytest.mark.parametrize(
    ("trained", "on", "rename"),
    [
        ("gemma3_text", "gemma3", {}),
        ("gemma3", "gemma3_text", {}),
        ("gemma3", "gemma3", {"model.language_model.": "language_model.model."}),
    ],
    ids=["text class to multimodal", "multimodal class to text", "before the refactor"],
)
def test_the_language_model_is_found_in_another_class(base_of, tmp_path, trained, on, rename):
    source, target = base_of(trained), base_of(on)
    deltas = original(source, tmp_path / "stock", ["q_proj", "down_proj"])
    tensors = linears(deltas)
    for before, after in rename.items():
        tensors = {name.replace(before, after): tensor for name, tensor in tensors.items()}
    save(tmp_path / "foreign", tensors, target_modules=r".*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)")
    found = DIALECT.read(tmp_path / "foreign", target.base)
    by_number = {f.at.parameter.rpartition("layers.")[2]: f.exact() for f in found}
    assert len(by_number) == len(deltas.factors)
    for factors in deltas:
        a, b = by_number[factors.at.parameter.rpartition("layers.")[2]]
        assert torch.equal(b @ a, factors.exact()[1] @ factors.exact()[0])
    assert all("vision" not in f.at.parameter for f in found)


def by_expert(deltas: Deltas) -> Tensors:
    """Return unsloth's older form: PEFT's names and shapes, and the columns of B with the experts slowest."""
    found = linears(deltas)
    for name, (a, b) in experts(deltas).items():
        holder, _, leaf = name.rpartition(".")
        inner = "" if leaf == "down_proj" else ".base_layer"
        found[f"{PREFIX}{holder}{inner}.lora_A.weight"] = a.flatten(0, 1)
        found[f"{PREFIX}{holder}{inner}.lora_B.weight"] = b.transpose(0, 1).flatten(1)
    return found


STACKED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
BY_UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}


@pytest.mark.parametrize("targets", [["q_proj"], ["model.layers.0.self_attn.q_proj"]], ids=["loads", "by names"])
def test_columns_by_expert_are_put_in_pefts_order(base_of, tmp_path, targets):
    served = base_of("qwen3_moe")
    deltas = original(served, tmp_path / "stock", ["experts", "q_proj"])
    config = {**STACKED, **BY_UNSLOTH, "lora_B_layout": "grouped_by_expert", "target_modules": targets}
    save(tmp_path / "unsloth", by_expert(deltas), **config)
    assert largest_difference(deltas, DIALECT.read(tmp_path / "unsloth", served.base), served.base) <= 2**-48


def test_columns_by_rank_stay(base_of, tmp_path):
    served = base_of("qwen3_moe")
    stock = served.adapter(tmp_path / "stock", targets=["experts", "q_proj"], r=RANK, alpha=ALPHA)
    deltas = served.read(stock)
    config = json.loads((stock / "adapter_config.json").read_text())
    (stock / "adapter_config.json").write_text(json.dumps({**config, **BY_UNSLOTH, "lora_B_layout": "rank_major"}))
    assert largest_difference(deltas, served.read(stock), served.base) == 0.0


@pytest.mark.parametrize("fields", [BY_UNSLOTH, {"lora_B_layout": "other"}], ids=["not stated", "not known"])
def test_columns_in_an_unknown_order_are_refused(base_of, tmp_path, fields):
    served = base_of("qwen3_moe")
    deltas = original(served, tmp_path / "stock", ["experts", "q_proj"])
    save(tmp_path / "unsloth", by_expert(deltas), **STACKED, **fields)
    with pytest.raises((AdapterError, MergeError)) as error:
        DIALECT.read(tmp_path / "unsloth", served.base)
    assert "lora_B_layout" in str(error.value.help)


def test_unsloth_says_nothing_of_what_is_no_expert(base_of, tmp_path):
    served = base_of("qwen3_moe")
    deltas = original(served, tmp_path / "stock", ["q_proj"])
    save(tmp_path / "unsloth", linears(deltas), **BY_UNSLOTH)
    assert largest_difference(deltas, DIALECT.read(tmp_path / "unsloth", served.base), served.base) == 0.0


def test_a_square_matrix_alone_does_not_say_how_it_is_laid_out(base_of, tmp_path):
    served = base_of("qwen3_moe")
    outs, ins = served.base.matrix("model.layers.0.mlp.experts.gate_up_proj")
    assert outs == ins
    deltas = original(served, tmp_path / "stock", ["experts"])
    gates = {name: tensor for name, tensor in exchanged(deltas).items() if ".base_layer." in name}
    save(tmp_path / "foreign", gates, target_parameters=["mlp.experts.gate_up_proj"], r=RANK)
    # Without the outer pair PEFT finds no place for the inner one's names.
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path / "foreign", served.base)
    assert error.value.code == "adapter-does-not-fit"


# ---- what is no layout of this base ----


def small(names: list[str], *shape: int) -> Tensors:
    return {PREFIX + name: torch.ones(*shape) for name in names}


@pytest.mark.parametrize(
    "tensors",
    [
        small([f"model.layers.9.self_attn.q_proj.lora_{k}.weight" for k in "AB"], RANK, RANK),
        small(["model.layers.0.self_attn.q_proj.lora_A.weight"], RANK, 64),
        small([f"model.layers.0.mlp.experts.w1.lora_{k}.weight" for k in "AB"], 7, RANK, RANK),
        small([f"model.layers.0.mlp.experts.lora_down_{k}" for k in "AB"], 7, RANK, RANK),
        small([f"model.layers.0.mlp.experts.9.gate_proj.lora_{k}.weight" for k in "AB"], RANK, RANK),
        small([f"model.layers.0.mlp.experts.lora_{k}.weight" for k in "AB"], 5, 5),
        small([f"model.layers.0.mlp.lora_{k}.weight" for k in "AB"], 2, 2, 2, 2),
    ],
    ids=["no layer", "half a pair", "other experts", "other experts, inputs first", "no expert", "shape", "axes"],
)
def test_what_fits_nothing_is_an_error(base_of, tmp_path, tensors):
    save(tmp_path / "foreign", tensors)
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path / "foreign", base_of("qwen3_moe").base)
    assert error.value.code == "adapter-does-not-fit"


def test_another_rank_than_the_configuration_says_is_an_error(base_of, tmp_path):
    served = base_of("qwen3_moe")
    deltas = original(served, tmp_path / "stock", ["experts"])
    save(tmp_path / "foreign", stacked(deltas), r=RANK + 1)
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path / "foreign", served.base)
    assert error.value.code == "adapter-does-not-fit"


def test_interleaved_experts_have_no_place_in_automodels_layout(base_of, tmp_path):
    served = base_of("gpt_oss")
    deltas = original(served, tmp_path / "stock", ["experts"])
    save(tmp_path / "foreign", inputs_first(deltas))
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path / "foreign", served.base)
    assert error.value.code == "adapter-does-not-fit"


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_is_no_plain_lora_is_not_guessed(base_of, tmp_path, fields):
    served = base_of("qwen3_moe")
    deltas = original(served, tmp_path / "stock", ["experts"])
    save(tmp_path / "foreign", stacked(deltas), **fields)
    with pytest.raises(MergeError) as error:
        DIALECT.read(tmp_path / "foreign", served.base)
    assert error.value.code == "merge-does-not-fit"


@pytest.mark.parametrize(
    "files",
    [
        ["weights/__0_0.distcp", "weights/.metadata", "weights/common.pt"],
        ["adapter.nemo"],
        ["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"],
    ],
    ids=["distributed", "nemo", "megatron-lm"],
)
def test_what_a_pickle_describes_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / "checkpoint" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint" / name).write_bytes(b"\x80\x04.")
    for options in ({}, {"base": "llama"}):
        with pytest.raises(AdapterError) as error:
            gk.convert(tmp_path / "checkpoint", tmp_path / "out", to="peft", **options)
        assert error.value.code == "adapter-pickle"
    assert not (tmp_path / "out").exists()
