"""Every class that adapters are converted for, in the engine itself: its log-probabilities are PEFT's.

The converter of llama.cpp's own repository is a second witness, for what it converts.
"""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import graftkit as gk
from graftkit.errors import EngineError
from graftkit.serving.engine_process import Job, serve
from graftkit.serving.engine_twin import write_engine_twin
from graftkit.serving.install import engine_python

# The tolerance, in nats: engines compute some bases with errors of a few thousandths, adapters then with as many.
_BASE_ERROR, _ERROR, _EFFECT = 0.02, 0.03, 0.5
_PREFIXES = [[int(t) for t in np.random.default_rng(i).integers(5, 250, 9)] for i in range(4)]


@dataclass(frozen=True)
class Case:
    """A twin of a class.

    Attributes:
        source: what ``write_engine_twin`` takes.
        overrides: configuration values that the engine counts on.
        experts: whether it has any.
        sentencepiece: whether llama.cpp's converter asks for such a vocabulary.
        inputs_first: whether its experts are (in, out), with gate and up in turn; mlx-lm reads such a checkpoint
            only as it is released, quantized, or as mlx-lm itself stores it.
    """

    source: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    experts: bool = False
    sentencepiece: bool = False
    inputs_first: bool = False

    @property
    def targets(self) -> list[str]:
        return ["attention", "experts"] if self.experts else ["attention", "mlp"]


# Every sixth layer is a global one, and heads have the size that scores are scaled by.
_GEMMA3 = {
    "vocab_size": 512,
    "text_config": {
        "vocab_size": 512,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window_pattern": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
    },
}
CASES: Mapping[str, Case] = {
    "LlamaForCausalLM": Case("llama"),
    "MistralForCausalLM": Case("mistral"),
    "MixtralForCausalLM": Case("mixtral", experts=True),
    "Qwen2ForCausalLM": Case("qwen2"),
    "Qwen3ForCausalLM": Case("qwen3"),
    "Qwen2MoeForCausalLM": Case("qwen2_moe", experts=True),
    "Qwen3MoeForCausalLM": Case("qwen3_moe", {"norm_topk_prob": True}, experts=True),
    "Gemma2ForCausalLM": Case("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32}, sentencepiece=True),
    "Gemma3ForCausalLM": Case("gemma3_text"),
    "Gemma3ForConditionalGeneration": Case("gemma3", _GEMMA3),
    "Gemma4ForConditionalGeneration": Case("google/gemma-4-26B-A4B-it", experts=True),
    "GptOssForCausalLM": Case("gpt_oss", experts=True, inputs_first=True),
    "Phi3ForCausalLM": Case("phi3"),
    "GraniteForCausalLM": Case("granite"),
    "GraniteMoeForCausalLM": Case("granitemoe"),
    "OlmoForCausalLM": Case("olmo"),
    "Olmo2ForCausalLM": Case("olmo2"),
    "OlmoeForCausalLM": Case("olmoe", experts=True),
    "SmolLM3ForCausalLM": Case("smollm3"),
    "Starcoder2ForCausalLM": Case("starcoder2"),
    "StableLmForCausalLM": Case("stablelm"),
    "SeedOssForCausalLM": Case("seed_oss"),
    "Glm4ForCausalLM": Case("glm4"),
}
TABLES = {"llama.cpp": "gguf_classes.toml", "mlx": "mlx_classes.toml"}


def classes(engine: str) -> list[str]:
    """Return the classes that adapters are converted for."""
    table = resources.files("graftkit.converting").joinpath(TABLES[engine]).read_text(encoding="utf-8")
    return list(tomllib.loads(table))


def python_of(engine: str) -> Path:
    try:
        return engine_python(engine)
    except EngineError as error:
        pytest.skip(str(error))


def random_adapter(model: Any, targets: list[str], folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    adapted = gk.attach(model, gk.plan(model, targets=targets, scope="language", r=4, alpha=6))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            spread = 0.3 if ".lora_B" in name else parameter.shape[-1] ** -0.5
            parameter.data = torch.randn_like(parameter) * spread
    adapted.save_pretrained(folder)
    return adapted.eval()


def log_probabilities(model: Any) -> np.ndarray:
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([p])).logits[0, -1].double().log_softmax(-1) for p in _PREFIXES]
    return torch.stack(rows).numpy()


def write_vocabulary(python: Path, folder: Path) -> None:
    """Train a SentencePiece vocabulary where the converter asks for one."""
    code = (
        "import sentencepiece as s; s.SentencePieceTrainer.train("
        "sentence_iterator=iter(['to be or not to be'] * 9), "
        "model_prefix='tokenizer', vocab_size=300, hard_vocab_limit=False, minloglevel=2)"
    )
    subprocess.run([str(python), "-c", code], cwd=folder, check=True, timeout=120)


def write_outputs_first(path: Path) -> None:
    """Rewrite a checkpoint's experts as mlx-lm stores them: (out, in), gate and up apart."""
    made = {}
    for name, tensor in load_file(path).items():
        stored = tensor if name.endswith("_bias") or tensor.dim() != 3 else tensor.transpose(1, 2)
        leaf = "bias" if name.endswith("_bias") else "weight"
        plain = name.removesuffix("_bias")
        if plain.endswith("gate_up_proj"):
            made[plain.replace("gate_up", "gate") + f".{leaf}"] = stored[:, ::2]
            made[plain.replace("gate_up", "up") + f".{leaf}"] = stored[:, 1::2]
        else:
            made[f"{plain}.{leaf}" if ".experts." in name else name] = stored
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, path, {"format": "pt"})


def largest(found: Any, wanted: np.ndarray) -> float:
    assert found is not None
    width = min(found.shape[-1], wanted.shape[-1])
    return float(np.abs(found[:, :width] - wanted[:, :width]).max())


@pytest.mark.serve
@pytest.mark.filterwarnings("ignore")  # of two dozen architectures; what is asserted are figures
@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine in TABLES for name in classes(engine)])
def test_a_converted_adapter_is_what_peft_computes(engine: str, name: str, tmp_path: Path) -> None:
    python, case = python_of(engine), CASES[name]
    model = write_engine_twin(case.source, tmp_path / "base", overrides=case.overrides)
    assert type(model).__name__ == name
    if case.sentencepiece and engine == "llama.cpp":
        write_vocabulary(python, tmp_path / "base")
    if case.inputs_first and engine == "mlx":
        write_outputs_first(tmp_path / "base" / "model.safetensors")
    base = log_probabilities(model)
    adapted = log_probabilities(random_adapter(model, case.targets, tmp_path / "adapter"))
    done = gk.convert(tmp_path / "adapter", tmp_path / "out", to=engine, base=tmp_path / "base")
    assert done.proof.slices > 0
    run = serve(engine, python, Job(tmp_path / "base", {"it": tmp_path / "out"}, _PREFIXES, 64))
    assert run.base.refusal is None
    assert run.adapters["it"].refusal is None
    assert largest(adapted, base) > _EFFECT
    assert largest(run.base.values, base) < _BASE_ERROR
    assert largest(run.adapters["it"].values, adapted) < _ERROR


def test_every_class_has_a_case() -> None:
    assert {name for engine in TABLES for name in classes(engine)} == set(CASES)


@pytest.mark.serve
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["llama", "mistral", "qwen3", "gemma3_text", "granite"])
def test_llama_cpps_own_converter_writes_the_same_tensors(source: str, tmp_path: Path) -> None:
    python = python_of("llama.cpp")
    (script,) = (python.parent.parent / "src").glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")
    model = write_engine_twin(source, tmp_path / "base")
    random_adapter(model, ["attention", "mlp"], tmp_path / "adapter")
    theirs = tmp_path / "theirs.gguf"
    command = [python, script, "--base", tmp_path / "base", "--outtype", "f32", "--outfile", theirs]
    subprocess.run([*map(str, command), str(tmp_path / "adapter")], check=True, timeout=300, capture_output=True)
    gk.convert(tmp_path / "adapter", tmp_path / "out", to="llama.cpp", base=tmp_path / "base")
    wanted, found = (
        {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
        for path in (theirs, tmp_path / "out" / "adapter.gguf")
    )
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    fields = [GGUFReader(path).fields for path in (theirs, tmp_path / "out" / "adapter.gguf")]
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert fields[0][key].contents() == fields[1][key].contents()
