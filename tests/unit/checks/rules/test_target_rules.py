"""Each rule on targets fails where stock PEFT raises or does something else unnoticed, and passes elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from ruamel.yaml import YAML
from tests.unit.checks import observed
from tests.unit.checks.observed import RULES, checked
from tests.unit.surveying.handmade import Composite, Encoder
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.checks.engine.fixing import fix_all
from graftkit.findings import Finding, Report
from graftkit.planning.config.build import config_dict
from graftkit.recipes.recipe import read_recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training, training_of

ERROR, WARNING, INFO = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
E2B, MOE = "google/gemma-4-E2B-it", "google/gemma-4-26B-A4B-it"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
OURS = [code for code in RULES if "GK101" <= code <= "GK116" and code != "GK115"]
Twins = Callable[[str], nn.Module]


def seen(code: str, base: nn.Module | gk.ModelMap, config: Mapping[str, Any], **context: Any) -> Finding:
    """Return the finding of one rule on a stock configuration."""
    base_map = base if isinstance(base, gk.ModelMap) else gk.survey(base)
    return observed.seen(code, peft_config=config, base=base_map, **context)


def attach(model: nn.Module, config: Mapping[str, Any]) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), LoraConfig(**config))


def written(folder: Path, config: Mapping[str, Any], **more: Any) -> Path:
    """Write a recipe with this stock configuration."""
    file = folder / "recipe.yaml"
    with file.open("w") as stream:
        YAML().dump({"model": "llama", "adapter": {"peft_config": dict(config)}, **more}, stream)
    return file


def from_recipe(file: Path, base: gk.ModelMap, rules: list[str]) -> Report:
    recipe = read_recipe(file)
    stock = recipe.fields.adapter.peft_config
    return checked(rules, recipe=recipe, training=training_of(recipe), peft_config=stock, base=base)


def fixed(model: nn.Module, config: Mapping[str, Any], code: str, folder: Path, **more: Any) -> Mapping[str, Any]:
    """Return the configuration after the rule's fix, with which the rule must pass."""
    file, base = written(folder, config, **more), gk.survey(model)
    first = next(iter(from_recipe(file, base, [code])))
    assert first.severity in {ERROR, WARNING}
    assert first.fix is not None
    assert first.file == str(file)
    assert first.line is not None
    report, applied = fix_all(lambda: from_recipe(file, base, [code]), recipe=file)
    assert [finding.code for finding in applied] == [code]
    assert [finding.severity for finding in report] == [OK], str(report)
    stock = read_recipe(file).fields.adapter.peft_config
    assert stock is not None
    return stock


# ---- good configurations ----

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LANGUAGE = r".*language_model.*"
GOOD: list[Any] = [
    ("llama", {"target_modules": SEVEN}, "the usual seven on a plain model"),
    ("llama", {"target_modules": "all-linear"}, "all-linear on a plain model"),
    ("llama", {"target_modules": QV, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 2}}, "patterns"),
    ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}, "a module saved whole"),
    ("llama", {"target_modules": SEVEN, "exclude_modules": ["0.self_attn.q_proj"]}, "an exclusion that works"),
    ("llama", {"target_modules": QV, "layers_to_transform": [0]}, "one layer"),
    ("gpt2", {"target_modules": ["c_attn"]}, "transposed linears"),
    ("whisper", {"target_modules": ["q_proj", "v_proj"]}, "a decoder behind a tower that is fed first"),
    (E2B, {"target_modules": rf"{LANGUAGE}\.(q|k|v|o)_proj"}, "the language model by regular expression"),
    (E2B, {"target_modules": r".*vision_tower.*_proj\.linear"}, "a tower that is named"),
    (E2B, {"target_modules": "all-linear", "exclude_modules": r".*(tower|embed_(vision|audio)).*"}, "no towers"),
    (MOE, {"target_modules": rf"{LANGUAGE}\.q_proj", "target_parameters": EXPERTS}, "experts"),
    ("qwen3_moe", {"target_modules": SEVEN}, "the usual seven where PEFT rewrites them"),
    (
        "deepseek_v4",
        {"target_modules": ["q_b_proj", "o_b_proj"], "target_parameters": EXPERTS},
        "the rest and experts",
    ),
]


@pytest.mark.rule_passes(
    "GK101",
    "GK102",
    "GK103",
    "GK104",
    "GK105",
    "GK106",
    "GK107",
    "GK108",
    "GK109",
    "GK110",
    "GK111",
    "GK112",
    "GK113",
    "GK114",
    "GK116",
)
@pytest.mark.parametrize(("name", "config"), [pytest.param(n, c, id=f"{n}: {title}") for n, c, title in GOOD])
def test_the_rules_on_targets_pass_on_good_configurations(
    twin_of: Twins, name: str, config: dict[str, Any]
) -> None:
    model = twin_of(name)
    report = checked(OURS, peft_config=config, base=gk.survey(model))
    assert [f.code for f in report] == OURS
    assert not [(f.code, f.message) for f in report if f.severity not in {OK, INFO}]
    assert adapted_sites(attach(model, config))


@pytest.mark.parametrize("name", ["llama", E2B, MOE, "qwen3_moe", "deepseek_v3", "llama4", "jamba", "deepseek_v4"])
def test_nothing_is_wrong_with_plans(twin_of: Twins, name: str) -> None:
    base = gk.survey(twin_of(name))
    for targets in (["all-linear"], ["attention"]):
        plan = gk.plan(base, targets=targets, r=4)
        report = checked(OURS, peft_config=config_dict(plan.peft_config), base=base, plan=plan)
        assert not [(f.code, f.message) for f in report if f.severity not in {OK, INFO}]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"target_modules": 5}, id="another type"),
        pytest.param({"target_modules": ["q_proj"], "rank_pattern": {"(": 4}}, id="an invalid regular expression"),
        pytest.param({"target_modules": QV, "peft_type": "PROMPT_TUNING"}, id="no method for layers"),
        pytest.param({"target_modules": QV, "layer_replication": [[0, 1], [0, 1]]}, id="replicated layers"),
    ],
)
def test_what_cannot_be_read_is_unknown(twin_of: Twins, config: dict[str, Any]) -> None:
    report = checked(OURS, peft_config=config, base=gk.survey(twin_of("llama")))
    assert {f.severity for f in report} == {UNKNOWN}
    assert all(f.evidence["problems"] for f in report)


def test_long_lists_on_many_sites(twin_of: Twins) -> None:
    """A list of full paths on as many sites would take minutes if each were compared with each."""
    small = gk.survey(twin_of("llama"))
    site = next(site for site in small if site.path.endswith("q_proj"))
    paths = [f"model.layers.{layer}.block.{n}.q_proj" for layer in range(200) for n in range(50)]
    base = dataclasses.replace(
        small,
        sites=tuple(dataclasses.replace(site, path=path) for path in paths),
        module_paths=tuple(paths),
        parameter_paths=tuple(f"{path}.weight" for path in paths),
    )
    report = checked(OURS, peft_config={"target_modules": paths}, base=base)
    assert {f.severity for f in report} == {OK}, str(report)


# ---- GK101 ----


@pytest.mark.rule_fails("GK101")
def test_gk101_a_name_that_reaches_wrappers(twin_of: Twins, tmp_path: Path) -> None:
    model = twin_of(E2B)
    with pytest.raises(ValueError, match="is not supported"):
        attach(model, {"target_modules": QV})
    found = seen("GK101", model, {"target_modules": QV})
    assert found.severity is ERROR
    assert "ClippableLinear" in found.message


@pytest.mark.rule_fails("GK101")
@pytest.mark.parametrize(
    ("targets", "modalities", "towers"),
    [
        pytest.param(QV, None, {"language"}, id="a bare name"),
        pytest.param(QV, ["text"], {"language"}, id="text"),
        pytest.param(QV, ["text", "image"], {"language", "vision"}, id="images are fed"),
        pytest.param(r".*(language_model|audio_tower).*q_proj", None, {"language", "audio"}, id="a tower by name"),
        pytest.param(r".*vision_tower.*q_proj", None, {"vision"}, id="a tower alone"),
    ],
)
def test_gk101_the_fix_names_the_intended_towers(
    twin_of: Twins, tmp_path: Path, targets: Any, modalities: list[str] | None, towers: set[str]
) -> None:
    model = twin_of(E2B)
    data = {"modalities": modalities} if modalities else {}
    stock = fixed(model, {"target_modules": targets}, "GK101", tmp_path, data=data)
    base, reached = gk.survey(model), adapted_sites(attach(model, stock))
    ends = tuple(targets if isinstance(targets, list) else ["q_proj"])
    assert reached == {s.path for s in base if s.tower in towers and s.names[-1].endswith(ends)}
    rules = ["GK101", "GK102"]
    assert {f.severity for f in from_recipe(tmp_path / "recipe.yaml", base, rules)} <= {OK, INFO}


@pytest.mark.rule_fails("GK101")
def test_gk101_a_module_composed_of_linears(twin_of: Twins, tmp_path: Path) -> None:
    model, config = twin_of("llama"), {"target_modules": ["mlp", "q_proj"]}
    with pytest.raises(ValueError, match="is not supported"):
        attach(model, config)
    found = seen("GK101", model, config)
    assert (found.severity, found.evidence["wrappers"]) == (ERROR, 0)
    assert found.evidence["composites"] == sum(path.endswith(".mlp") for path, _ in model.named_modules())
    sites = adapted_sites(attach(model, fixed(model, config, "GK101", tmp_path)))
    names = {path.rpartition(".")[2] for path in sites}
    assert names == {"gate_proj", "up_proj", "down_proj", "q_proj"}


@pytest.mark.rule_fails("GK101")
@pytest.mark.parametrize("name", ["moshi", "kyutai_speech_to_text"])
def test_gk101_wrappers_of_other_families(twin_of: Twins, name: str) -> None:
    model, config = twin_of(name), {"target_modules": ["q_proj", "o_proj"]}
    with pytest.raises(ValueError, match="is not supported"):
        attach(model, config)
    found = seen("GK101", model, config)
    assert found.severity is ERROR
    assert found.evidence["wrappers"] == sum(
        s.names[-1].endswith(("q_proj", "o_proj")) for s in gk.survey(model) if s.wrapper
    )


@pytest.mark.rule_fails("GK101")
def test_gk101_a_saved_adapter_is_fixed_in_its_configuration(twin_of: Twins, tmp_path: Path) -> None:
    model = twin_of(E2B)
    inner = [s.path for s in gk.survey(model) if s.names[-1].endswith("q_proj")]
    attach(model, {"target_modules": inner}).save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="is not supported"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)

    def check() -> Report:
        config = json.loads(file.read_text())
        return checked(["GK101"], folder=tmp_path, peft_config=config, base=gk.survey(model))

    report, applied = fix_all(check, adapter=tmp_path)
    assert [f.code for f in applied] == ["GK101"]
    assert [f.severity for f in report] == [OK]
    assert adapted_sites(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)) == set(inner)


@pytest.mark.rule_fails("GK101")
@pytest.mark.parametrize(
    ("config", "where"),
    [
        pytest.param({"target_modules": ["mlp"]}, "model.layers.0.mlp", id="a container"),
        pytest.param(
            {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "ValueError", id="fields at odds"
        ),
        pytest.param(
            {"target_modules": [], "target_parameters": ["norm.weight"]}, "model.norm.weight", id="a norm"
        ),
    ],
)
def test_gk101_what_else_peft_refuses(twin_of: Twins, config: dict[str, Any], where: str) -> None:
    model = twin_of("llama")
    with pytest.raises(ValueError):
        attach(model, config)
    found = seen("GK101", model, config)
    assert (found.severity, found.where) == (ERROR, where)


# ---- GK116, and what GK102 and GK211 make of modules of no known tower ----


def features_and_text() -> nn.Module:
    """Return a model of which nothing says what feeds ``a``."""
    return Composite(Encoder(nn.Linear(40, 32), 32))


@pytest.mark.rule_fails("GK116")
def test_gk116_all_linear_where_a_tower_is_not_known() -> None:
    model, config = features_and_text(), {"target_modules": "all-linear"}
    reached = adapted_sites(attach(model, config))
    found = seen("GK116", model, config)
    assert (found.severity, found.where) == (WARNING, "a.stem")
    assert found.evidence["adapted"] == sum(path.startswith("a.") for path in reached) == 13
    text = Training(modalities=("text",))
    for code in ("GK102", "GK211"):
        only = {"target_modules": ["up", "down"]}  # of the blocks, which are no projector
        assert seen(code, model, only, training=text).severity is UNKNOWN


@pytest.mark.rule_passes("GK116")
@pytest.mark.parametrize(
    ("model", "config"),
    [
        pytest.param(features_and_text(), {"target_modules": r"c\.layers\..*\.[qv]"}, id="language alone"),
        pytest.param(features_and_text(), {"target_modules": r"(a|c)\..*\.[qv]"}, id="named"),
        pytest.param(
            nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), {"target_modules": "all-linear"}, id="all alike"
        ),
    ],
)
def test_gk116_modules_that_are_named_or_all_alike(model: nn.Module, config: dict[str, Any]) -> None:
    assert seen("GK116", model, config).severity is OK
    assert seen("GK102", model, config).severity is OK


@pytest.mark.parametrize(
    ("scope", "severity"),
    [
        pytest.param(None, INFO, id="none given"),
        pytest.param(["language", "unknown"], OK, id="with unknown"),
        pytest.param(["c"], OK, id="by path"),
    ],
)
def test_gk116_on_plans(scope: list[str] | None, severity: gk.Severity) -> None:
    base = gk.survey(features_and_text())
    plan = gk.plan(base, scope=scope, r=2)
    found = seen("GK116", base, config_dict(plan.peft_config), plan=plan)
    assert found.severity is severity
    assert seen("GK102", base, config_dict(plan.peft_config), plan=plan).severity is OK


# ---- GK102 ----


@pytest.mark.rule_fails("GK102")
def test_gk102_all_linear_on_towers_nobody_named(twin_of: Twins) -> None:
    model = twin_of(E2B)
    found = seen("GK102", model, {"target_modules": "all-linear"})
    towers = {s.path: s.tower for s in gk.survey(model)}
    reached = [towers[path] for path in adapted_sites(attach(model, {"target_modules": "all-linear"}))]
    assert found.severity is WARNING
    assert found.evidence["vision"] == reached.count("vision") > 0
    assert found.evidence["audio"] == reached.count("audio") > 0
    assert str(len(reached) - reached.count("language")) in found.message


@pytest.mark.rule_fails("GK102")
def test_gk102_the_fix_for_text_alone(twin_of: Twins, tmp_path: Path) -> None:
    model = twin_of(E2B)
    stock = fixed(model, {"target_modules": "all-linear"}, "GK102", tmp_path, data={"modalities": ["text"]})
    towers = {s.path: s.tower for s in gk.survey(model)}
    assert {towers[path] for path in adapted_sites(attach(model, stock))} == {"language"}


@pytest.mark.rule_fails("GK102")
def test_gk102_an_inner_name_reaches_towers_alone(twin_of: Twins) -> None:
    found = seen("GK102", twin_of(E2B), {"target_modules": ["q_proj.linear"]})
    assert found.severity is WARNING
    assert "language" not in found.evidence


@pytest.mark.rule_fails("GK102")
def test_gk102_a_tower_that_is_named_and_not_fed(twin_of: Twins) -> None:
    config = {"target_modules": r".*(language_model.*q_proj|audio_tower.*q_proj\.linear)"}
    assert seen("GK102", twin_of(E2B), config).severity is OK
    text = Training(modalities=("text",))
    assert seen("GK102", twin_of(E2B), config, training=text).severity is WARNING


def test_gk102_towers_that_the_batches_feed_are_an_info(twin_of: Twins) -> None:
    training = Training(modalities=("text", "image", "audio"))
    found = seen("GK102", twin_of(E2B), {"target_modules": "all-linear"}, training=training)
    assert (found.severity, found.fix) == (INFO, None)


@pytest.mark.rule_fails("GK102")
def test_gk102_all_linear_wraps_routers(twin_of: Twins) -> None:
    model = twin_of("qwen3_moe")
    found = seen("GK102", model, {"target_modules": "all-linear"})
    assert found.severity is WARNING
    assert str(found.where).endswith("mlp.gate.weight")
    assert any(
        path.endswith("mlp.gate.weight") for path in adapted_sites(attach(model, {"target_modules": "all-linear"}))
    )


@pytest.mark.rule_fails("GK102")
def test_gk102_a_regular_expression_loses_its_scope(twin_of: Twins) -> None:
    model, config = twin_of("qwen3_moe"), {"target_modules": r".*layers\.0\..*\.q_proj"}
    assert len(adapted_sites(attach(model, config))) > 1
    found = seen("GK102", model, config)
    assert found.severity is WARNING
    assert str(found.where).startswith("model.layers.1.")


@pytest.mark.rule_fails("GK102")
def test_gk102_a_configuration_beyond_its_plan(twin_of: Twins) -> None:
    base = gk.survey(twin_of(E2B))
    plan = gk.plan(base, targets=["attention"], scope="language")
    found = seen("GK102", base, {"target_modules": "all-linear"}, plan=plan)
    assert found.severity is WARNING
    assert seen("GK102", base, config_dict(plan.peft_config), plan=plan).severity is OK


# ---- GK103 to GK106: experts ----


@pytest.mark.rule_fails("GK103")
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe", "llama4", MOE, "deepseek_v4", "jamba"])
@pytest.mark.parametrize("targets", [SEVEN, "all-linear"], ids=["seven", "all-linear"])
def test_gk103_experts_are_left_out(twin_of: Twins, name: str, targets: Any) -> None:
    base = gk.survey(twin_of(name))
    found = seen("GK103", base, {"target_modules": targets})
    experts = [s for s in base if s.role == "expert"]
    assert found.severity is ERROR
    assert found.evidence["missed"] == len(experts) > 0
    assert found.evidence["share"] == round(sum(s.params for s in experts) / base.model.params, 4)


@pytest.mark.rule_fails("GK103")
def test_gk103_the_fix_reaches_every_expert(twin_of: Twins, tmp_path: Path) -> None:
    model = twin_of("gpt_oss")
    stock = fixed(model, {"target_modules": SEVEN}, "GK103", tmp_path)
    experts = {s.path for s in gk.survey(model) if s.role == "expert"}
    assert experts <= adapted_sites(attach(model, stock))


@pytest.mark.rule_fails("GK103")
@pytest.mark.parametrize("dropout", [0, 0.05])
def test_gk103_there_is_no_fix_with_an_option_that_parameters_cannot_take(
    twin_of: Twins, tmp_path: Path, dropout: float
) -> None:
    file = written(tmp_path, {"target_modules": SEVEN, "lora_dropout": dropout})
    (found,) = from_recipe(file, gk.survey(twin_of("gpt_oss")), ["GK103"])
    assert (found.severity, found.fix is None) == (ERROR, dropout > 0)


def test_gk103_attention_alone_is_a_choice(twin_of: Twins) -> None:
    assert seen("GK103", twin_of("gpt_oss"), {"target_modules": QV}).severity is INFO


@pytest.mark.rule_fails("GK104")
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_gk104_dense_layers_are_dropped(twin_of: Twins, name: str, tmp_path: Path) -> None:
    model = twin_of(name)
    dense = {
        s.path for s in gk.survey(model) if s.is_linear and s.path.endswith(("gate_proj", "up_proj", "down_proj"))
    }
    before = adapted_sites(attach(model, {"target_modules": SEVEN}))
    found = seen("GK104", model, {"target_modules": SEVEN})
    assert dense
    assert not dense & before
    assert (found.severity, found.evidence["dropped"]) == (ERROR, len(dense))
    stock = fixed(model, {"target_modules": SEVEN}, "GK104", tmp_path)
    after = adapted_sites(attach(model, stock))
    assert after == before | {f"{path}.weight" for path in dense}


@pytest.mark.rule_passes("GK104")
def test_gk104_passes_where_there_are_experts_only(twin_of: Twins) -> None:
    assert seen("GK104", twin_of("qwen3_moe"), {"target_modules": SEVEN}).severity is OK


@pytest.mark.rule_fails("GK105")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param({"lora_dropout": 0.05}, "lora_dropout", id="dropout"),
        pytest.param({"use_dora": True}, "use_dora", id="DoRA"),
        pytest.param({"init_lora_weights": "pissa"}, "weight", id="PiSSA"),
    ],
)
def test_gk105_options_that_experts_cannot_take(
    twin_of: Twins, tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    model, config = twin_of("qwen3_moe"), {"target_modules": SEVEN, **option}
    with pytest.raises((ValueError, AttributeError), match=message):
        attach(model, config)
    assert seen("GK105", model, config).severity is ERROR
    assert attach(model, fixed(model, config, "GK105", tmp_path))


@pytest.mark.rule_passes("GK105")
def test_gk105_passes_where_only_modules_are_adapted(twin_of: Twins) -> None:
    assert seen("GK105", twin_of("llama"), {"target_modules": SEVEN, "lora_dropout": 0.05}).severity is OK


@pytest.mark.rule_fails("GK106")
def test_gk106_half_of_what_is_fused(twin_of: Twins, tmp_path: Path) -> None:
    model, config = twin_of("qwen3_moe"), {"target_modules": ["q_proj", "gate_proj"]}
    with pytest.raises(ValueError, match="without also targeting up_proj"):
        attach(model, config)
    found = seen("GK106", model, config)
    assert (found.severity, found.evidence["missing"]) == (ERROR, ["up_proj"])
    assert seen("GK103", model, config).severity is UNKNOWN
    assert attach(model, fixed(model, config, "GK106", tmp_path))


# ---- GK107 ----


@pytest.mark.rule_fails("GK107")
@pytest.mark.parametrize(
    ("name", "config", "where"),
    [
        pytest.param("llama", {"target_modules": ["q_proj", "v_prj"]}, "v_prj", id="a misspelled name"),
        pytest.param("phi3", {"target_modules": SEVEN}, "q_proj", id="names of another family"),
        pytest.param(
            "llama", {"target_modules": QV, "modules_to_save": ["score"]}, "score", id="a module to save"
        ),
        pytest.param(
            "llama", {"target_modules": QV, "target_parameters": ["experts.w1"]}, "experts.w1", id="a parameter"
        ),
        pytest.param(
            "llama", {"target_modules": QV, "layers_to_transform": [0, 40]}, "layer 40", id="a layer too many"
        ),
    ],
)
def test_gk107_a_name_that_matches_nothing(twin_of: Twins, name: str, config: dict[str, Any], where: str) -> None:
    model = twin_of(name)
    assert adapted_sites(attach(model, config)), "PEFT refuses this configuration, so that the case shows nothing"
    found = seen("GK107", model, config)
    assert (found.severity, found.where) == (ERROR, where)


@pytest.mark.rule_fails("GK107")
def test_gk107_advice_is_what_the_model_has(twin_of: Twins) -> None:
    assert "v_proj" in str(seen("GK107", twin_of("llama"), {"target_modules": ["q_proj", "v_prj"]}).help)
    assert "qkv_proj" in str(seen("GK107", twin_of("phi3"), {"target_modules": SEVEN}).help)


@pytest.mark.rule_fails("GK107")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gk107_nothing_matches_at_all(twin_of: Twins, name: str) -> None:
    config = {"target_modules": ["query"]}
    with pytest.raises(ValueError, match="not found in the base model"):
        attach(twin_of(name), config)
    assert seen("GK107", twin_of(name), config).severity is ERROR


@pytest.mark.rule_fails("GK107")
def test_gk107_few_layers(twin_of: Twins) -> None:
    model, config = twin_of("nemotron_h"), {"target_modules": SEVEN[:4]}
    found = seen("GK107", model, config)
    layers = {path.split(".")[2] for path in adapted_sites(attach(model, config))}
    assert (found.severity, found.evidence["reached"]) == (WARNING, len(layers))
    settings = CheckSettings(rules={"GK107": {"layers": 0.1}})
    assert seen("GK107", model, config, settings=settings).severity is OK


def test_gk107_a_list_shared_between_families(twin_of: Twins) -> None:
    config = {"target_modules": [*SEVEN, "query_key_value", "dense_h_to_4h"]}
    assert seen("GK107", twin_of("llama"), config).severity is INFO


# ---- GK108 to GK110: layers that are not what they seem ----


@pytest.mark.rule_fails("GK108")
@pytest.mark.parametrize("name", ["llama4", "phimoe"])
def test_gk108_a_router_that_is_a_linear(twin_of: Twins, name: str, tmp_path: Path) -> None:
    model, config = twin_of(name), {"target_modules": ["q_proj", "router"]}
    batch = gk.example_batch(model)
    with pytest.raises(AttributeError, match="dtype"):
        attach(model, config)(**batch)
    found = seen("GK108", model, config)
    assert found.severity is ERROR
    assert "router" in str(found.where)
    assert attach(model, fixed(model, config, "GK108", tmp_path))(**batch).logits.isfinite().all()


@pytest.mark.rule_fails("GK108")
def test_gk108_an_embedding_that_counts_otherwise(twin_of: Twins) -> None:
    """It does not crash: the adapter is looked up at other positions than the weight it is merged into."""
    model, config = twin_of("opt").eval(), {"target_modules": ["embed_positions"]}
    batch = gk.example_batch(model)
    adapted = attach(model, config).eval()
    with torch.no_grad():
        layer = next(m for m in adapted.modules() if isinstance(m, LoraLayer))
        layer.lora_embedding_A["default"].normal_()
        layer.lora_embedding_B["default"].normal_()
        before = adapted(**batch).logits
        after = adapted.merge_and_unload()(**batch).logits
    assert not torch.allclose(before, after, atol=1e-2)
    assert seen("GK108", model, config).severity is ERROR


@pytest.mark.rule_fails("GK109")
def test_gk109_a_name_that_also_stands_in_the_attention(twin_of: Twins) -> None:
    model, config = twin_of("deepseek_v4"), {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    reached = adapted_sites(attach(model, config))
    assert any("compressor.gate_proj" in path for path in reached)
    found = seen("GK109", model, config)
    assert (found.severity, found.evidence["name"]) == (WARNING, "gate_proj")
    better = {"target_modules": ["shared_experts.gate_proj", "up_proj", "down_proj"]}
    assert seen("GK109", model, better).severity is OK


@pytest.mark.rule_fails("GK110")
@pytest.mark.parametrize(("name", "target"), [("qwen3_next", "conv1d"), ("jamba", "dt_proj")])
def test_gk110_a_weight_read_past_its_layer(twin_of: Twins, name: str, target: str, tmp_path: Path) -> None:
    model, config = twin_of(name), {"target_modules": ["q_proj", target], "r": 128}
    batch = gk.example_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        adapted = attach(model, config).eval()
        for path, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer) and path.endswith(target):
                layer.lora_B["default"].weight.normal_()
        assert torch.equal(adapted(**batch).logits, expected), "the adapter would have an effect"
    found = seen("GK110", model, config)
    assert (found.severity, str(found.where).rpartition(".")[2]) == (ERROR, target)
    assert not [p for p in adapted_sites(attach(model, fixed(model, config, "GK110", tmp_path))) if target in p]


@pytest.mark.rule_fails("GK110")
def test_gk110_a_projection_that_peft_bars(twin_of: Twins) -> None:
    model, config = twin_of("mamba2"), {"target_modules": ["in_proj", "out_proj"]}
    with pytest.raises(ValueError, match="incompatible"):
        attach(model, config)
    assert seen("GK110", model, config).severity is ERROR
    assert seen("GK110", model, {"target_modules": ["in_proj"]}).severity is OK


# ---- GK111 to GK114 ----


@pytest.mark.rule_fails("GK111")
def test_gk111_a_list_that_excludes_no_tower(twin_of: Twins, tmp_path: Path) -> None:
    model = twin_of(E2B)
    config = {"target_modules": "all-linear", "exclude_modules": ["vision_tower", "audio_tower", "q_proj"]}
    assert any("vision_tower" in path for path in adapted_sites(attach(model, config)))
    assert seen("GK111", model, config).severity is ERROR
    before = adapted_sites(attach(model, config))
    after = adapted_sites(attach(model, fixed(model, config, "GK111", tmp_path)))
    assert after == {p for p in before if "_tower." not in p}


@pytest.mark.parametrize("targets", [SEVEN, r".*\.(q_proj|v_proj)(\.linear)?"], ids=["names", "regex"])
def test_gk111_is_fixed_before_targets_are(twin_of: Twins, tmp_path: Path, targets: Any) -> None:
    model = twin_of(E2B)
    config = {"target_modules": targets, "exclude_modules": ["vision_tower", "audio_tower"]}
    file, base = written(tmp_path, config), gk.survey(model)
    report, applied = fix_all(lambda: from_recipe(file, base, OURS), recipe=file)
    assert [finding.code for finding in applied] == ["GK111"]
    assert {
        finding.code: finding.severity for finding in report if finding.code in {"GK101", "GK111", "GK112"}
    } == {"GK101": OK, "GK111": OK, "GK112": OK}
    stock = read_recipe(file).fields.adapter.peft_config
    assert stock is not None
    assert stock["target_modules"] == targets
    adapted = adapted_sites(attach(model, stock))
    assert adapted
    assert not any("_tower" in path for path in adapted)


def test_gk111_an_exclusion_that_works_in_one_tower_alone(twin_of: Twins, tmp_path: Path) -> None:
    model, config = twin_of(E2B), {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}
    assert any("q_proj.linear" in path for path in adapted_sites(attach(model, config)))
    after = adapted_sites(attach(model, fixed(model, config, "GK111", tmp_path)))
    assert after == {p for p in adapted_sites(attach(model, config)) if "q_proj" not in p}


@pytest.mark.parametrize(
    ("excluded", "verdict"),
    [
        pytest.param(r".*vision_tower.*", OK, id="a regular expression"),
        pytest.param(["per_layer_input_gate"], OK, id="a leaf"),
        pytest.param(["multi_modal_projector"], INFO, id="a module that there is not"),
        pytest.param([], OK, id="nothing"),
    ],
)
def test_gk111_what_is_not_called_wrong(twin_of: Twins, excluded: Any, verdict: gk.Severity) -> None:
    config = {"target_modules": "all-linear", "exclude_modules": excluded}
    assert seen("GK111", twin_of(E2B), config).severity is verdict


@pytest.mark.rule_fails("GK112")
def test_gk112_a_pattern_for_wrapper_and_inner(twin_of: Twins, tmp_path: Path) -> None:
    model, config = twin_of(E2B), {"target_modules": r".*\.(q_proj|v_proj)(\.linear)?"}
    with pytest.raises(ValueError, match="is not supported"):
        attach(model, config)
    assert seen("GK112", model, config).severity is ERROR
    inner = {s.path for s in gk.survey(model) if s.names[-1].endswith(tuple(QV))}
    assert adapted_sites(attach(model, fixed(model, config, "GK112", tmp_path))) == inner


@pytest.mark.rule_passes("GK112")
@pytest.mark.parametrize("targets", [QV, ["self_attn.q_proj.linear"]], ids=["wrappers alone", "inner alone"])
def test_gk112_passes_where_one_of_the_two_is_named(twin_of: Twins, targets: list[str]) -> None:
    assert seen("GK112", twin_of(E2B), {"target_modules": targets}).severity is OK


def _tied_delta(model: PeftModel) -> float:
    """How many times over the adapter is in the embeddings after merging."""
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.lora_embedding_A["default"].normal_()
        layer.lora_embedding_B["default"].normal_()
        before = layer.get_base_layer().weight.clone()
        delta = layer.get_delta_weight("default")
        after = model.merge_and_unload().get_input_embeddings().weight
        return float(((after - before) * delta).sum() / delta.square().sum())


@pytest.mark.rule_fails("GK113")
def test_gk113_a_tied_embedding_is_merged_twice(twin_of: Twins) -> None:
    model = twin_of(E2B)
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    assert _tied_delta(attach(model, config)) == pytest.approx(2, rel=1e-3)
    found = seen("GK113", model, config)
    assert (found.severity, found.where) == (ERROR, "model.language_model.embed_tokens")
    assert found.evidence["merged_twice"] is True


@pytest.mark.rule_fails("GK113")
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_gk113_either_side_of_a_tie(twin_of: Twins, name: str) -> None:
    model = twin_of(E2B)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = attach(model, {"target_modules": [name]}).merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert seen("GK113", model, {"target_modules": [name]}).severity is ERROR


@pytest.mark.rule_fails("GK113")
def test_gk113_a_block_that_two_layers_share(twin_of: Twins) -> None:
    model, config = twin_of("zamba").eval(), {"target_modules": ["q_proj"]}
    batch = gk.example_batch(model)
    adapted = attach(model, config).eval()
    with torch.no_grad():
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_B["default"].weight.normal_()
        before = adapted(**batch).logits
        after = adapted.merge_and_unload()(**batch).logits
    assert not torch.allclose(before, after, atol=1e-2)
    assert seen("GK113", model, config).severity is ERROR


@pytest.mark.rule_passes("GK113")
def test_gk113_passes_on_untied_embeddings(twin_of: Twins) -> None:
    assert seen("GK113", twin_of("llama"), {"target_modules": ["embed_tokens", "lm_head"]}).severity is OK


@pytest.mark.rule_fails("GK114")
def test_gk114_a_key_on_a_wrappers_name(twin_of: Twins, tmp_path: Path) -> None:
    model = twin_of(E2B)
    config = {"target_modules": ["self_attn.q_proj.linear"], "rank_pattern": {"q_proj": 4}}
    ranks = {m.r["default"] for m in attach(model, config).modules() if isinstance(m, LoraLayer)}
    assert ranks == {8}
    assert seen("GK114", model, config).severity is ERROR
    better = attach(model, fixed(model, config, "GK114", tmp_path))
    assert {m.r["default"] for m in better.modules() if isinstance(m, LoraLayer)} == {4}


@pytest.mark.rule_fails("GK114")
def test_gk114_a_key_that_means_nothing_has_no_fix(twin_of: Twins, tmp_path: Path) -> None:
    config = {"target_modules": QV, "alpha_pattern": {"qq_proj": 4}}
    report = from_recipe(written(tmp_path, config), gk.survey(twin_of("llama")), ["GK114"])
    found = next(iter(report))
    assert (found.severity, found.fix) == (ERROR, None)
    assert found.file is not None


@pytest.mark.rule_fails("GK117")
def test_gk117_a_role_whose_weights_are_tied(twin_of: Twins) -> None:
    plan = gk.plan(twin_of("gemma2"), targets=["attention", "embeddings"])
    found = observed.seen("GK117", plan=plan)
    assert (found.severity, found.where) == (WARNING, "model.embed_tokens")
    assert found.evidence == {"embeddings": "not_adaptable"}


@pytest.mark.rule_passes("GK117")
def test_gk117_a_role_that_the_model_lacks_is_information(twin_of: Twins) -> None:
    model = twin_of("mixtral")
    found = observed.seen("GK117", plan=gk.plan(model, targets=["attention", "mlp", "experts"]))
    assert (found.severity, found.evidence) == (INFO, {"mlp": "stacked_experts"})
    assert observed.seen("GK117", plan=gk.plan(model, targets=["attention", "experts"])).severity is OK
