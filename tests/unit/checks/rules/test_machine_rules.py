"""The rules on libraries, the machine, files and the trainer, with recipes for machines that have them or not."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.training.small import word_tokenizer
from tests.unit.checks.observed import seen

import graftkit as gk
from graftkit.env import Machine, this_machine
from graftkit.recipes.recipe import Recipe, read_recipe

ERROR, INFO, OK = gk.Severity.ERROR, gk.Severity.INFO, gk.Severity.OK
CPU = Machine(None, bf16=False)
AMPERE = Machine("cuda", bf16=True)
OLDER = Machine("cuda", bf16=False)
MAC = Machine("mps", bf16=True)


def recipe(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(f"model: qwen3\n{text}")
    return read_recipe(folder / "recipe.yaml")


def found(code: str, folder: Path, text: str, machine: Machine | None = None) -> Any:
    return seen(code, recipe=recipe(folder, text), machine=machine or this_machine())


def faults(finding: Any) -> list[str]:
    return [fault["code"] for fault in finding.evidence.get("faults", ())]


def without(package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")


# ---- GK004 ----


@pytest.mark.rule_fails("GK004")
def test_gk004_all_that_is_missing_with_its_line(tmp_path: Path) -> None:
    without("liger_kernel")
    without("vllm")
    finding = found("GK004", tmp_path, "trainer: grpo\nargs:\n  use_liger_kernel: true\n  use_vllm: true\n")
    assert finding.severity is ERROR
    assert [(f["code"], f["line"]) for f in finding.evidence["faults"]] == [("missing", 4), ("missing", 5)]
    assert (finding.line, "liger-kernel" in str(finding.help)) == (4, True)


@pytest.mark.rule_passes("GK004")
def test_gk004_passes_on_what_is_here(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    assert found("GK004", tmp_path, "args: {use_liger_kernel: false}\n").severity is OK


# ---- GK005 ----


@pytest.mark.rule_fails("GK005")
@pytest.mark.parametrize(
    ("text", "machine", "expected"),
    [
        pytest.param("args: {fp16: true}", CPU, ["fp16-on-cpu"], id="fp16 on a CPU"),
        pytest.param("args: {fp16: true, use_cpu: true}", AMPERE, ["fp16-on-cpu"], id="fp16 on a CPU by choice"),
        pytest.param("args: {use_cpu: false}", CPU, ["bf16-without-accelerator"], id="no GPU, and no CPU wanted"),
        pytest.param(
            "args: {deepspeed: {train_batch_size: 1}}", CPU, ["bf16-without-accelerator"], id="DeepSpeed on a CPU"
        ),
        pytest.param("args: {max_steps: 1}", OLDER, ["no-bf16"], id="TRL's default on a GPU without it"),
        pytest.param("args: {bf16: true}", Machine("mps", bf16=False), ["no-bf16"], id="an older Mac"),
        pytest.param(
            "adapter: {options: {init_lora_weights: loftq}}", CPU, ["loftq-without-gpu"], id="LoftQ without a GPU"
        ),
        pytest.param(
            "adapter: {peft_config: {init_lora_weights: LoftQ}}", MAC, ["loftq-without-gpu"], id="LoftQ on a Mac"
        ),
        pytest.param(
            "args: {fp16: true}\nadapter: {options: {init_lora_weights: loftq}}",
            CPU,
            ["fp16-on-cpu", "loftq-without-gpu"],
            id="both",
        ),
    ],
)
def test_gk005_what_a_machine_cannot_do(tmp_path: Path, text: str, machine: Machine, expected: list[str]) -> None:
    finding = found("GK005", tmp_path, text, machine)
    assert (finding.severity, faults(finding), finding.line) == (ERROR, expected, 2)
    assert finding.help


@pytest.mark.rule_passes("GK005")
@pytest.mark.parametrize(
    ("text", "machine"),
    [
        pytest.param("", CPU, id="TRL's defaults on a CPU"),
        pytest.param("args: {bf16: true}", CPU, id="bf16 on a CPU"),
        pytest.param("args: {bf16: false, use_cpu: false}", CPU, id="fp32"),
        pytest.param("", AMPERE, id="TRL's defaults on a GPU"),
        pytest.param("args: {fp16: true}", OLDER, id="fp16 on an older GPU"),
        pytest.param("args: {fp16: true}", MAC, id="fp16 on a Mac"),
        pytest.param("adapter: {options: {init_lora_weights: loftq}}", AMPERE, id="LoftQ on a GPU"),
        pytest.param("adapter: {options: {init_lora_weights: false}}", CPU, id="an initializer that is no name"),
        pytest.param("args: {model_init_kwargs: {attn_implementation: sdpa}}", CPU, id="sdpa"),
        pytest.param("args: {model_init_kwargs: {attn_implementation: eager}}", CPU, id="eager"),
    ],
)
def test_gk005_passes_on_what_it_can(tmp_path: Path, text: str, machine: Machine) -> None:
    assert found("GK005", tmp_path, text, machine).severity is OK


@pytest.mark.rule_fails("GK005")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_atention"])
def test_gk005_attention_that_transformers_refuses(tmp_path: Path, name: str) -> None:
    for package in ("flash_attn", "flash_attn_interface", "kernels"):
        without(package)
    text = f"args:\n  model_init_kwargs:\n    attn_implementation: {name}\n"
    finding = found("GK005", tmp_path, text)
    assert (finding.severity, faults(finding), finding.line) == (ERROR, ["attention"], 4)
    assert "sdpa" in str(finding.help)


# ---- GK006 ----


@pytest.mark.rule_fails("GK006")
@pytest.mark.parametrize(
    ("data", "code", "meant"),
    [
        pytest.param("trian.jsonl", "data-missing", "train.jsonl", id="a file"),
        pytest.param("sub/train.json", "data-missing", None, id="a folder that is not there"),
        pytest.param("./sonds", "data-missing", "sounds", id="a folder"),
        pytest.param("sounds/train", "data-missing", None, id="a file in a folder that is there"),
        pytest.param("owner/name", "data-unreachable", "hf download", id="a dataset of the hub"),
        pytest.param("sonds", "data-unreachable", "sounds", id="a bare name"),
    ],
)
def test_gk006_data_that_is_not_there(tmp_path: Path, data: str, code: str, meant: str | None) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "sounds").mkdir()
    finding = found("GK006", tmp_path, f"data: {{path: {data}}}\nargs: {{output_dir: {tmp_path}}}\n")
    assert (finding.severity, faults(finding), finding.line) == (ERROR, [code], 2)
    assert meant is None or meant in str(finding.help)


@pytest.mark.rule_fails("GK006")
def test_gk006_all_that_is_missing_with_its_line(tmp_path: Path) -> None:
    text = (
        "data:\n  path: a.jsonl\n  eval_path: b.jsonl\nargs:\n  deepspeed: zero.json\n"
        "  chat_template_path: chat.jinja\n  output_dir: {}/recipe.yaml/out\n"
    )
    finding = found("GK006", tmp_path, text.format(tmp_path))
    assert [(f["code"], f["line"]) for f in finding.evidence["faults"]] == [
        ("data-missing", 3),
        ("data-missing", 4),
        ("file-missing", 6),
        ("file-missing", 7),
        ("output", 8),
    ]


@pytest.mark.rule_fails("GK006")
def test_gk006_an_adapter_that_the_disk_cannot_hold(tmp_path: Path) -> None:
    made = recipe(tmp_path, f"data: {{path: recipe.yaml}}\nargs: {{output_dir: {tmp_path}}}\n")
    # A plan of more bytes than any disk here has: 2 r is the width of a linear's factors.
    rank = shutil.disk_usage(tmp_path).total // 2_000_000
    plan = gk.plan("qwen3", targets="all-linear", r=rank)
    assert faults(seen("GK006", recipe=made, machine=CPU, plan=plan)) == ["disk-full"]
    small = gk.plan("qwen3", targets="all-linear", r=1)
    assert seen("GK006", recipe=made, machine=CPU, plan=small).severity is OK


@pytest.mark.rule_passes("GK006")
def test_gk006_passes_where_all_is_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "zero.json").write_text("{}")
    text = f"data: {{path: train.jsonl}}\nargs: {{deepspeed: zero.json, output_dir: {tmp_path}/new/out}}\n"
    assert found("GK006", tmp_path, text).severity is OK


def test_gk006_a_recipe_without_data_may_get_it_later(tmp_path: Path) -> None:
    assert found("GK006", tmp_path, f"args: {{output_dir: {tmp_path}}}\n").severity is INFO


# ---- GK007 ----


@pytest.mark.rule_fails("GK007")
@pytest.mark.parametrize(
    ("text", "keys"),
    [
        pytest.param("trainer: grpo\ndata: {path: x.jsonl}\n", ["data.reward"], id="grpo without a reward"),
        pytest.param("trainer: grpo\ndata: {reward: exact_mach}\n", ["data.reward"], id="no such reward"),
        pytest.param("trainer: grpo\ndata: {reward: 'none_here:f'}\n", ["data.reward"], id="no such module"),
        pytest.param("args: {report_to: no_tracker}\n", ["args.report_to"], id="no such tracker"),
        pytest.param("args: {eval_strategy: sometimes}\n", ["args"], id="no such value"),
        pytest.param("args: {learning_rate: fast}\n", ["args.learning_rate"], id="a word for a number"),
        pytest.param("args: {max_steps: [1]}\n", ["args.max_steps"], id="a list for a number"),
        pytest.param(
            "trainer: grpo\nargs: {report_to: no_tracker, num_generations: 1}\n",
            ["data.reward", "args", "args.report_to"],
            id="all at once",
        ),
    ],
)
def test_gk007_what_the_trainer_refuses(tmp_path: Path, text: str, keys: list[str]) -> None:
    pytest.importorskip("trl")
    finding = found("GK007", tmp_path, text)
    assert finding.severity is ERROR
    assert [fault["key"] for fault in finding.evidence["faults"]] == keys


@pytest.mark.rule_fails("GK007")
@pytest.mark.parametrize(
    ("package", "text"),
    [
        ("wandb", "args: {report_to: [wandb]}\n"),
        ("galore_torch", "args: {optim: galore_adamw, optim_target_modules: all-linear}\n"),
        ("lomo_optim", "args: {optim: lomo}\n"),
        ("torchao", "args: {optim: adamw_torch_4bit}\n"),
    ],
)
def test_gk007_libraries_of_trackers_and_optimizers(tmp_path: Path, package: str, text: str) -> None:
    pytest.importorskip("trl")
    without(package)
    assert found("GK007", tmp_path, text).severity is ERROR


@pytest.mark.rule_passes("GK007")
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="defaults"),
        pytest.param("args: {bf16: true, max_steps: 3, report_to: all, optim: adafactor}\n", id="values"),
        pytest.param("args: {learnig_rate: 3}\n", id="a name that it has not, which GK212 says"),
        pytest.param("trainer: grpo\ndata: {reward: ['number_match', 'mine:f']}\n", id="rewards"),
    ],
)
def test_gk007_passes_on_what_it_takes(tmp_path: Path, text: str) -> None:
    pytest.importorskip("trl")
    (tmp_path / "mine.py").write_text("raise SystemExit('a check runs nothing of the user')\n")
    assert found("GK007", tmp_path, text).severity is OK


@pytest.mark.rule_fails("GK007")
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"messages": [{"role": "user", "content": "1 + 1"}]}, ["no-chat-template"], id="messages"),
        pytest.param(
            {"prompt": [{"role": "user", "content": "1 + 1"}]}, ["no-chat-template"], id="a prompt of them"
        ),
        pytest.param({"prompt": "1 + 1 ="}, [], id="plain text"),
    ],
)
def test_gk007_messages_and_no_chat_template(tmp_path: Path, row: dict[str, Any], expected: list[str]) -> None:
    pytest.importorskip("trl")
    given = {"recipe": recipe(tmp_path, "args: {report_to: no_tracker}\n"), "machine": CPU, "rows": lambda: [row]}
    tokenizer = word_tokenizer(["1", "+"])
    assert faults(seen("GK007", processor=tokenizer, **given)) == [*expected, "arguments"]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert faults(seen("GK007", processor=tokenizer, **given)) == ["arguments"]


@pytest.mark.rule_fails("GK007")
def test_gk007_a_class_that_generates_nothing(tmp_path: Path) -> None:
    given = {"recipe": recipe(tmp_path, ""), "machine": this_machine()}
    assert faults(seen("GK007", base=gk.survey("bert"), **given)) == ["no-generation"]
    assert faults(seen("GK007", base=gk.survey("whisper"), **given)) == []
