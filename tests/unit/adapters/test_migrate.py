"""Adapters that other tools saved load in stock PEFT after a migration, and compute the same."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftkit as gk
from graftkit.adapters.migrate import RECORD_NAME, migrate
from graftkit.adapters.trained_bounds import METADATA_KEY, TrainedBounds
from graftkit.attaching.enable import enable
from graftkit.checks.probes.forward import logits_of
from graftkit.errors import AdapterError, OutputError

E2B = "google/gemma-4-E2B-it"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INNER_TO_WRAPPER = (".linear.lora_", ".lora_")


@pytest.fixture
def base(e2b: nn.Module) -> nn.Module:
    return e2b


def trained(base: nn.Module, folder: Path, config: Any) -> Tensor:
    """Save an adapter on inner linears with a large effect; its logits on the example batch."""
    torch.manual_seed(0)
    with enable():
        adapted = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    adapted.save_pretrained(folder)
    return logits_of(adapted, gk.example_batch(base))


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def rename(folder: Path, before: str, after: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({k.replace(before, after): v for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def loaded(base: nn.Module, folder: Path) -> Any:
    """In stock PEFT, where a warning is an error: no key may be missing."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder)


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        return dict(file.metadata())


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return len(first) == len(second) and all(
        torch.equal(x, y) for x, y in zip(first.values(), second.values(), strict=True)
    )


def test_a_redirect(base: nn.Module, tmp_path: Path) -> None:
    """Like unsloth with vision layers, and axolotl: only the configuration names wrappers."""
    expected = trained(
        base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    )
    edit(tmp_path / "in", target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match="is not supported"):
        loaded(base, tmp_path / "in")
    result = migrate(tmp_path / "in", base, tmp_path / "out")
    assert torch.equal(logits_of(loaded(base, tmp_path / "out"), gk.example_batch(base)), expected)
    assert not result.renamed
    assert {item.field for item in result.rewritten} == {"target_modules", "rank_pattern"}
    assert (tmp_path / "in" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_a_replacement(base: nn.Module, tmp_path: Path) -> None:
    """Like FAI-RL: the adapter layer replaced the wrapper."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 16})
    expected = trained(base, tmp_path / "in", config)
    edit(tmp_path / "in", target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 16})
    rename(tmp_path / "in", *INNER_TO_WRAPPER)
    result = migrate(tmp_path / "in", base, tmp_path / "out", trained_without_clamp=False)
    assert torch.equal(logits_of(loaded(base, tmp_path / "out"), gk.example_batch(base)), expected)
    assert result.renamed
    assert all(".linear.lora_" in item.after and item.why for item in result.renamed)
    assert metadata(tmp_path / "out") == {"format": "pt", METADATA_KEY: "kept"}
    written = load_file(tmp_path / "out" / WEIGHTS)
    back = {item.after: item.before for item in result.renamed}
    read = load_file(tmp_path / "in" / WEIGHTS)
    assert {back.get(name, name) for name in written} == set(read)
    assert all(torch.equal(tensor, read[back.get(name, name)]) for name, tensor in written.items())


def test_a_shim(base: nn.Module, tmp_path: Path) -> None:
    """The names contain a module that the tool inserted."""
    expected = trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    edit(tmp_path / "in", target_modules=r".*q_proj\.wrapped")
    rename(tmp_path / "in", ".linear.lora_", ".wrapped.lora_")
    migrate(tmp_path / "in", base, tmp_path / "out", trained_without_clamp=False)
    assert torch.equal(logits_of(loaded(base, tmp_path / "out"), gk.example_batch(base)), expected)


TUNERS = [
    pytest.param(lambda **o: peft.LoHaConfig(r=2, **o), "hada_", id="loha"),
    pytest.param(lambda **o: peft.LoKrConfig(r=2, **o), "lokr_", id="lokr"),
    pytest.param(lambda **o: peft.OFTConfig(oft_block_size=4, **o), "oft_", id="oft"),
    pytest.param(lambda **o: peft.IA3Config(feedforward_modules=["down_proj"], **o), "ia3_", id="ia3"),
    pytest.param(lambda **o: peft.VeraConfig(r=2, **o), "vera_", id="vera"),
    pytest.param(lambda **o: LoraConfig(r=2, use_dora=True, **o), "lora_", id="dora"),
]


@pytest.mark.parametrize(("make", "prefix"), TUNERS)
def test_other_tuners(base: nn.Module, tmp_path: Path, make: Callable[..., Any], prefix: str) -> None:
    targets = ["q_proj", "v_proj"] if prefix == "vera_" else ["q_proj", "down_proj"]
    expected = trained(base, tmp_path / "in", make(target_modules=targets))
    fields = {"feedforward_modules": ["down_proj"]} if prefix == "ia3_" else {}
    edit(tmp_path / "in", target_modules=targets, **fields)
    rename(tmp_path / "in", f".linear.{prefix}", f".{prefix}")
    migrate(tmp_path / "in", base, tmp_path / "out", trained_without_clamp=False)
    assert torch.equal(logits_of(loaded(base, tmp_path / "out"), gk.example_batch(base)), expected)


def test_a_pattern_that_was_never_applied_is_read_from_the_tensors(base: nn.Module, tmp_path: Path) -> None:
    """Keys on wrappers match nothing while inner linears are targeted: such an adapter has the default rank."""
    expected = trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    edit(tmp_path / "in", target_modules=[".*"], rank_pattern={"vision_tower.*q_proj": 7})
    migrate(tmp_path / "in", base, tmp_path / "out")
    again = PeftModel.from_pretrained.__func__  # the pattern stays, and PEFT warns that it matches nothing
    with pytest.warns(RuntimeWarning, match="did not match any"):
        adapted = again(PeftModel, copy.deepcopy(base), tmp_path / "out")
    assert torch.equal(logits_of(adapted, gk.example_batch(base)), expected)


def test_ranks_that_no_pattern_explains(base: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 3})
    expected = trained(base, tmp_path / "in", config)
    edit(tmp_path / "in", target_modules=["q_proj"], rank_pattern={})
    result = migrate(tmp_path / "in", base, tmp_path / "out")
    assert "rank_pattern" in {item.field for item in result.rewritten}
    assert torch.equal(logits_of(loaded(base, tmp_path / "out"), gk.example_batch(base)), expected)


def test_filters_that_contradict_the_tensors_go(base: nn.Module, tmp_path: Path) -> None:
    expected = trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    edit(tmp_path / "in", target_modules=["q_proj"], exclude_modules=r".*\.linear", layers_to_transform=[0])
    migrate(tmp_path / "in", base, tmp_path / "out")
    assert torch.equal(logits_of(loaded(base, tmp_path / "out"), gk.example_batch(base)), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {"target_modules": ["q_proj", "up_proj"]}, id="plain"),
        pytest.param(
            "llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, id="saved modules"
        ),
        pytest.param("llama", {"target_modules": ["embed_tokens"]}, id="embedding"),
        pytest.param(
            "mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}, id="experts"
        ),
        pytest.param(E2B, {"target_modules": "all-linear"}, id="towers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_stock_peft_loads_already_is_left_alone(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model = twin_of(name)
    get_peft_model(twin_of(name), LoraConfig(r=2, **options)).save_pretrained(tmp_path / "in")
    result = migrate(tmp_path / "in", model, tmp_path / "out")
    assert not result.changed, str(result)
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads(
        (tmp_path / "in" / CONFIG).read_text()
    )
    assert same_tensors(tmp_path / "in", tmp_path / "out")


def test_moshi(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = twin_of("moshi")
    expected = trained(model, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    edit(tmp_path / "in", target_modules=["q_proj"])
    rename(tmp_path / "in", *INNER_TO_WRAPPER)
    migrate(tmp_path / "in", model, tmp_path / "out")
    assert torch.equal(logits_of(loaded(model, tmp_path / "out"), gk.example_batch(model)), expected)


def test_the_record_and_the_companions(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    edit(tmp_path / "in", target_modules=["q_proj"])
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "in" / "checkpoint-1").mkdir()
    result = migrate(tmp_path / "in", gk.survey(base), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "tokenizer.json", CONFIG, WEIGHTS, RECORD_NAME}
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    assert record == result.to_dict()
    assert record["schema_version"] == 1
    assert "target_modules" in str(result)
    # Again: an earlier migration is replaced, and it is stock by now.
    assert not migrate(tmp_path / "out", base).changed
    migrate(tmp_path / "in", base, tmp_path / "out")


# ---- trained with the clamps, or without ----


def in_place_of_wrappers(base: nn.Module, folder: Path) -> Path:
    trained(base, folder, LoraConfig(r=2, target_modules=["q_proj"]))
    edit(folder, target_modules=["q_proj"])
    rename(folder, *INNER_TO_WRAPPER)
    return folder


def bounds_are(base: nn.Module, value: float) -> nn.Module:
    model = copy.deepcopy(base)
    for name, buffer in model.named_buffers():
        if name.endswith(("put_min", "put_max")):
            buffer.fill_(-value if name.endswith("min") else value)
    return model


def test_names_in_the_place_of_wrappers_leave_the_clamp_unknown(base: nn.Module, tmp_path: Path) -> None:
    folder = in_place_of_wrappers(base, tmp_path / "in")
    with pytest.warns(UserWarning, match="GK509"):
        result = migrate(folder, base, tmp_path / "out")
    assert result.bounds is TrainedBounds.UNKNOWN
    assert result.to_dict()["bounds"] == "unknown"
    assert metadata(tmp_path / "out") == {"format": "pt", METADATA_KEY: "unknown"}
    # By now the names are the linears' own: only the metadata knows.
    assert migrate(tmp_path / "out", base).bounds is TrainedBounds.UNKNOWN
    assert migrate(folder, base).bounds is TrainedBounds.UNKNOWN, "no warning where nothing is written"


@pytest.mark.parametrize(
    ("without", "bounds"), [(True, TrainedBounds.REMOVED), (False, TrainedBounds.KEPT)], ids=["without", "with"]
)
def test_what_the_user_knows_is_stated_and_can_be_changed(
    base: nn.Module, tmp_path: Path, without: bool, bounds: TrainedBounds
) -> None:
    folder = in_place_of_wrappers(base, tmp_path / "in")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        result = migrate(folder, base, tmp_path / "one", trained_without_clamp=without)
        again = migrate(tmp_path / "one", base, tmp_path / "two", trained_without_clamp=not without)
    assert len(raised) == 1, "one of the two was trained without the clamp"
    assert result.bounds is bounds
    assert again.bounds is not bounds
    assert metadata(tmp_path / "one")[METADATA_KEY] == bounds
    assert metadata(tmp_path / "two")[METADATA_KEY] == again.bounds
    assert same_tensors(tmp_path / "one", tmp_path / "two")
    assert result.wrappers
    assert {f"{path}.linear" for path in result.wrappers} == {
        site.path for site in gk.survey(base) if site.wrapper and site.path.endswith("q_proj.linear")
    }


def test_an_adapter_on_inner_linears_can_be_stated_too(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    assert migrate(tmp_path / "in", base).bounds is None
    with pytest.warns(UserWarning, match="GK509"):
        result = migrate(tmp_path / "in", base, tmp_path / "out", trained_without_clamp=True)
    assert (result.changed, result.bounds) == (False, TrainedBounds.REMOVED)
    assert metadata(tmp_path / "out")[METADATA_KEY] == "removed"
    assert same_tensors(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("without", [None, True])
def test_a_base_without_finite_bounds_has_no_clamp(base: nn.Module, tmp_path: Path, without: bool | None) -> None:
    folder, unbounded = in_place_of_wrappers(base, tmp_path / "in"), bounds_are(base, math.inf)
    result = migrate(folder, unbounded, tmp_path / "out", trained_without_clamp=without)
    assert result.bounds is None
    assert metadata(tmp_path / "out") == {"format": "pt"}


def test_bounds_that_no_weights_tell_may_be_finite(base: nn.Module, tmp_path: Path) -> None:
    folder = in_place_of_wrappers(base, tmp_path / "in")
    with torch.device("meta"):
        empty = type(base)(base.config)
    assert migrate(folder, empty).bounds is TrainedBounds.UNKNOWN


# ---- refusals leave nothing behind ----


def test_another_base(base: nn.Module, twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError) as caught:
        migrate(tmp_path / "in", twin_of("llama"), tmp_path / "out")
    assert caught.value.code == "adapter-does-not-fit"
    assert next(iter(load_file(tmp_path / "in" / WEIGHTS))) in str(caught.value.why)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_size(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError) as caught:
        migrate(tmp_path / "in", E2B)
    assert caught.value.code == "adapter-does-not-fit"
    assert str(list(next(iter(load_file(tmp_path / "in" / WEIGHTS).values())).shape)) in str(caught.value.why)


def test_two_tensors_for_one_place(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    doubled = {k.replace(*INNER_TO_WRAPPER): v.clone() for k, v in tensors.items()}
    save_file({**tensors, **doubled}, tmp_path / "in" / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        migrate(tmp_path / "in", base)
    assert caught.value.code == "adapter-does-not-fit"
    assert all(name in str(caught.value.why) for name in list(doubled)[:1])


@pytest.mark.parametrize(
    "where", [pytest.param(".", id="same"), pytest.param("sub", id="inside"), pytest.param("..", id="around")]
)
def test_never_in_place(base: nn.Module, tmp_path: Path, where: str) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError) as caught:
        migrate(tmp_path / "in", base, tmp_path / "in" / where)
    assert caught.value.code == "adapter-in-place"


def test_somebody_elses_folder_is_kept(base: nn.Module, tmp_path: Path) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    trained(base, tmp_path / "out", LoraConfig(r=2, target_modules=["k_proj"]))
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    with pytest.raises(OutputError):
        migrate(tmp_path / "in", base, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"target_modules": 7}, id="a number"),
        pytest.param({"target_modules": [7]}, id="a list of numbers"),
        pytest.param({"target_modules": "("}, id="no regex"),
        pytest.param({"target_modules": ["q_proj"], "rank_pattern": {"(": 3}}, id="no pattern"),
        pytest.param({"target_modules": ["q_proj"], "rank_pattern": [3]}, id="a pattern that is a list"),
        pytest.param({"peft_type": "NO_SUCH"}, id="no such method"),
    ],
)
def test_a_configuration_that_makes_no_sense(base: nn.Module, tmp_path: Path, fields: dict[str, Any]) -> None:
    trained(base, tmp_path / "in", LoraConfig(r=2, target_modules=["q_proj"]))
    edit(tmp_path / "in", **fields)
    with pytest.raises(AdapterError) as caught:
        migrate(tmp_path / "in", base, tmp_path / "out")
    assert caught.value.code == "adapter-config"
    assert not (tmp_path / "out").exists()
