"""Each rule on saved adapters finds the fault it is for, and a good adapter gives none of them cause."""

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.checks.live_adapters import with_effect
from tests.unit.checks.observed import by_code, edit, finding
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import graftkit as gk
from graftkit.adapters.file import AdapterFile
from graftkit.checks.check import check, rules_on_files
from graftkit.checks.engine.fixing import fix_all
from graftkit.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ERROR, WARNING, INFO = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
ALL = {"GK401", "GK501", "GK502", "GK503", "GK504", "GK505", "GK506", "GK507", "GK509", "GK604"}
E2B = "google/gemma-4-E2B-it"
TARGETS = ["q_proj", "down_proj"]


def saved(base: nn.Module, folder: Path, config: LoraConfig | None = None) -> Path:
    """An adapter with an effect, attached and saved by stock PEFT."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config or LoraConfig(r=2, target_modules=TARGETS))
    return stored(model, folder)


def stored(model: PeftModel, folder: Path) -> Path:
    with_effect(model).save_pretrained(folder, save_embedding_layers=False)
    return folder


def change(folder: Path, how: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite the tensors; None drops one."""
    changed = {name: how(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({n: t.contiguous() for n, t in changed.items() if t is not None}, folder / WEIGHTS, {"format": "pt"})


def rename(folder: Path, before: str, after: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({n.replace(before, after): t for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def verdicts(report: gk.Report) -> dict[str, gk.Severity]:
    return {code: found.severity for code, found in by_code(report).items()}


def not_ok(report: gk.Report) -> dict[str, gk.Severity]:
    return {code: verdict for code, verdict in verdicts(report).items() if verdict is not OK}


@pytest.fixture
def llama(twin_of: Callable[[str], nn.Module]) -> nn.Module:
    return twin_of("llama")


@pytest.fixture
def good(llama: nn.Module, tmp_path: Path) -> Path:
    return saved(llama, tmp_path / "adapter")


# ---- good adapters ----


@pytest.mark.rule_passes("GK401", "GK501", "GK502", "GK503", "GK504", "GK505", "GK507", "GK509")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("llama", {"r": 4, "method": "dora"}, id="dora"),
        pytest.param("llama", {"method": "ia3"}, id="ia3"),
        pytest.param("llama", {"method": "loha"}, id="loha"),
        pytest.param("llama", {"method": "vera"}, id="vera"),
        pytest.param("llama", {"method": "oft", "oft_block_size": 4}, id="oft"),
        pytest.param("llama", {"modules_to_save": ["lm_head"]}, id="a module saved whole"),
        pytest.param(E2B, {"scope": "all"}, id="wrapped towers"),
        pytest.param("t5", {}, id="encoder and decoder"),
        pytest.param("mamba2", {}, id="mamba2"),
        pytest.param("google/gemma-4-26B-A4B-it", {"targets": ["all-linear", "experts"]}, id="stacked experts"),
        pytest.param("glm4_moe", {}, id="targets that PEFT rewrites"),
    ],
)
def test_gk401_gk501_to_gk507_passes_on_a_good_adapter(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    base = twin_of(name)
    stored(gk.attach(base, gk.plan(base, **options)), tmp_path)
    report = check(tmp_path, twin_of(name))
    # GK506 cannot see the order of the columns where no expert has columns of zeros.
    undecided = {"GK506": UNKNOWN} if "experts" in options.get("targets", ()) else {}
    assert verdicts(report) == {**dict.fromkeys(sorted(ALL), OK), **undecided}, str(report)
    assert {f.source for f in report} == {"file"}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LoraConfig(r=2, target_modules=TARGETS, rank_pattern={"q_proj": 3}), id="rank pattern"),
        pytest.param(LoraConfig(r=2, target_modules=TARGETS, layers_to_transform=[0]), id="one layer"),
        pytest.param(LoraConfig(r=2, target_modules=r".*\.\d+\.mlp\.(up|down)_proj"), id="regular expression"),
        pytest.param(LoraConfig(r=2, target_modules="all-linear", exclude_modules=["o_proj"]), id="all but one"),
        pytest.param(LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), id="embeddings"),
        pytest.param(LoraConfig(r=2, target_modules=TARGETS, bias="lora_only"), id="biases"),
    ],
)
def test_what_stock_peft_saves_passes(llama: nn.Module, tmp_path: Path, config: LoraConfig) -> None:
    report = check(saved(llama, tmp_path, config), llama)
    assert not not_ok(report), str(report)


def test_a_tower_excluded_from_all_linear_passes(e2b: nn.Module, tmp_path: Path) -> None:
    """PEFT saves the names of every linear, and some of them are in the excluded towers alone."""
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*(vision|audio)_tower.*")
    report = check(saved(e2b, tmp_path, config), e2b)
    assert not not_ok(report), str(report)


def test_without_a_base_what_needs_it_is_unknown(good: Path) -> None:
    report = check(good)
    assert not_ok(report) == dict.fromkeys(("GK501", "GK502", "GK507", "GK509"), UNKNOWN)
    assert finding(report, "GK501").evidence["missing"] == ("base",)


# ---- what each rule is for ----


@pytest.mark.rule_fails("GK401")
def test_gk401_an_adapter_saved_without_gathering(good: Path, llama: nn.Module) -> None:
    change(good, lambda _, tensor: tensor.new_zeros(0))
    report = check(good, llama)
    found = finding(report, "GK401")
    assert (found.severity, found.evidence["empty"]) == (ERROR, found.evidence["tensors"])
    assert "ZeRO-2" in str(found.help)
    assert finding(report, "GK503").severity is ERROR


@pytest.mark.rule_fails("GK401")
def test_gk401_a_file_without_tensors(good: Path) -> None:
    save_file({}, good / WEIGHTS)
    report = check(good)
    assert verdicts(report)["GK401"] is ERROR
    assert verdicts(report)["GK505"] is OK


@pytest.mark.rule_fails("GK501")
def test_gk501_experts_as_an_older_transformers_names_them(tmp_path: Path) -> None:
    """Only what is no expert is loaded; the norm says how much of the training that is."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2MoeConfig(
        vocab_size=64,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **sizes,
    )
    base = AutoModelForCausalLM.from_config(config)
    folder = saved(base, tmp_path, LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]))
    tensors = load_file(folder / WEIGHTS)
    before = sum(float(t.square().sum()) for t in tensors.values())
    experts = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{e}.gate_proj.lora_{side}.weight": torch.ones(shape)
        for layer in range(2)
        for e in range(4)
        for side, shape in (("A", (2, 32)), ("B", (16, 2)))
    }
    save_file({**tensors, **experts}, folder / WEIGHTS, {"format": "pt"})
    found = finding(check(folder, base), "GK501")
    added = sum(t.numel() for t in experts.values())
    assert found.severity is ERROR
    assert found.evidence["lost"] == len(experts)
    assert found.evidence["lost_square_share"] == pytest.approx(added / (added + before), rel=1e-4)
    assert "experts.0.gate_proj" in str(found.where)


@pytest.mark.rule_passes("GK501")
def test_gk501_embeddings_that_are_saved_twice(llama: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"])
    model = with_effect(get_peft_model(copy.deepcopy(llama), config))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(".original_module." in name for name in load_file(tmp_path / WEIGHTS))
    assert finding(check(tmp_path, llama), "GK501").severity is OK


@pytest.mark.rule_passes("GK501")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_gk501_a_convolution_in_groups(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    base = twin_of("convnext")
    groups = math.lcm(*(m.groups for m in base.modules() if isinstance(m, nn.Conv2d)))
    assert groups > 1
    saved(base, tmp_path, LoraConfig(r=groups, target_modules=["dwconv"]))
    assert finding(check(tmp_path, base), "GK501").severity is OK


@pytest.mark.rule_fails("GK501")
@pytest.mark.parametrize(
    ("name", "fields", "tensor", "axis"),
    [
        pytest.param("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight", 0, id="a head saved whole"),
        pytest.param("llama", {"target_modules": ["embed_tokens"]}, "lora_embedding_A", 1, id="an embedding"),
        pytest.param("vit", {"target_modules": ["projection"]}, "lora_A.weight", 2, id="a convolution"),
    ],
)
def test_gk501_another_size(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str, fields: dict[str, Any], tensor: str, axis: int
) -> None:
    base = twin_of(name)
    saved(base, tmp_path, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))
    change(tmp_path, lambda n, t: torch.cat([t, t], dim=axis) if n.endswith(tensor) else t)
    found = finding(check(tmp_path, base), "GK501")
    assert (found.severity, found.evidence["lost"]) == (ERROR, 1)


@pytest.mark.rule_fails("GK501")
def test_gk501_another_base(good: Path, e2b: nn.Module) -> None:
    assert finding(check(good, e2b), "GK501").severity is ERROR


@pytest.mark.rule_fails("GK501")
def test_gk501_a_planned_layer_that_the_file_lacks(good: Path, llama: nn.Module) -> None:
    change(good, lambda name, tensor: None if "layers.1.self_attn" in name else tensor)
    found = finding(check(good, llama), "GK501")
    assert (found.severity, found.evidence["lost"], found.evidence["lacking"]) == (ERROR, 0, 1)
    assert found.where == "model.layers.1.self_attn.q_proj"


def larger(base: nn.Module) -> Any:
    """A copy with three more tokens."""
    grown: Any = copy.deepcopy(base)
    grown.resize_token_embeddings(grown.config.vocab_size + 3, mean_resizing=False)
    return grown


@pytest.mark.rule_fails("GK501")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="embeddings saved because they were resized"),
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, id="embeddings trained whole"),
        pytest.param({"trainable_token_indices": [3, 513]}, id="rows of new tokens"),
    ],
)
def test_gk501_new_tokens_that_the_base_has_no_rows_for(
    options: dict[str, Any], llama: nn.Module, tmp_path: Path
) -> None:
    whole = "trainable_token_indices" not in options
    grown = larger(llama)
    adapted = get_peft_model(grown, LoraConfig(r=2, target_modules=TARGETS, **options))
    with_effect(adapted).save_pretrained(tmp_path, save_embedding_layers=whole)
    with pytest.raises((RuntimeError, IndexError)):
        PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
    PeftModel.from_pretrained(larger(llama), tmp_path)
    found = finding(check(tmp_path, llama), "GK501")
    assert found.severity is ERROR
    assert "embed_tokens" in str(found.where) or "lm_head" in str(found.where)
    assert not not_ok(check(tmp_path, larger(llama)))


@pytest.mark.rule_fails("GK501")
def test_gk501_a_saved_module_under_the_name_it_has_in_memory(llama: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"])
    folder = saved(llama, tmp_path, config)
    rename(folder, "lm_head.weight", "lm_head.modules_to_save.weight")
    assert finding(check(folder, llama), "GK501").evidence["lost"] == 1


@pytest.mark.rule_passes("GK501", "GK504")
def test_targets_that_peft_adds_for_a_shared_weight(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    base = twin_of("gemma2")
    folder = saved(base, tmp_path, LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert any("lm_head" in name for name in load_file(folder / WEIGHTS))
    assert not not_ok(check(folder, base))
    assert verdicts(check(folder))["GK504"] is OK


@pytest.mark.rule_fails("GK502")
def test_gk502_a_text_only_adapter_on_the_multimodal_class(e2b: nn.Module, tmp_path: Path) -> None:
    folder = saved(e2b, tmp_path, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|o)_proj"))
    rename(folder, ".model.language_model.", ".model.")
    found = finding(check(folder, e2b), "GK502")
    assert found.severity is ERROR
    assert found.evidence["fitting_prefix"] == "base_model.model.model.language_model."
    assert found.evidence["prefix"] == "base_model.model.model."
    rename(folder, found.evidence["prefix"], found.evidence["fitting_prefix"])
    assert not not_ok(check(folder, e2b))


@pytest.mark.rule_fails("GK502")
def test_gk502_a_stranger_gets_no_prefix(good: Path, llama: nn.Module) -> None:
    rename(good, "_proj.", "_other.")
    found = finding(check(good, llama), "GK502")
    assert found.severity is ERROR
    assert "fitting_prefix" not in found.evidence
    assert "None" not in str(found.help)


@pytest.mark.rule_fails("GK503")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gk503_values_that_are_not_finite(good: Path, value: float) -> None:
    def break_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "layers.0.self_attn.q_proj.lora_B" in name:
            tensor[0, 0] = value
        return tensor

    change(good, break_one)
    found = finding(check(good), "GK503")
    assert (found.severity, found.evidence["not_finite"]) == (ERROR, 1)
    assert "q_proj.lora_B" in str(found.where)


@pytest.mark.rule_fails("GK503")
def test_gk503_a_flattened_matrix(good: Path) -> None:
    change(good, lambda name, tensor: tensor.flatten() if "layers.0.mlp.down_proj.lora_A" in name else tensor)
    found = finding(check(good), "GK503")
    assert (found.severity, found.evidence["flat"], found.evidence["empty"]) == (ERROR, 1, 0)


@pytest.mark.rule_fails("GK503")
def test_gk503_an_untrained_adapter(llama: nn.Module, tmp_path: Path) -> None:
    get_peft_model(llama, LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path)
    found = finding(check(tmp_path), "GK503")
    assert found.severity is WARNING
    assert found.evidence["zero"] == found.evidence["starting_at_zero"]


@pytest.mark.rule_passes("GK503")
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT takes the biases for empty matrices
def test_gk503_passes_biases_of_factors(llama: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    get_peft_model(llama, config).save_pretrained(tmp_path)
    change(tmp_path, lambda name, tensor: tensor.zero_() if name.endswith("lora_B.bias") else tensor)
    assert finding(check(tmp_path), "GK503").severity is OK


@pytest.mark.rule_fails("GK503")
def test_gk503_a_layer_that_was_not_trained(good: Path) -> None:
    change(good, lambda name, t: t.zero_() if "layers.1.mlp.down_proj.lora_B" in name else t)
    found = finding(check(good), "GK503")
    assert (found.severity, found.evidence["zero"]) == (WARNING, 1)
    assert "layers.1.mlp.down_proj" in str(found.where)


@pytest.mark.rule_passes("GK504")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_gk504_convolutions_show_their_rank_in_lora_a(tmp_path: Path, groups: int) -> None:
    base = nn.Sequential(nn.Conv1d(8, 8, 3, groups=groups))
    folder = saved(base, tmp_path, LoraConfig(r=4, target_modules=["0"]))
    assert finding(check(folder), "GK504").severity is OK


@pytest.mark.rule_fails("GK504")
@pytest.mark.parametrize(
    ("fields", "count"),
    [
        pytest.param({"r": 4}, "other_ranks", id="rank"),
        pytest.param({"rank_pattern": {"q_proj": 7}}, "other_ranks", id="rank pattern"),
        pytest.param({"target_modules": ["q_proj"]}, "untargeted", id="a target left out"),
        pytest.param({"target_modules": [*TARGETS, "v_proj"]}, "unanswered", id="a target too many"),
        pytest.param({"target_modules": r".*\.v_proj"}, "untargeted", id="another expression"),
        pytest.param({"target_modules": 3}, "problems", id="a number for targets"),
        pytest.param({"peft_type": "lora"}, "problems", id="a method that PEFT looks up in capitals"),
        pytest.param({"target_modules": ["q_proj", None]}, "problems", id="null among targets"),
        pytest.param({"target_modules": "q_proj("}, "problems", id="no regular expression"),
        pytest.param({"target_modules": r"(\w+\.?)+!"}, "problems", id="an endless regular expression"),
        pytest.param({"rank_pattern": {r"(\w|\w\w|\.)*.*!": 4}}, "problems", id="an endless rank pattern"),
        pytest.param({"target_modules": ".*" * 12 + "!"}, "problems", id="a slow regular expression"),
        pytest.param({"r": "8"}, "problems", id="text for a rank"),
        pytest.param({"r": -1}, "problems", id="a negative rank"),
        pytest.param({"r": True}, "problems", id="true for a rank"),
        pytest.param({"rank_pattern": ["q_proj"]}, "problems", id="a list for a pattern"),
        pytest.param({"exclude_modules": {"a": 1}}, "problems", id="an object for a list"),
    ],
)
def test_gk504_a_configuration_of_something_else(
    good: Path, llama: nn.Module, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], count: str
) -> None:
    monkeypatch.setattr("graftkit.checks.peft_config.validate._TIMEOUT", 1)
    monkeypatch.setenv("GRAFT_DEBUG", "1")  # a rule that crashes raises
    edit(good, **fields)
    found = finding(check(good, llama), "GK504")
    assert found.severity is ERROR
    assert found.evidence[count] > 0
    assert count != "problems" or next(iter(fields)) in found.message


@pytest.mark.rule_fails("GK504")
def test_gk504_a_list_of_targets_for_many_families(good: Path, llama: nn.Module) -> None:
    """Stock PEFT takes no offence at a target that the base has nothing for."""
    edit(good, target_modules=[*TARGETS, "c_attn"])
    assert finding(check(good, llama), "GK504").severity is OK
    assert finding(check(good), "GK504").severity is WARNING


@pytest.mark.rule_fails("GK504")
def test_gk504_more_patterns_than_can_be_compared(good: Path) -> None:
    edit(good, rank_pattern={f"a{n}": 2 for n in range(100_000)})
    assert finding(check(good), "GK504").evidence == {"problems": 1}


def test_gk504_fields_that_the_installed_peft_does_not_know(good: Path) -> None:
    edit(good, a_field_of_the_future=[1, 2])
    found = finding(check(good), "GK504")
    assert (found.severity, found.where) == (INFO, "a_field_of_the_future")


@pytest.mark.rule_fails("GK507")
def test_gk507_targets_that_name_wrappers(e2b: nn.Module, tmp_path: Path) -> None:
    inner = r".*vision_tower.*\.q_proj\.linear"
    folder = saved(e2b, tmp_path, LoraConfig(r=2, target_modules=inner))
    edit(folder, target_modules=r".*vision_tower.*\.q_proj")
    with pytest.raises(ValueError, match="is not supported"):
        PeftModel.from_pretrained(copy.deepcopy(e2b), folder)
    report = check(folder, e2b)
    assert not_ok(report) == {"GK507": ERROR}
    assert "gk.migrate" in str(finding(report, "GK507").help)
    gk.migrate(folder, e2b, tmp_path.with_name("migrated"))
    assert not not_ok(check(tmp_path.with_name("migrated"), e2b))
    fixed, applied = fix_all(lambda: check(folder, e2b), adapter=folder)
    assert [f.code for f in applied] == ["GK507"]
    assert not not_ok(fixed)
    PeftModel.from_pretrained(e2b, folder)


@pytest.mark.rule_passes("GK507")
def test_gk507_ranks_keyed_on_wrappers_are_fixed_too(e2b: nn.Module, tmp_path: Path) -> None:
    ranks = {r"vision_tower.*q_proj.linear": 3}
    inner = r".*vision_tower.*\.(q|v)_proj\.linear"
    folder = saved(e2b, tmp_path, LoraConfig(r=2, target_modules=inner, rank_pattern=ranks))
    edit(folder, target_modules=["q_proj", "v_proj"], rank_pattern={"vision_tower.*q_proj": 3})
    fixed, _ = fix_all(lambda: check(folder, e2b), adapter=folder)
    assert not not_ok(fixed), str(fixed)
    PeftModel.from_pretrained(e2b, folder)


@pytest.mark.rule_fails("GK507")
def test_gk507_has_no_fix_where_tensors_need_new_names(e2b: nn.Module, tmp_path: Path) -> None:
    folder = saved(e2b, tmp_path, LoraConfig(r=2, target_modules=r".*vision_tower.*\.q_proj\.linear"))
    edit(folder, target_modules=r".*vision_tower.*\.q_proj")
    rename(folder, ".q_proj.linear.", ".q_proj.")
    found = finding(check(folder, e2b), "GK507")
    assert (found.severity, found.fix) == (ERROR, None)


@pytest.fixture
def in_place(e2b: nn.Module, tmp_path: Path) -> Path:
    """An adapter whose layers stood where the wrappers are."""
    folder = saved(e2b, tmp_path / "in place", LoraConfig(r=2, target_modules=r".*_tower.*\.q_proj\.linear"))
    edit(folder, target_modules=r".*_tower.*\.q_proj")
    rename(folder, ".q_proj.linear.", ".q_proj.")
    return folder


@pytest.mark.rule_fails("GK509")
def test_gk509_names_in_the_place_of_wrappers_do_not_tell(e2b: nn.Module, in_place: Path) -> None:
    found = finding(check(in_place, e2b), "GK509")
    assert (found.severity, found.evidence["bounded"]) == (WARNING, 4)
    assert str(found.where).endswith("q_proj.linear")
    assert "trained_without_clamp" in str(found.help)


@pytest.mark.rule_fails("GK509")
@pytest.mark.rule_passes("GK509")
@pytest.mark.filterwarnings("ignore:GK509")
@pytest.mark.parametrize(
    ("without", "expected"),
    [
        pytest.param(None, {"GK509": WARNING}, id="not known"),
        pytest.param(True, {"GK509": ERROR}, id="without"),
        pytest.param(False, {}, id="with"),
    ],
)
def test_gk509_reads_what_a_migration_states(
    e2b: nn.Module, in_place: Path, tmp_path: Path, without: bool | None, expected: dict[str, gk.Severity]
) -> None:
    gk.migrate(in_place, e2b, tmp_path / "out", trained_without_clamp=without)
    assert not_ok(check(tmp_path / "out", e2b)) == expected
    # In each case the unmigrated one fails, and without bounds in the base both pass.
    assert finding(check(in_place, e2b), "GK509").severity is WARNING
    for buffer in e2b.buffers():
        if buffer.ndim == 0:
            buffer.fill_(torch.inf)
    assert finding(check(tmp_path / "out", e2b), "GK509").severity is OK
    assert finding(check(in_place, e2b), "GK509").severity is OK


# ---- files that were broken, or made to do harm ----


def raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + header + data)


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def header_of(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
ONE = json.dumps(entry([1, 1], 0, 4))


@pytest.mark.rule_fails("GK505")
@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(lambda f: raw(f, header_of(**{A: entry([2, 2], 0, 16)}), b"\0" * 7), id="truncated"),
        pytest.param(lambda f: (f / WEIGHTS).write_bytes(b""), id="empty"),
        pytest.param(lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 200), id="binary"),
        pytest.param(lambda f: raw(f, b"{}", length=2**60), id="an oversized header"),
        pytest.param(
            lambda f: raw(f, header_of(**{A: entry([1, 2], 0, 8), B: entry([2, 1], 4, 12)}), b"\0" * 12),
            id="overlapping",
        ),
        pytest.param(lambda f: raw(f, header_of(**{A: entry([1, 1], 400, 404)}), b"\0" * 4), id="out of range"),
        pytest.param(lambda f: raw(f, header_of(**{A: entry([-1, -1], 0, 4)}), b"\0" * 4), id="negative shape"),
        pytest.param(lambda f: raw(f, header_of(**{A: entry([2**62, 2**62], 0, 4)}), b"\0" * 4), id="huge shape"),
        pytest.param(lambda f: raw(f, b"[" * 100_000), id="a deep header"),
        pytest.param(lambda f: raw(f, f'{{"{A}":{ONE},"{A}":{ONE}}}'.encode(), b"\0" * 4), id="duplicate keys"),
        pytest.param(
            lambda f: save_file({"../../etc/passwd": torch.ones(1)}, f / WEIGHTS), id="a path for a name"
        ),
        pytest.param(lambda f: save_file({"a\x1b[2Jb": torch.ones(1)}, f / WEIGHTS), id="an escape sequence"),
        pytest.param(lambda f: save_file({"a" * 5000: torch.ones(1)}, f / WEIGHTS), id="a name without end"),
        pytest.param(lambda f: (f / WEIGHTS).write_bytes(pickle.dumps([1] * 99)), id="a pickle in disguise"),
        pytest.param(lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), id="a pickle only"),
        pytest.param(lambda f: (f / WEIGHTS).unlink(), id="no weights"),
    ],
)
def test_gk505_weights_that_cannot_be_trusted(
    good: Path, llama: nn.Module, weights: Callable[[Path], object]
) -> None:
    weights(good)
    report = check(good, llama)
    assert len(report) == len(ALL)
    found = finding(report, "GK505")
    assert found.severity is ERROR
    assert found.help
    assert "\x1b" not in str(report)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


@pytest.mark.rule_fails("GK505")
def test_gk505_a_pickle_beside_the_weights_is_not_opened(good: Path, llama: nn.Module) -> None:
    (good / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert not_ok(check(good, llama)) == {"GK505": WARNING}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00\xff" * 50, id="binary"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"r": 3}', id="no method"),
    ],
)
def test_without_a_configuration_it_is_no_adapter(good: Path, content: bytes) -> None:
    (good / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        check(good)
    assert caught.value.code == "adapter-config"


def test_a_method_without_modules_is_unknown_where_it_must_be(llama: nn.Module, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(llama, config).save_pretrained(tmp_path)
    assert not_ok(check(tmp_path, llama)) == dict.fromkeys(("GK501", "GK502", "GK509"), UNKNOWN)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        check(tmp_path / "none")
    assert caught.value.code == "adapter-not-found"


def test_a_hundred_thousand_keys(good: Path, llama: nn.Module) -> None:
    """Neither a long list of targets nor as many tensors make any step quadratic."""
    names = [f"base_model.model.model.layers.{n}.q_proj.lora_A.weight" for n in range(100_000)]
    data = header_of(**{name: entry([1, 1], 4 * n, 4 * n + 4) for n, name in enumerate(names)})
    raw(good, data, b"\0" * 400_000)
    edit(good, r=1, target_modules=[f"model.layers.{n}.q_proj" for n in range(100_000)])
    report = check(good, llama, data=False)
    assert finding(report, "GK504").severity is OK
    assert finding(report, "GK501").evidence["lost"] == 100_000
    assert len(str(report)) < 20_000


# ---- what is read ----


def test_header_rules_do_not_read_the_data(good: Path, llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB that are not there: a sparse file, whose data nothing may open."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    size = 2_000_000_000
    raw(good, header_of(**{name: entry([2, size // 8], 0, size)}))
    with (good / WEIGHTS).open("r+b") as file:
        file.truncate((good / WEIGHTS).stat().st_size + size)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("tensor data was opened")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(AdapterFile, "tensor", refuse)
    before = _bytes_read()
    report = check(good, gk.survey(llama), data=False)
    assert _bytes_read() - before < 20_000_000
    found = verdicts(report)
    assert (found["GK501"], found["GK504"]) == (ERROR, ERROR)
    assert (found["GK401"], found["GK505"], found["GK503"]) == (OK, OK, UNKNOWN)


def _bytes_read() -> int:
    """Return the bytes that this process has read, 0 on systems that do not count them."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return 0
    return int(counters.read_text().split("rchar: ")[1].split()[0])


def test_the_share_of_the_norm_needs_the_data(good: Path, e2b: nn.Module) -> None:
    assert finding(check(good, e2b), "GK501").evidence["lost_square_share"] == pytest.approx(1)
    assert finding(check(good, e2b, data=False), "GK501").evidence["lost_square_share"] is None


def test_the_area_is_whole() -> None:
    assert {rule.code for rule in rules_on_files(served=False)} == ALL
