"""What a user gets for wrong input: a code, the words that were wrong, where, why and what to do; and no file."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tests.cli.running import Done, graft_each

import graftkit as gk

RECIPE = "model: base\ndata: {path: rows.jsonl}\nargs: {output_dir: out}\n"
RECIPES = {
    "good.yaml": RECIPE,
    "syntax.yaml": "model: [\n",
    "list.yaml": "- model\n",
    "no-data.yaml": RECIPE.replace("rows.jsonl", "rowz.jsonl"),
    "bad-data.yaml": RECIPE.replace("rows.jsonl", "bad.jsonl"),
    "bad-argument.yaml": RECIPE.replace("output_dir: out", "output_dir: out, learning_rat: 1"),
    "bad-key.yaml": RECIPE + "adaptor: {r: 1}\n",
    "bad-columns.yaml": RECIPE + "trainer: dpo\n",
    "bad-trainer.yaml": RECIPE + "trainer: ppo\n",
    "bad-number.yaml": RECIPE + "adapter: {dropout: none at all}\n",
    "no-model.yaml": RECIPE.replace("model: base\n", ""),
    "unknown-model.yaml": RECIPE.replace("base", "lamma"),
}


@dataclass(frozen=True)
class Wrong:
    """A command that cannot be done, the code it ends with, and words of its input that the answer must have."""

    command: str
    code: str
    words: tuple[str, ...]


def _wrong(command: str, code: str, *words: str) -> Wrong:
    return Wrong(command, code, words)


REFUSED = (
    # the command line itself
    _wrong("plann llama", "usage", "plann"),
    _wrong("plan", "usage", "graft plan"),
    _wrong("survey llama --formt json", "usage", "--formt"),
    _wrong("plan llama --rank many", "usage", "many"),
    _wrong("env --format sarif", "format-unsupported", "sarif", "--format"),
    _wrong("plan llama --format sarif", "format-unsupported", "sarif"),
    _wrong("rules GK9999", "rule-unknown", "GK9999"),
    _wrong("rules GK60l", "rule-unknown", "GK60l", "GK60"),
    # a model
    _wrong("survey nowhere/", "not-found", "nowhere/"),
    _wrong("survey config.txt", "not-found", "config.txt"),
    _wrong("survey bsae", "model-type-unknown", "bsae", "base"),
    _wrong("survey lamma", "model-type-unknown", "lamma", "llama"),
    _wrong("survey someone/model", "hub-offline", "someone/model"),
    _wrong("survey broken", "config-corrupt", "broken/config.json"),
    _wrong("survey adapter", "not-a-model-directory", "adapter"),
    _wrong("doctor lamma", "model-type-unknown", "lamma", "llama"),
    # a plan
    _wrong("plan llama --method lorra", "method-unknown", "lorra", "lora"),
    _wrong("plan llama --method prompt_tuning", "method-not-for-layers", "prompt_tuning"),
    _wrong("plan llama -o use_dorra=true", "option-unknown", "use_dorra", "use_dora"),
    _wrong("plan llama -o use_dora", "option-pair", "use_dora"),
    _wrong("plan llama -q 3bit", "quantization-unknown", "3bit", "4bit"),
    _wrong("plan llama --scope langauge", "scope-missing", "langauge", "language"),
    _wrong("plan llama --targets q_prj", "target-unmatched", "q_prj", "q_proj"),
    _wrong("plan llama --rank=-1", "rank-invalid", "-1"),
    _wrong("plan llama --alpha=-2", "alpha-invalid", "-2"),
    _wrong("plan llama --dropout 2", "dropout-invalid", "2"),
    _wrong("plan llama --explain model.nrm", "site-unknown", "model.nrm"),
    # checks on a model
    _wrong("verify", "usage", "graft verify"),
    _wrong("verify base", "weights-missing", "base"),
    _wrong("verify llama", "weights-missing", "llama"),
    _wrong("verify llama --twin --method lorra", "method-unknown", "lorra"),
    _wrong("verify llama --twin --select GK999", "settings", "GK999"),
    _wrong("verify --recipe good.yaml --method dora", "usage", "--recipe"),
    _wrong("verify --recipe gone.yaml", "recipe-not-found", "gone.yaml"),
    _wrong("doctor base --recipe god.yaml", "recipe-not-found", "god.yaml", "good.yaml"),
    _wrong("doctor --adapter nowhere", "adapter-config", "nowhere"),
    _wrong("doctor llama --fix", "usage", "--fix"),
    # training
    _wrong("train", "usage", "graft train"),
    _wrong("train syntax.yaml", "recipe-syntax", "syntax.yaml:2"),
    _wrong("train list.yaml", "recipe-syntax", "list.yaml"),
    _wrong("train no-data.yaml", "not-ready", "no-data.yaml:2", "rowz.jsonl", "rows.jsonl"),
    _wrong("train bad-data.yaml", "data-unreadable", "bad.jsonl"),
    _wrong("train bad-argument.yaml", "recipe-invalid", "bad-argument.yaml:3", "learning_rat", "learning_rate"),
    _wrong("train bad-key.yaml", "recipe-invalid", "bad-key.yaml:4", "adaptor", "adapter"),
    _wrong("train bad-columns.yaml", "data-columns", "rows.jsonl", "dpo", "text"),
    _wrong("train bad-trainer.yaml", "recipe-invalid", "bad-trainer.yaml:4", "ppo", "grpo"),
    _wrong("train bad-number.yaml", "recipe-invalid", "bad-number.yaml:4", "none at all"),
    _wrong("train no-model.yaml", "recipe-invalid", "no-model.yaml", "model"),
    _wrong("train unknown-model.yaml", "not-ready", "lamma", "llama"),
    _wrong("train good.yaml --set args.max_steps", "recipe-override", "args.max_steps"),
    _wrong("train good.yaml --set adapter.r=many", "recipe-invalid", "--set adapter.r", "many"),
    _wrong("init --model base", "usage", "--data"),
    _wrong("init --model base --data rowz.jsonl --out new.yaml", "data-missing", "rowz.jsonl", "rows.jsonl"),
    _wrong("init --model base --data rows.jsonl --out good.yaml", "output-exists", "good.yaml"),
    # adapters
    _wrong("check nowhere", "adapter-not-found", "nowhere"),
    _wrong("check file", "adapter-not-found", "file"),
    _wrong("check base", "adapter-config", "base/adapter_config.json"),
    _wrong("check adapter --base nowhere", "model-type-unknown", "nowhere"),
    _wrong("check adapter --target vlm", "engine-unknown", "vlm", "vllm"),
    _wrong("check adapter --target vllm==new", "engine-version", "new"),
    _wrong("check adapter --select GK999", "settings", "GK999"),
    _wrong("check-merged base --base nowhere --adapter adapter", "model-type-unknown", "nowhere"),
    _wrong("check-merged base --base base", "usage", "--adapter"),
    _wrong("card nowhere", "adapter-not-found", "nowhere"),
    _wrong("convert adapter out --to vlm", "convert-unknown", "vlm", "vllm"),
    _wrong("convert nowhere out --to vllm", "adapter-not-found", "nowhere"),
    _wrong("merge base adapter", "usage", "graft merge"),
    _wrong("merge nowhere adapter out", "not-found", "nowhere"),
    _wrong("merge base nowhere out", "adapter-not-found", "nowhere"),
    _wrong("merge base adapter file", "output-is-a-file", "file"),
    _wrong("merge base adapter base", "merge-same-place", "base"),
    _wrong("merge base out -a adapter -a adapter:0.5", "usage", "adapter"),
    _wrong("rekey nowhere out", "not-found", "nowhere"),
    # engines, servers and the matrix
    _wrong("prove llama --target vlm", "engine-unknown", "vlm", "vllm"),
    _wrong("prove --target vllm", "usage", "graft prove"),
    _wrong("probe http://127.0.0.1:9", "usage", "--adapter"),
    _wrong("probe http://127.0.0.1:9 --adapter nowhere", "adapter-not-found", "nowhere"),
    _wrong("matrix --families lamma", "model-type-unknown", "lamma", "llama"),
    _wrong("matrix --families llama --methods lorra", "method-unknown", "lorra", "lora"),
    _wrong("matrix --families llama --checks mrge", "check-unknown", "mrge", "merge"),
    _wrong("matrix --families llama --all", "usage", "--families", "--all"),
    _wrong("matrix --new-since yesterday", "release-unknown", "yesterday"),
    _wrong("demo --out file", "output-is-a-file", "file"),
)  # fmt: skip
# What only a model, PEFT or a trainer's own arguments can tell; all other commands look before they import.
_DEEP_CODES = {
    "method-unknown", "method-not-for-layers", "option-unknown", "scope-missing", "target-unmatched",
    "site-unknown", "not-ready", "data-unreadable", "data-columns",
}  # fmt: skip
_DEEP_COMMANDS = {
    "verify llama",
    "train bad-argument.yaml",
    "train bad-key.yaml",
    "train bad-number.yaml",
    "train no-model.yaml",
}
DEEP = {wrong.command for wrong in REFUSED if wrong.code in _DEEP_CODES or wrong.command in _DEEP_COMMANDS}
FOUND = (
    _wrong("check pickled", "GK505", "pickled/adapter_model.bin"),
    _wrong("check cut --base base", "GK505", "cut/adapter_model.safetensors"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands are run on: a base without weights, adapters whole and broken, recipes and data."""
    place = tmp_path_factory.mktemp("wrong")
    model: Any = gk.twin("llama")
    model.config.save_pretrained(place / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(place / "adapter")
    for broken in ("pickled", "cut"):
        shutil.copytree(place / "adapter", place / broken)
        weights = place / broken / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    (place / "pickled" / "adapter_model.safetensors").rename(place / "pickled" / "adapter_model.bin")
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{\n")
    (place / "file").write_text("text")
    (place / "rows.jsonl").write_text('{"text": "a"}\n')
    (place / "bad.jsonl").write_text('{"text": "a"\n')
    for name, text in RECIPES.items():
        (place / name).write_text(text)
    return place


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Done]:
    """What came of each command, with ``--json``, by command."""
    commands = [wrong.command for wrong in (*REFUSED, *FOUND)]
    commands.sort(key=lambda command: command in DEEP | {wrong.command for wrong in FOUND})  # one process runs all
    return dict(zip(commands, graft_each([[*shlex.split(c), "--json"] for c in commands], folder), strict=True))


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: wrong.command)
def test_wrong_input_is_refused_with_what_where_why_and_help(wrong: Wrong, answers: dict[str, Done]) -> None:
    done = answers[wrong.command]
    assert done.status == 2, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == wrong.code
    assert all(error[part] and error[part].strip() for part in ("what", "where", "why", "help")), error
    assert [word for word in wrong.words if not any(word in error[part] for part in error)] == []
    assert "Traceback" not in done.stderr
    assert done.changed == ()


@pytest.mark.parametrize("wrong", [w for w in REFUSED if w.command not in DEEP], ids=lambda wrong: wrong.command)
def test_what_a_look_shows_imports_nothing_heavy(wrong: Wrong, answers: dict[str, Done]) -> None:
    assert answers[wrong.command].heavy == ()


@pytest.mark.parametrize("wrong", FOUND, ids=lambda wrong: wrong.command)
def test_a_broken_adapter_is_a_finding_with_where_and_help(wrong: Wrong, answers: dict[str, Done]) -> None:
    done = answers[wrong.command]
    assert done.status == 1, done.stdout + done.stderr
    (finding,) = [f for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"]
    assert finding["code"] == wrong.code
    assert all(finding[part] for part in ("where", "message", "help"))
    assert all(word in finding["where"] for word in wrong.words)
    assert "Traceback" not in done.stderr
    assert done.changed == ()


def test_every_command_is_in_the_table() -> None:
    from graftkit.cli.group import COMMANDS

    assert set(COMMANDS) - {wrong.command.split()[0] for wrong in REFUSED} == set()
