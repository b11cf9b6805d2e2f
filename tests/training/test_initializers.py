"""Initializers that need data get the recipe's, before step 1, and the run ends in files that stock PEFT loads."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.gemma import MODEL
from tests.training.proof import reloaded, run, text_batch
from tests.training.small import (
    docstrings,
    preferences,
    save_model,
    trained_tokenizer,
    word_tokenizer,
    write_recipe,
)
from transformers import TrainerCallback

import graftkit as gk
from graftkit.demo.digits import load_digit_split
from graftkit.demo.evaluation import model_inputs
from graftkit.demo.processor import config_overrides, digit_processor, known_to_transformers
from graftkit.demo.training import train_adapter
from graftkit.demo.training import write_recipe as digit_recipe
from graftkit.errors import AttachError, RecipeError, TrainingError
from graftkit.planning.decisions import LeftAlone
from graftkit.recipes.recipe import read_recipe
from graftkit.training.initialization.kept import INITIAL_NAME
from graftkit.training.result import TrainingResult
from graftkit.training.run import train

ROWS = [{"prompt": signature, "completion": f" {summary}"} for signature, summary in docstrings(32)]
ARGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
}
LN2 = math.log(2)
MOVED = ("corda", "lora_ga", "pissa_niter_2")


@pytest.fixture(scope="module")
def letters() -> Any:
    return trained_tokenizer([], 259)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, letters: Any) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), letters)


def recipe(folder: Path, base: Path, init: str, rows: Any = ROWS, **fields: Any) -> Path:
    options = {"init_lora_weights": init, **fields.pop("options", {})}
    adapter = {"r": 4, "alpha": 8, "options": options, **fields.pop("adapter", {})}
    args = {**ARGS, **fields.pop("args", {})}
    return write_recipe(folder / f"{init}.json", base, rows, adapter=adapter, args=args, **fields)


class Start(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps what a layer is like before the first step, and, where asked to, its inputs on all of the data."""

    def __init__(self, path: str, *, run: bool = True) -> None:
        self._path, self._run = path, run
        self.a = self.b = self.inputs = torch.empty(0)

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **given: Any) -> None:
        model, loader = given["model"], given["train_dataloader"]
        layer = model.get_base_model().get_submodule(self._path)
        self.a = layer.lora_A["default"].weight.detach().clone()
        self.b = layer.lora_B["default"].weight.detach().clone()
        if not self._run:
            return
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
        batch = loader.collate_fn([loader.dataset[at] for at in range(len(loader.dataset))])
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        hook.remove()
        self.inputs = seen[0][batch["labels"] != -100].double()


def first_loss(result: TrainingResult) -> float:
    return result.curve("loss")[0][1]


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_eva_begins_in_the_principal_directions_of_the_data(tmp_path: Path, base: Path, layer: str) -> None:
    """The oracle is a decomposition in float64 of that layer's inputs, where the loss is."""
    start = Start(layer)
    options = {"eva_config": {"rho": 1.0}}
    result = train(read_recipe(recipe(tmp_path, base, "eva", options=options)), callbacks=[start])
    rows = start.inputs
    components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:4]
    overlap = (start.a.double() @ components.T).square().sum() / 4
    assert overlap > 0.9, "the same space, whatever its basis; a random one would have 4 / 64"
    assert not start.b.any()
    assert next(f for f in result.findings if f.code == "GK213").severity == "ok"


def test_layers_that_eva_leaves_without_a_rank_are_named(tmp_path: Path, base: Path, letters: Any) -> None:
    options = {"eva_config": {"rho": 4.0}}
    result, model = run(recipe(tmp_path, base, "eva", options=options, adapter={"r": 1}))
    stock = reloaded(model, base, result.folder, sample(letters))
    assert stock.faithful
    assert result.plan is not None
    adapted = {a.path for a in result.plan.attached}
    assert adapted == {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in stock.tensors}
    found = next(f for f in result.findings if f.code == "GK213")
    assert found.severity == "info"
    left = [s.path for s in result.plan.skipped if s.cause is LeftAlone.NO_RANK]
    assert found.evidence["without_rank"] == left
    assert left


def test_eva_is_another_run_than_plain_lora(tmp_path: Path, base: Path, letters: Any) -> None:
    plain = train(read_recipe(write_recipe(tmp_path / "plain.json", base, ROWS, adapter={"r": 4}, args=ARGS)))
    result, model = run(recipe(tmp_path, base, "eva"))
    assert first_loss(result) == pytest.approx(first_loss(plain), rel=1e-5), "it starts as the same model"
    assert result.curve("loss")[-1][1] != pytest.approx(plain.curve("loss")[-1][1], rel=1e-3)
    assert reloaded(model, base, result.folder, sample(letters)).faithful


def sample(letters: Any) -> dict[str, torch.Tensor]:
    return text_batch(letters, [row["prompt"] + row["completion"] for row in ROWS[:4]])


@pytest.mark.parametrize("init", MOVED)
def test_what_moves_the_base_is_saved_for_the_original_one(
    tmp_path: Path, base: Path, letters: Any, init: str
) -> None:
    plain = train(read_recipe(write_recipe(tmp_path / "plain.json", base, ROWS, args=ARGS)))
    result, model = run(recipe(tmp_path, base, init))
    assert first_loss(result) == pytest.approx(first_loss(plain), rel=1e-4), "it starts as the same model"
    assert result.plan is not None
    assert not result.findings.errors
    stock = reloaded(model, base, result.folder, sample(letters))
    assert stock.faithful
    ranks = {shape[0] for name, shape in stock.tensors.items() if "lora_A" in name}
    assert ranks == {2 * 4}


# PEFT's warning is of its own conversion.
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_patterns_and_whole_modules_survive_the_conversion(
    tmp_path: Path, base: Path, letters: Any, method: str
) -> None:
    """PEFT's own conversion drops the modules, and refuses rsLoRA with patterns."""
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "modules_to_save": ["lm_head"]}
    result, model = run(recipe(tmp_path, base, "lora_ga", options=options, adapter={"method": method}))
    stock = reloaded(model, base, result.folder, sample(letters))
    assert any("lm_head" in name for name in stock.tensors)
    assert stock.faithful


def test_a_stock_configuration_is_initialized_too(tmp_path: Path, base: Path, letters: Any) -> None:
    stock = {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "init_lora_weights": "corda",
        "corda_config": {"corda_method": "kpm"},
    }
    file = write_recipe(tmp_path / "stock.json", base, ROWS, adapter={"peft_config": stock}, args=ARGS)
    text = file.read_text()
    file.write_text(
        text.replace('"targets": "all-linear",', "").replace('"r": 8,', "").replace('"alpha": 16,', "")
    )
    result, model = run(file)
    assert result.plan is None
    assert reloaded(model, base, result.folder, sample(letters)).faithful


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_pictures_initialize_both_towers(tmp_path: Path, init: str) -> None:
    processor, digits = digit_processor(), load_digit_split()
    base, scope = tmp_path / "base", ("language", "vision")
    gk.twin(MODEL, overrides=config_overrides()).save_pretrained(base)
    processor.save_pretrained(base)
    digits.train.select(range(48)).save_to_disk(tmp_path / "train")
    short = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    file = tmp_path / "digits.yaml"
    digit_recipe(file, base=base, data=Path("train"), output=tmp_path / "out", scope=scope, **short)
    with known_to_transformers(processor):
        own = ", eva_config: {rho: 1.0}" if init == "eva" else ""
        changes = ["adapter.r=2", f"adapter.options={{init_lora_weights: {init}{own}}}"]
        result, model = train_adapter(read_recipe(file, changes))
    assert result.plan is not None
    assert {a.site.tower for a in result.plan.attached} == {"language", "vision"}
    assert next(f for f in result.findings if f.code == "GK213").severity == "ok"
    stock = reloaded(model, base, result.folder, model_inputs(processor, digits.held_out[:4]))
    assert stock.same
    # float32's rounding, through two towers.
    assert stock.off < 1e-3 * stock.effect


def test_eva_on_a_quantized_base(tmp_path: Path, base: Path, letters: Any) -> None:
    pytest.importorskip("bitsandbytes")
    start = Start("model.layers.0.self_attn.q_proj", run=False)
    options = {"eva_config": {"rho": 1.0}}
    file = recipe(tmp_path, base, "eva", options=options, quantization="4bit")
    result = train(read_recipe(file), callbacks=[start])
    assert start.a.dtype is torch.bfloat16, "TRL's type for an adapter on a quantized base"
    assert torch.allclose(start.a.float().norm(dim=1), torch.ones(4), atol=0.01)
    assert next(f for f in result.findings if f.code == "GK213").severity == "ok"


def test_preferences_begin_at_their_reference_with_eva(tmp_path: Path, base: Path) -> None:
    file = recipe(tmp_path, base, "eva", preferences(16), trainer="dpo", args={"per_device_train_batch_size": 4})
    result, model = run(file)
    assert first_loss(result) == pytest.approx(LN2, abs=1e-4)
    assert list(model.peft_config) == ["default"]


def test_prompts_initialize_a_reinforced_run(tmp_path: Path) -> None:
    words = word_tokenizer([*map(str, range(19)), "+", "="])
    base = save_model(tmp_path / "base", words)
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(6) for b in range(6)]
    args = {"max_steps": 1, "num_generations": 4, "max_completion_length": 2, "beta": 0.01}
    options = {"eva_config": {"rho": 1.0, "tau": 0.5}}
    file = recipe(
        tmp_path, base, "eva", rows, trainer="grpo", data={"reward": "number_match"}, args=args, options=options
    )
    result = train(read_recipe(file))
    assert result.curve("kl")[0][1] == pytest.approx(0, abs=1e-5), "the reference is where it starts"
    assert next(f for f in result.findings if f.code == "GK213").severity == "ok"


@pytest.mark.parametrize("init", ["eva", *MOVED[:2]])
def test_a_resumed_run_goes_on_as_it_would_have(tmp_path: Path, base: Path, init: str) -> None:
    file = recipe(tmp_path, base, init, args={"save_strategy": "steps", "save_steps": 2})
    whole = train(read_recipe(file))
    saved = (whole.folder / "adapter_model.safetensors").read_bytes()
    assert (whole.folder / "checkpoint-2" / INITIAL_NAME).is_file() is (init != "eva")
    shutil.rmtree(whole.folder / "checkpoint-4")
    again = train(read_recipe(file), resume=True)
    assert [value for _, value in again.curve("loss")] == [value for _, value in whole.curve("loss")]
    assert (again.folder / "adapter_model.safetensors").read_bytes() == saved
    assert again.plan is not None
    assert whole.plan is not None
    assert again.plan.trainable_params == whole.plan.trainable_params


def test_a_checkpoint_without_the_initial_values_is_not_resumed(tmp_path: Path, base: Path) -> None:
    file = recipe(tmp_path, base, "lora_ga", args={"save_strategy": "steps", "save_steps": 2, "max_steps": 2})
    result = train(read_recipe(file))
    (result.folder / "checkpoint-2" / INITIAL_NAME).unlink()
    with pytest.raises(TrainingError) as caught:
        train(read_recipe(file, ["args.max_steps=4"]), resume=True)
    assert caught.value.code == "cannot-resume"


@pytest.mark.parametrize(
    ("init", "trainer", "args"),
    [
        pytest.param("lora_ga", "dpo", {}, id="reference"),
        pytest.param("pissa", "dpo", {}, id="reference, without data"),
        pytest.param("corda", "grpo", {}, id="prompts"),
        pytest.param("pissa", "grpo", {"beta": 0.1}, id="reference of grpo"),
    ],
)
def test_what_cannot_begin_is_refused_before_anything_is_loaded(
    tmp_path: Path, base: Path, init: str, trainer: str, args: dict[str, Any]
) -> None:
    """The base has no weights, which would be the error if it were loaded."""
    empty = shutil.copytree(base, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    data = {"reward": "number_match"} if trainer == "grpo" else {}
    with pytest.raises(RecipeError) as caught:
        train(read_recipe(recipe(tmp_path, empty, init, trainer=trainer, args=args, data=data)))
    assert caught.value.code == "initializer"
    assert caught.value.where is not None
    assert f"{init}.json:" in caught.value.where


def test_data_that_cannot_initialize_is_refused_before_the_first_step(tmp_path: Path, base: Path) -> None:
    """One row of a few letters has fewer tokens than EVA looks for components."""
    rows = [{"prompt": "def a():", "completion": " b"}]
    with pytest.raises(AttachError) as caught:
        train(read_recipe(recipe(tmp_path, base, "eva", rows, adapter={"r": 16})))
    assert caught.value.code == "initialize-few"
