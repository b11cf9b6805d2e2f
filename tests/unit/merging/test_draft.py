"""A merge that begins before its plan is made: the same bytes, the same refusals, and no transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from graftkit.adapters.file import read_adapter
from graftkit.merging.checkpoint.base import local_base
from graftkit.merging.draft import draft_plan
from graftkit.merging.fingerprint import fingerprint
from graftkit.merging.merge import plan_merge
from graftkit.merging.plan import MergePlan, WeightedAdapter

if TYPE_CHECKING:
    from tests.unit.merging.conftest import Bench

LINEARS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": LINEARS, "init_lora_weights": False, **options})


def drafted(made: Bench, weights: dict[Path, float]) -> MergePlan | None:
    base = local_base(made.base)
    assert base is not None
    return draft_plan(base, [WeightedAdapter(read_adapter(path), weight) for path, weight in weights.items()])


SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3}),
    "ranks by layer": ("llama", {"rank_pattern": {"q_proj": 8}}),
    "attention beside experts": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "names with a wrapper's part": (
        "google/gemma-4-E2B-it",
        {"target_modules": r".*vision_tower.*q_proj\.linear"},
    ),
    "an encoder": ("bert", {"target_modules": ["query", "dense"]}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_draft_is_the_plan(case: str, bench: Callable[..., Bench]) -> None:
    name, options = SAME[case]
    made = bench(name, shard="200KB")
    weights = {made.adapter(lora(**options)): 0.7, made.adapter(lora(**options), "second"): -1.0}
    draft = drafted(made, weights)
    assert draft is not None
    assert draft.jobs
    assert fingerprint(draft) == fingerprint(plan_merge(made.base, weights))


NONE: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "a scaling by layer": ("llama", {"alpha_pattern": {"q_proj": 32}}),
    "a module saved whole": ("llama", {"modules_to_save": ["norm"]}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "a head that shares its weight": ("gemma2", {"target_modules": ["lm_head"]}),
    "experts": ("mixtral", {"target_parameters": ["mlp.experts.down_proj"]}),
    "a trained bias": ("bert", {"target_modules": ["query"], "lora_bias": True}),
    "other names on disk": ("llava", {}),
    "a convolution": ("vit", {"target_modules": ["projection"]}),
}


@pytest.mark.parametrize("case", NONE)
def test_nothing_is_drafted_of_what_names_do_not_tell(case: str, bench: Callable[..., Bench]) -> None:
    name, options = NONE[case]
    made = bench(name)
    assert drafted(made, {made.adapter(lora(**options)): 1.0}) is None


def test_what_decides_the_bytes_is_in_the_fingerprint(bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    adapter = made.adapter(lora())
    seen = {fingerprint(plan_merge(made.base, {adapter: weight})) for weight in (1.0, 0.5)}
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "lora_alpha": 77}))
    seen.add(fingerprint(plan_merge(made.base, adapter)))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"format": "pt"})
    seen.add(fingerprint(plan_merge(made.base, adapter)))
    kept = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}
    save_file(kept, file, {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": LINEARS[1:]}))
    seen.add(fingerprint(plan_merge(made.base, adapter)))
    assert len(seen) == 5


# ---- whole merges, each in a Python that has imported nothing yet ----

COLD = """
import json, sys
from graftkit.errors import GraftError
from graftkit.merging.merge import merge
merges = json.load(sys.stdin)
codes = []
for base, adapter, out in merges:
    try:
        merge(base, adapter, out)
        codes.append("merged")
    except GraftError as error:
        codes.append(error.code)
print(json.dumps([codes, "transformers" in sys.modules]))
"""


def merged_cold(*merges: tuple[Path, Path, Path], before: str = "") -> tuple[list[str], bool]:
    """Merge in a new process, after some statements; returns each outcome, and whether it has transformers."""
    given = json.dumps([[str(path) for path in paths] for paths in merges])
    # As the command sets it: else the import of bitsandbytes loads torch's compiler.
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-c", before + COLD]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=env)
    codes, imported = json.loads(done.stdout)
    return codes, imported


def weights_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.iterdir() if path.name != "merge_report.json")
    return {path.name: path.read_bytes() for path in files}


def report_of(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "merge_report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("seconds", "out")}


@pytest.fixture
def made(bench: Callable[..., Bench]) -> Bench:
    return bench("llama", shard="200KB")


@pytest.fixture
def adapter(made: Bench) -> Path:
    return made.adapter(lora())


def edited_base(made: Bench, name: str, config: dict[str, Any], without: str) -> Path:
    """Copy the base, with other fields in its configuration and without the tensors of that name."""
    folder = made.folder / name
    folder.mkdir()
    for path in made.base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = {n: file for n, file in fields["weight_map"].items() if not (without and without in n)}
    index.write_text(json.dumps(fields))
    for path in folder.glob("*.safetensors"):
        kept = {n: tensor for n, tensor in load_file(path).items() if n in fields["weight_map"]}
        save_file(kept, path, {"format": "pt"})
    return folder


def test_the_same_bytes_without_transformers(made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    cold = made.folder / "cold"
    assert merged_cold((made.base, adapter, cold)) == (["merged"], False)
    assert weights_of(cold) == weights_of(made.out)
    assert report_of(cold) == report_of(made.out)
    assert report_of(cold)["verification"]["problems"] == []


def test_what_the_plan_refuses_is_refused(made: Bench, adapter: Path) -> None:
    """Neither the files' names nor the adapter's show any of this."""
    lacking = edited_base(made, "lacking", {}, "layers.1.input_layernorm")
    quantized = edited_base(made, "quantized", {"quantization_config": {"quant_method": "fp8"}}, "")
    another = made.adapter(lora(), "another")
    fields = json.loads((another / "adapter_config.json").read_text())
    (another / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": [*LINEARS, "o_proj"]}))
    before = sorted(path.name for path in made.folder.iterdir())
    codes, imported = merged_cold(
        (lacking, adapter, made.out), (quantized, adapter, made.out), (made.base, another, made.out)
    )
    assert codes == ["weights-incomplete", "merge-quantized-base", "merge-does-not-fit"]
    assert not imported
    assert sorted(path.name for path in made.folder.iterdir()) == before


def test_what_is_wrong_with_the_plan_goes_before_what_is_wrong_with_the_values(made: Bench, adapter: Path) -> None:
    lacking = edited_base(made, "lacking", {}, "layers.1.input_layernorm")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    codes, _ = merged_cold((lacking, adapter, made.out), (made.base, adapter, made.out))
    assert codes == ["weights-incomplete", "merge-not-finite"]
    assert sorted(path.name for path in made.folder.iterdir()) == ["adapter", "base", "lacking"]


def test_a_draft_that_is_not_the_plan_is_thrown_away(bench: Callable[..., Bench]) -> None:
    """A square matrix that is stored as (in, out) looks like one that is not."""
    made = bench("gpt2")
    adapter = made.adapter(lora(target_modules=["attn.c_proj"], fan_in_fan_out=True))
    draft = drafted(made, {adapter: 1.0})
    assert draft is not None
    assert fingerprint(draft) != fingerprint(plan_merge(made.base, adapter))
    made.merge(adapter)
    cold = made.folder / "cold"
    assert merged_cold((made.base, adapter, cold)) == (["merged"], True)
    assert weights_of(cold) == weights_of(made.out)


ALONE = {
    "another thread": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "a daemon": "import multiprocessing; multiprocessing.current_process().daemon = True",
    "a copy that ends": "import os; os.register_at_fork(after_in_child=lambda: os._exit(1))",
}


@pytest.mark.parametrize("before", ALONE.values(), ids=ALONE)
def test_without_another_process_the_plan_is_made_here(before: str, made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    cold = made.folder / "cold"
    assert merged_cold((made.base, adapter, cold), before=before) == (["merged"], True)
    assert weights_of(cold) == weights_of(made.out)


COMMAND = """
import sys
from graftkit.cli.main import main
try:
    main()
except SystemExit as end:
    print(end.code or 0, "transformers" in sys.modules)
"""


@pytest.mark.parametrize("colour", ["", "1"], ids=["lines", "a bar"])
def test_showing_progress_does_not_keep_the_command_from_it(colour: str, made: Bench, adapter: Path) -> None:
    env = {**os.environ, "FORCE_COLOR": colour, "TERM": "xterm"}
    command = [sys.executable, "-c", COMMAND, "merge", made.base, adapter, made.out]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split()[-2:] == ["0", "False"]
