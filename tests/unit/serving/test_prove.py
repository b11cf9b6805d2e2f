"""``gk.prove`` from the model to the verdict, with a program in the engine's place: right, or wrong in one way.

The program is a Llama in numpy that reads base and adapter from files. What engines do is in ``tests/serve``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import graftkit as gk
from graftkit.cli.main import main
from graftkit.engines.outcome import Outcome
from graftkit.serving.prove import Proof

Engine = Callable[[str], Path]

# As an engine's Python: it is first asked for the engine's module, then given a job.
PROGRAM = """
import sys
if "-c" in sys.argv:
    sys.exit(0)
import json
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file

folder = Path(sys.argv[-1])
job = json.loads((folder / "job.json").read_text())
(folder / "served").mkdir()
models = {}
base = {}
for file in Path(job["base"]).glob("*.safetensors"):
    base |= {name: values.astype(np.float64) for name, values in load_file(file).items()}
config = json.loads((Path(job["base"]) / "config.json").read_text())
size = config["head_dim"]
theta = config["rope_parameters"]["rope_theta"]

def norm(x, weight):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])

def rotate(x):
    angles = np.arange(x.shape[1])[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

def heads(x):
    return x.reshape(len(x), -1, size).transpose(1, 0, 2)

def last_row(w, prefix):
    x = w["model.embed_tokens.weight"][prefix]
    for layer in range(config["num_hidden_layers"]):
        at = lambda name: w[f"model.layers.{layer}.{name}.weight"].T
        h = norm(x, at("input_layernorm"))
        q, k, v = (heads(h @ at(f"self_attn.{n}_proj")) for n in "qkv")
        k, v = (np.repeat(part, len(q) // len(k), 0) for part in (k, v))
        scores = rotate(q) @ rotate(k).transpose(0, 2, 1) / np.sqrt(size)
        scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
        mixed = (softmax(scores) @ v).transpose(1, 0, 2).reshape(len(x), -1)
        x = x + mixed @ at("self_attn.o_proj")
        h = norm(x, at("post_attention_layernorm"))
        gate = h @ at("mlp.gate_proj")
        x = x + (gate / (1 + np.exp(-gate)) * (h @ at("mlp.up_proj"))) @ at("mlp.down_proj")
    return np.log(softmax(norm(x, w["model.norm.weight"])[-1] @ w["lm_head.weight"].T))

def answer(name, weights):
    rows = np.stack([last_row(weights, prefix) for prefix in job["prefixes"]])
    np.save(folder / "served" / f"{len(models)}.npy", rows.astype(np.float32))
    models[name] = {"file": f"{len(models)}.npy"}

def change(name):
    return 1

CHANGE

answer("", base)
for name, path in job["adapters"].items():
    adapter = load_file(Path(path) / "adapter_model.safetensors")
    options = json.loads((Path(path) / "adapter_config.json").read_text())
    weights = dict(base)
    for key, a in adapter.items():
        if "lora_A" in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = options["lora_alpha"] / options["r"] * change(path)
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + scale * adapter[key.replace("_A", "_B")] @ a
    answer(name, weights)
known = {"version": "1.0", "replaced": [], "models": models, "current": None}
(folder / "served" / "result.json").write_text(json.dumps(known))
"""
IGNORE = "change = lambda path: 0"
DROP_ONE = "change = lambda path: 0 if path.endswith('1.self_attn.v_proj') else 1"
DOUBLE = "change = lambda path: 2"


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Return the path of a program that serves as it should, but for a change to every adapted model."""

    def make(change: str = "") -> Path:
        script = tmp_path / "program.py"
        script.write_text(PROGRAM.replace("CHANGE", change))
        start = tmp_path / "python"
        start.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        start.chmod(0o755)
        return start

    return make


def prove(python: Path, model: str = "llama", **options: object) -> Proof:
    return gk.prove(model, target="vllm", python=python, targets=["q_proj", "v_proj"], **options)


def test_an_engine_that_computes_the_same_applies_the_adapter(engine: Engine) -> None:
    found = prove(engine())
    assert found.served.outcome is Outcome.APPLIED
    assert found.on_twin
    assert found.served.effect is not None
    assert found.served.effect > 0.1
    assert found.report.proven
    assert found.sites == {}


def test_an_engine_that_drops_the_adapter_ignores_it_at_every_site(engine: Engine) -> None:
    found = prove(engine(IGNORE), as_is=True)
    assert found.served.outcome is Outcome.IGNORED
    assert {site.outcome for site in found.sites.values()} <= {Outcome.IGNORED, Outcome.UNKNOWN}
    assert found.report.at_or_above(gk.Severity.ERROR)


def test_the_site_that_an_engine_drops_is_found(engine: Engine) -> None:
    found = prove(engine(DROP_ONE), as_is=True)
    assert found.served.outcome is Outcome.DIFFERENT
    assert found.served.site == "model.layers.1.self_attn.v_proj"
    wrong = [site for site, part in found.sites.items() if part.outcome is not Outcome.APPLIED]
    assert wrong == ["model.layers.1.self_attn.v_proj"]


def test_an_update_that_is_doubled_gives_the_factor(engine: Engine) -> None:
    found = prove(engine(DOUBLE), as_is=True).served
    assert (found.outcome, found.factor) == (Outcome.SCALED, 2)


def test_an_engine_that_does_not_know_rslora_scales_by_the_root_of_the_rank(engine: Engine) -> None:
    found = prove(engine(), as_is=True, method="rslora", r=9).served
    assert found.outcome is Outcome.SCALED
    assert found.factor == pytest.approx(1 / 3)
    assert prove(engine(), method="rslora", r=9).served.outcome is Outcome.APPLIED


def test_an_initializer_that_moves_the_base_is_served_converted_alone(engine: Engine) -> None:
    assert prove(engine(), init_lora_weights="pissa").served.outcome is Outcome.APPLIED
    assert prove(engine(), init_lora_weights="pissa", as_is=True).served.outcome is Outcome.DIFFERENT


def test_the_command_ends_with_the_verdict(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prove", "llama", "--target", "vllm", "-t", "q_proj", "--as-is", "--json", "--python"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, str(engine(IGNORE))])
    assert ended.value.code == 1
    result = json.loads(capsys.readouterr().out)
    assert result["schema_version"] == 1
    assert result["served"]["outcome"] == "ignored"
    assert [finding["code"] for finding in result["findings"]] == ["GK706"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["llama", "--target", "vllm", "--python", "nowhere"], "engine-missing"),
        (["llama", "--target", "ollama"], "engine-unknown"),
        (["llama"], "usage"),
        (["--target", "vllm"], "usage"),
        (["llama", "--merged", "out", "--target", "vllm"], "usage"),
        (["--merged", "out", "--adapter", "adapter", "--target", "vllm"], "usage"),
        (["--merged", "out", "--target", "vllm", "--python", "nowhere"], "engine-missing"),
        (["llama", "--base", "base", "--target", "vllm"], "usage"),
        (["llama", "--adapter", "a", "-t", "attention", "--target", "vllm"], "usage"),
    ],
)
def test_what_cannot_be_proven_is_an_error(
    arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prove", *arguments, "--json"])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code


def test_an_adapter_of_another_base_is_an_error(engine: Engine, tmp_path: Path) -> None:
    for name, hidden in (("a", 64), ("b", 96)):
        gk.twin("llama", overrides={"hidden_size": hidden}).save_pretrained(tmp_path / name)
    planned = gk.plan(str(tmp_path / "b"), targets=["q_proj"])
    gk.attach(gk.twin("llama", overrides={"hidden_size": 96}), planned).save_pretrained(tmp_path / "adapter")
    with pytest.raises(gk.GraftError) as caught:
        gk.prove(str(tmp_path / "a"), target="vllm", python=engine(), adapter=tmp_path / "adapter")
    assert caught.value.code == "adapter-misfit"


def save_own_files(folder: Path) -> tuple[Path, Path]:
    """Save a base, and an adapter on it with an effect; return their folders."""
    base, adapter = folder / "base", folder / "adapter"
    model = gk.twin("llama")
    model.save_pretrained(base)
    adapted = gk.attach(model, gk.plan(str(base), targets=["q_proj", "v_proj"], r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    adapted.save_pretrained(adapter)
    return base, adapter


@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_the_users_own_files_are_what_is_served(engine: Engine, tmp_path: Path, converted: bool) -> None:
    base, adapter = save_own_files(tmp_path)
    if converted:
        gk.convert(adapter, tmp_path / "form", to="vllm", base=base)
        adapter = tmp_path / "form"
    note = f"Path({str(tmp_path / 'served')!r}).write_text(job['adapters']['adapter'])"
    found = gk.prove(str(base), target="vllm", python=engine(note), adapter=adapter, as_is=True)
    assert not found.on_twin
    assert found.served.outcome is Outcome.APPLIED
    assert (tmp_path / "served").read_text() == str(adapter)


def test_a_merged_checkpoint_is_held_against_its_adapter(engine: Engine, tmp_path: Path) -> None:
    base, adapter = save_own_files(tmp_path)
    python = engine()
    for weight, outcome in ((1.0, Outcome.APPLIED), (0.5, Outcome.DIFFERENT)):
        out = tmp_path / f"merged-{weight}"
        gk.merge(base, {str(adapter): weight}, out)
        found = gk.prove_merged(out, target="vllm", python=python, base=base, adapter=adapter)
        assert found.served.outcome is outcome
    with_base = gk.prove_merged(out, target="vllm", python=python, base=base).served
    assert with_base.outcome is Outcome.APPLIED
    assert with_base.base_error is not None
    alone = gk.prove_merged(out, target="vllm", python=python)
    assert alone.served.outcome is Outcome.APPLIED
    assert alone.served.base_error is None
