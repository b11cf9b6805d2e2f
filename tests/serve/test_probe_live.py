"""``graft probe`` against the engines' own servers, each started here with a twin and its signed adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.serve.servers import ENGINES, Running, free_port, python_of, started
from tests.unit.serving.signed import Signed, write_signed

import graftkit as gk
from graftkit.adapters.file import RECORD_NAME
from graftkit.engines.outcome import Outcome

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore::FutureWarning")]

# What the twins' tokenizer does not do, and llama.cpp's server does unless it is told.
AS_THE_TOKENIZER = ["tokenizer.ggml.add_bos_token=bool:false", "tokenizer.ggml.add_space_prefix=bool:false"]


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return write_signed(tmp_path_factory.mktemp("signed"), "llama")


@pytest.fixture(scope="module")
def half(signed: Signed) -> Path:
    """The adapter at half its scale, as an engine that reads alpha or the rank wrongly has it."""
    folder = signed.adapter.with_name("half")
    shutil.copytree(signed.adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))
    (folder / RECORD_NAME).unlink()
    return folder


# ---- llama.cpp's server, as llama-cpp-python ships it ----


def as_gguf(python: Path, base: Path) -> Path:
    sources = next((ENGINES / "llama.cpp" / "src").glob("*/vendor/llama.cpp"))
    out = base.with_suffix(".gguf")
    subprocess.run(
        [python, sources / "convert_hf_to_gguf.py", base, "--outtype", "f32", "--outfile", out],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(sources / "gguf-py")},
    )
    return out


@pytest.fixture(scope="module")
def llama_cpp(signed: Signed, half: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    python, folder = python_of("llama.cpp"), tmp_path_factory.mktemp("llama.cpp")
    other = write_signed(tmp_path_factory.mktemp("other"), "llama", seed=1)
    gk.convert(signed.adapter, folder / "tuned", to="llama.cpp", base=signed.base)
    gk.convert(half, folder / "half", to="llama.cpp", base=signed.base)
    gguf = str(as_gguf(python, signed.base))
    common = {"n_ctx": 512, "type_k": 0, "type_v": 0, "kv_overrides": AS_THE_TOKENIZER}
    tuned, halved = (str(folder / name / "adapter.gguf") for name in ("tuned", "half"))
    models: list[Mapping[str, object]] = [
        {"model": gguf, "model_alias": "base"},
        {"model": gguf, "model_alias": "tuned", "lora_path": tuned},
        {"model": gguf, "model_alias": "half", "lora_path": halved},
        {"model": gguf, "model_alias": "as-converted-base", "kv_overrides": None},
        {"model": gguf, "model_alias": "as-converted", "lora_path": tuned, "kv_overrides": None},
        {"model": gguf, "model_alias": "chatml-base", "chat_format": "chatml"},
        {"model": gguf, "model_alias": "chatml", "chat_format": "chatml", "lora_path": tuned},
        {"model": str(as_gguf(python, other.base)), "model_alias": "other"},
    ]
    port = free_port()
    config = {"host": "127.0.0.1", "port": port, "models": [{**common, **model} for model in models]}
    (folder / "config.json").write_text(json.dumps(config))
    with started([python, "-m", "llama_cpp.server", "--config_file", "config.json"], port, folder) as running:
        yield running


@pytest.mark.parametrize(
    ("model", "base", "outcome"),
    [
        ("tuned", "base", Outcome.APPLIED),
        ("base", "base", Outcome.IGNORED),
        ("half", "base", Outcome.SCALED),
        ("tuned", "other", Outcome.OTHER_BASE),
        ("as-converted", "as-converted-base", Outcome.OTHER_TEMPLATE),
        ("chatml", "chatml-base", Outcome.OTHER_TEMPLATE),
    ],
)
def test_llama_cpp(llama_cpp: Running, signed: Signed, model: str, base: str, outcome: Outcome) -> None:
    found = llama_cpp.probe(signed, model, base)
    assert found.outcome is outcome
    if outcome is Outcome.SCALED:
        assert found.factor == pytest.approx(0.5, abs=0.02)
    if outcome is Outcome.APPLIED:
        assert found.error is not None
        assert found.error < 1e-3


def test_llama_cpp_has_no_such_model(llama_cpp: Running, signed: Signed) -> None:
    """It would answer with its first model instead."""
    with pytest.raises(gk.GraftError) as caught:
        llama_cpp.probe(signed, "tunde", "base")
    assert caught.value.code == "server-no-model"


# ---- mlx_lm.server ----


@pytest.fixture(scope="module")
def mlx(signed: Signed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    python, folder = python_of("mlx"), tmp_path_factory.mktemp("mlx")
    gk.convert(signed.adapter, folder / "tuned", to="mlx", base=signed.base)
    port = free_port()
    command: list[str | Path] = [python, "-m", "mlx_lm", "server", "--model", signed.base, "--port", str(port)]
    with started([*command, "--adapter-path", folder / "tuned"], port, folder) as running:
        yield running


def test_mlx(mlx: Running, signed: Signed) -> None:
    """Its name of what it was started with is "default_model"; the base alone has that of its folder."""
    base = str(signed.base)
    found = mlx.probe(signed, "default_model", base)
    assert found.outcome is Outcome.APPLIED
    assert found.error is not None
    assert found.error < 1e-3
    assert mlx.probe(signed, base, base).outcome is Outcome.IGNORED


def test_mlx_has_no_such_model(mlx: Running, signed: Signed) -> None:
    with pytest.raises(gk.GraftError) as caught:
        mlx.probe(signed, "no-such-model", str(signed.base))
    assert caught.value.code == "server-no-model"


# ---- vLLM ----


@pytest.fixture(scope="module")
def vllm(signed: Signed, half: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    python, folder = python_of("vllm"), tmp_path_factory.mktemp("vllm")
    port = free_port()
    modules = [f"tuned={signed.adapter}", f"half={half}"]
    options = [
        *("--model", signed.base, "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-lora-rank", "16", "--lora-modules", *modules, "--dtype", "float32"),
        *("--max-model-len", "256", "--enforce-eager", "--block-size", "32"),
    ]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *options]
    with started(command, port, folder, VLLM_CPU_KVCACHE_SPACE="1") as running:
        yield running


def test_vllm(vllm: Running, signed: Signed) -> None:
    found = vllm.probe(signed, "tuned")
    assert found.outcome is Outcome.APPLIED
    assert found.error is not None
    assert found.error < 1e-3
    scaled = vllm.probe(signed, "half")
    assert scaled.outcome is Outcome.SCALED
    assert scaled.factor == pytest.approx(0.5, abs=0.02)
    assert vllm.probe(signed, "base", "base").outcome is Outcome.IGNORED


def test_vllm_has_no_such_model(vllm: Running, signed: Signed) -> None:
    with pytest.raises(gk.GraftError) as caught:
        vllm.probe(signed, "tunde")
    assert caught.value.code == "server-no-model"
