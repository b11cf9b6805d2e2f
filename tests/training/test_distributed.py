"""Several processes train the adapter that one would train, or are refused before they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.proof import loads_in_stock_peft
from tests.training.small import (
    save_model,
    started,
    wait_for,
    word_tokenizer,
    write_recipe,
)

import graftkit as gk
from graftkit.adapters.record import read_record
from graftkit.recipes.recipe import read_recipe
from graftkit.surveying.sources.load_config import load_config
from graftkit.training.result import TrainingResult
from graftkit.training.run import train

pytestmark = pytest.mark.distributed
without_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="needs a machine without an accelerator"
)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

PROCESSES = 2
# 96 rows are trained on and 4 held out: both can be shared out evenly, so that no row counts twice.
SUMS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
ARGS = {"max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 3}
BATCH = 8
ALIKE = ["--num_machines=1", "--dynamo_backend=no", f"--num_processes={PROCESSES}"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), words())


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """Return what one process makes of the same batches."""
    return trained_alone(tmp_path_factory.mktemp("alone"), base)


def words() -> Any:
    return word_tokenizer([*map(str, range(19)), "+", "="])


def trained_alone(folder: Path, base: Path, **fields: Any) -> TrainingResult:
    return train(read_recipe(recipe(folder, base, BATCH, **fields)))


def recipe(folder: Path, base: Path, batch: int = BATCH // PROCESSES, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    args = {**ARGS, "per_device_train_batch_size": batch, **fields.pop("args", {})}
    return write_recipe(folder / "sft.yaml", base, SUMS, data={"eval_share": 0.04}, args=args, **fields)


def launched(file: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` of the command."""
    words = [sys.executable, "-m", "accelerate.commands.launch", *ALIKE, *flags]
    return ran([*words, "--module", "graftkit.cli.main", "train", str(file), "--json"], file.parent, environment)


def ran(words: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=500,
        check=False,
    )


def output_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON of the first process; a launcher may print lines before it."""
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return result


def agrees(done: subprocess.CompletedProcess[str], alone: TrainingResult, base: Path) -> None:
    """Check that losses and the adapter's shapes are the same, in files that stock PEFT takes."""
    assert done.returncode == 0, done.stderr
    seen = output_of(done)
    losses = [entry["loss"] for entry in seen["history"] if "loss" in entry]
    assert losses == pytest.approx([loss for _, loss in alone.curve("loss")], rel=1e-4)
    assert seen["metrics"]["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=1e-3)
    assert seen["summary"]["error"] == 0
    folder = Path(seen["folder"])
    assert (folder / "report.html").is_file()
    theirs, ours = (loads_in_stock_peft(base, place) for place in (folder, alone.folder))
    assert theirs.tensors == ours.tensors
    assert theirs.faithful
    assert theirs.effect == pytest.approx(ours.effect, rel=1e-2)


def answers_of(folder: Path) -> list[float]:
    """Return the log-probabilities that the adapter's record expects."""
    record = read_record(folder)
    assert record is not None
    assert record.expected is not None
    return [value for prompt in record.expected.prompts for value in prompt.base]


def test_launch_starts_processes_that_agree_with_one(tmp_path: Path, base: Path, alone: TrainingResult) -> None:
    done = launched_by_graft(recipe(tmp_path, base))
    agrees(done, alone, base)
    assert answers_of(Path(output_of(done)["folder"])) == pytest.approx(answers_of(alone.folder), abs=0.05)
    json.loads(done.stdout)  # the first process alone speaks
    assert done.stderr.count("loading the model") == 1


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_processes_compute_the_same_initial_values(tmp_path: Path, base: Path, init: str) -> None:
    adapter = {"r": 4, "options": {"init_lora_weights": init}}
    args = {"gradient_accumulation_steps": PROCESSES}
    alone = train(read_recipe(recipe(tmp_path / "alone", base, BATCH // PROCESSES, adapter=adapter, args=args)))
    agrees(launched_by_graft(recipe(tmp_path / "launched", base, adapter=adapter)), alone, base)


def test_accelerate_launch_of_ddp(tmp_path: Path, base: Path, alone: TrainingResult) -> None:
    done = launched(recipe(tmp_path, base), "--multi_gpu")
    agrees(done, alone, base)


def test_ctrl_c_stops_all_of_them_with_one_checkpoint(tmp_path: Path, base: Path) -> None:
    file = recipe(tmp_path, base, args={"max_steps": 100_000, "save_steps": 20, "save_total_limit": 2})
    words = ["train", str(file), "--launch", str(PROCESSES), "--json"]
    process = started(*words, cwd=tmp_path)
    wait_for(tmp_path / "sft" / "checkpoint-20", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    seen = json.loads(out)
    assert seen["interrupted"]
    assert (tmp_path / "sft" / f"checkpoint-{seen['steps']}" / "trainer_state.json").is_file()


# What transformers needs to take a base apart as it loads it, without accelerate's FSDP.
IN_PARTS = {"model_init_kwargs": {"distributed_config": {"fsdp_size": PROCESSES}}, "save_only_model": True}


def launched_by_graft(file: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "graftkit.cli.main", "train", str(file), "--launch", str(PROCESSES), "--json"]
    return ran(words, file.parent, {})


def compared_bit_for_bit(done: subprocess.CompletedProcess[str]) -> bool:
    """Check whether every saved adapter was compared with the values in memory."""
    kept = [finding for finding in output_of(done)["findings"] if finding["code"] == "GK403"]
    return bool(kept) and all(finding["evidence"]["compared"] == "bits" for finding in kept)


def test_fsdp2_of_a_base_that_is_loaded_in_parts(tmp_path: Path, base: Path, alone: TrainingResult) -> None:
    done = launched_by_graft(recipe(tmp_path, base, args=IN_PARTS))
    agrees(done, alone, base)
    # No process could compute what the model answers without the others.
    record = read_record(output_of(done)["folder"])
    assert record is not None
    assert record.base == read_record(alone.folder).base
    assert (record.expected, set(record.unknown)) == (None, {"expected"})
    assert compared_bit_for_bit(done)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.")  # PEFT's, in the run to compare with
@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        pytest.param("qwen3_moe", {"targets": ["attention", "experts"], "r": 4}, id="experts"),
        pytest.param("qwen3", {"targets": ["attention", "embeddings"], "r": 4}, id="embeddings"),
        pytest.param("qwen3", {"method": "vera", "r": None, "alpha": None}, id="buffers beside the parameters"),
        pytest.param("qwen2", {"r": 4, "options": {"bias": "all"}}, id="biases of the base"),
    ],
)
def test_fsdp2_of_other_adapters(tmp_path: Path, model: str, adapter: dict[str, Any]) -> None:
    base = save_model(tmp_path / "base", words(), model)
    alone = trained_alone(tmp_path / "alone", base, adapter=adapter)
    agrees(launched_by_graft(recipe(tmp_path, base, adapter=adapter, args=IN_PARTS)), alone, base)


def test_fsdp2_with_recomputation_keeps_the_gradients(tmp_path: Path, sharing: Path) -> None:
    alone = trained_alone(tmp_path / "alone", sharing)
    done = launched_by_graft(recipe(tmp_path, sharing, args={**IN_PARTS, "activation_checkpointing": True}))
    agrees(done, alone, sharing)
    norms = [entry["grad_norm"] for entry in output_of(done)["history"] if "grad_norm" in entry]
    assert norms == pytest.approx([norm for _, norm in alone.curve("grad_norm")], rel=1e-3)


def test_what_reads_whole_weights_is_refused_on_parts(tmp_path: Path, base: Path) -> None:
    done = launched_by_graft(recipe(tmp_path, base, adapter={"method": "dora"}, args=IN_PARTS))
    assert done.returncode != 0
    assert output_of(done)["error"]["code"] == "sharding"
    assert not (tmp_path / "sft").exists()


@without_accelerator
def test_processes_that_do_not_find_each_other_are_refused(tmp_path: Path, base: Path) -> None:
    done = launched(recipe(tmp_path, base, args={"use_cpu": False}), "--multi_gpu")
    assert done.returncode != 0
    assert output_of(done)["error"]["code"] == "processes-apart"
    assert not (tmp_path / "sft").exists()


@without_accelerator
def test_fsdp_that_accelerate_leaves_out_is_refused(tmp_path: Path, base: Path) -> None:
    flags = ("--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP")
    done = launched(recipe(tmp_path, base), *flags, ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert output_of(done)["error"]["code"] == "parallelism-off"


def zero(folder: Path, stage: int) -> list[str]:
    """Return flags for DeepSpeed that shard everything: by default ZeRO-3 does not shard tensors this small."""
    given = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    (folder / "zero.json").write_text(json.dumps(given), encoding="utf-8")
    return ["--use_deepspeed", f"--deepspeed_config_file={folder / 'zero.json'}"]


GLOO = {"ddp_backend": "gloo"}


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(tmp_path: Path, base: Path, alone: TrainingResult, stage: int) -> None:
    agrees(launched(recipe(tmp_path, base, args=GLOO), *zero(tmp_path, stage)), alone, base)


@needs_deepspeed
def test_experts_under_zero_3(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", words(), "qwen3_moe")
    fields = {"adapter": {"targets": ["attention", "experts"], "r": 4}}
    alone = trained_alone(tmp_path / "alone", base, **fields)
    agrees(launched(recipe(tmp_path, base, args=GLOO, **fields), *zero(tmp_path, 3)), alone, base)


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text model whose last layers reuse the keys and values of earlier ones."""
    folder = tmp_path_factory.mktemp("sharing")
    model = gk.twin(load_config("google/gemma-4-E2B-it").config.text_config)
    assert model.config.num_kv_shared_layers
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@needs_deepspeed
def test_recomputation_under_zero_3_keeps_the_gradients(tmp_path: Path, sharing: Path) -> None:
    alone = trained_alone(tmp_path / "alone", sharing)
    args = {**GLOO, "activation_checkpointing": True}
    done = launched(recipe(tmp_path, sharing, args=args), *zero(tmp_path, 3))
    agrees(done, alone, sharing)
    norms = [entry["grad_norm"] for entry in output_of(done)["history"] if "grad_norm" in entry]
    assert norms == pytest.approx([norm for _, norm in alone.curve("grad_norm")], rel=1e-3)


@needs_deepspeed
def test_options_that_trl_turns_into_re_entrant_ones_are_refused(tmp_path: Path, sharing: Path) -> None:
    options = {"activation_checkpointing_kwargs": {"use_reentrant": False}, "activation_checkpointing": True}
    done = launched(recipe(tmp_path, sharing, args={**GLOO, **options}), *zero(tmp_path, 3))
    assert done.returncode != 0
    assert output_of(done)["error"]["code"] == "recomputation"
    assert not (tmp_path / "sft").exists()
