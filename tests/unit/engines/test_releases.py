"""What a release says of its classes is read from its source, and the tables are what installed engines say."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from graftkit.engines import Feature, Model, Stance, engine_named
from graftkit.engines.releases.table import parse_table, read_table, released
from graftkit.engines.releases.write import table_of
from graftkit.errors import EngineError

_ENGINES = Path(__file__).parents[3] / ".engines"
_VLLM = {
    "registry.py": """
_TEXT_GENERATION_MODELS = {
    "PlainForCausalLM": ("plain", "PlainForCausalLM"),
    "RenamedForCausalLM": ("plain", "PlainForCausalLM"),
    "NoneForCausalLM": ("plain", "NoneForCausalLM"),
    "MadeForCausalLM": ("plain", "MadeForCausalLM"),
    "SeesForConditionalGeneration": ("sees", "SeesForConditionalGeneration"),
    "GoneForCausalLM": ("gone", "GoneForCausalLM"),
    "TwoForCausalLM": ("vllm.models.two", "TwoForCausalLM"),
}
_SPECULATIVE_DECODING_MODELS = {"DraftModel": ("plain", "PlainForCausalLM")}
""",
    "interfaces.py": """
class SupportsLoRA(Protocol):
    embedding_modules = {}
class SupportsMultiModal(Protocol):
    supports_tower_connector_lora = False
""",
    "plain.py": """
class PlainForCausalLM(nn.Module, SupportsLoRA):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings"}
class NoneForCausalLM(nn.Module):
    pass
class MadeForCausalLM(made_elsewhere(nn.Module)):
    pass
class UnknownForCausalLM(_Base):
    pass
""",
    "sees.py": """
class SeesForConditionalGeneration(SupportsMultiModal, SupportsLoRA):
    supports_tower_connector_lora = True
    packed_modules_mapping = PlainForCausalLM.packed_modules_mapping | {"qkv": ["qkv"]}
""",
    "../../models/two/amd/model.py": "class TwoForCausalLM(nn.Module, SupportsLoRA): pass",
    "../../models/two/nvidia/model.py": "class TwoForCausalLM(nn.Module): pass",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder like vLLM's, with models of its own."""
    for name, text in _VLLM.items():
        path = (tmp_path / "vllm/model_executor/models" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_what_classes_say_is_read_without_importing_them(source: Path) -> None:
    classes = table_of("vllm", Version("9.0"), source).classes
    assert {name: support.lora for name, support in classes.items()} == {
        "PlainForCausalLM": True,
        "RenamedForCausalLM": True,
        "NoneForCausalLM": False,
        "MadeForCausalLM": None,
        "SeesForConditionalGeneration": True,
        "TwoForCausalLM": None,
    }
    plain, sees = classes["PlainForCausalLM"], classes["SeesForConditionalGeneration"]
    assert plain.embeddings == ("embed_tokens",)
    assert plain.towers is None
    assert plain.source == "vllm/model_executor/models/plain.py:2"
    assert sees.towers is True
    assert sees.embeddings is None
    assert dict(sees.packed or {}) == {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "qkv": ("qkv",)}


def test_what_inherits_from_something_unseen_is_unknown(source: Path) -> None:
    registry = source / "vllm/model_executor/models/registry.py"
    registry.write_text('_MODELS = {"UnknownForCausalLM": ("plain", "UnknownForCausalLM")}', encoding="utf-8")
    assert table_of("vllm", Version("9.0"), source).classes["UnknownForCausalLM"].lora is None


def test_a_wheel_gives_the_table_of_its_folder(source: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-9.0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((source / "vllm").rglob("*.py")):
            archive.write(path, path.relative_to(source))
    assert table_of("vllm", Version("9.0"), wheel) == table_of("vllm", Version("9.0"), source)


def test_a_table_is_read_as_it_was_written(source: Path) -> None:
    table = table_of("vllm", Version("9.0"), source)
    assert parse_table(table.to_json()) == table


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        pytest.param("tgi", "engine-unknown", id="another engine"),
        pytest.param("sglang", "engine-source", id="its own"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: Path, engine: str, code: str) -> None:
    with pytest.raises(EngineError) as caught:
        table_of(engine, Version("9.0"), source)
    assert caught.value.code == code


_LLAMA_CPP = {
    "conversion/__init__.py": 'TEXT_MODEL_MAP: dict = {"OneForCausalLM": "one", "ThreeForCausalLM": "one"}',
    "conversion/one.py": """
@ModelBase.register("OneForCausalLM", "OneForSomethingElse")
class OneModel(TextModel):
    model_arch = gguf.MODEL_ARCH.ONE
@ModelBase.register("ThreeForCausalLM")
class ThreeModel(OneModel):
    pass
@ModelBase.register("OneForCausalLM")
class OneVision(MmprojModel):
    model_arch = gguf.MODEL_ARCH.MMPROJ
""",
    "gguf-py/gguf/constants.py": """
MODEL_ARCH_NAMES = {MODEL_ARCH.ONE: "one"}
TENSOR_NAMES = {MODEL_TENSOR.ATTN_Q: "blk.{bid}.attn_q", MODEL_TENSOR.OUT: "output", MODEL_TENSOR.EMBD: "embd"}
""",
    "gguf-py/gguf/tensor_mapping.py": """
class TensorNameMap:
    mappings_cfg = {MODEL_TENSOR.OUT: ("lm_head",), MODEL_TENSOR.EMBD: ("model.embed_tokens",)}
    block_mappings_cfg = {MODEL_TENSOR.ATTN_Q: ("model.layers.{bid}.self_attn.q_proj",)}
""",
    "src/llama-arch.cpp": """
{ LLM_ARCH_UNO, "one" },
{ LLM_TENSOR_ATTN_Q, "blk.%d.attn_q" },
{ LLM_TENSOR_OUTPUT, "output" },
{ LLM_TENSOR_TOKEN_EMBD, "embd" },
""",
    "src/llama-model.cpp": "case LLM_ARCH_UNO:\n    return new llama_model_uno(params);",
    "src/models/models.h": "",
    "src/models/uno.cpp": """
output = create_tensor(tn(LLM_TENSOR_OUTPUT, "weight"), {n}, 0);
output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n}, TENSOR_DUPLICATED);
tok_embd = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n}, 0);
llama_model_uno::build_arch_graph(params)
inpL = build_inp_embd(model.tok_embd);
q = ggml_mul_mat(ctx0, model.layers[il].wq, cur);
k = build_lora_mm(model.layers[il].wk, cur);
cur = ggml_mul_mat  (ctx0, model.output, cur);
""",
}


def test_weights_that_are_multiplied_past_adapters_are_found(tmp_path: Path) -> None:
    for name, text in _LLAMA_CPP.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    classes = table_of("llama_cpp", Version("9.0"), tmp_path).classes
    assert set(classes) == {"OneForCausalLM", "ThreeForCausalLM"}
    assert {support.raw for support in classes.values()} == {("lm_head", "q_proj")}
    assert {support.arch for support in classes.values()} == {"uno"}


# ---- the tables that are shipped ----


@pytest.mark.parametrize(("engine", "version"), [pytest.param(e, v, id=f"{e} {v}") for e, v, _ in released()])
def test_a_shipped_table_covers_the_engine_as_it_is_known(engine: str, version: Version) -> None:
    known = engine_named(engine)
    table = read_table(engine, version)
    assert table is not None
    assert (table.engine, table.version) == (engine, version)
    assert version in {known.version, known.table}
    assert all(support.source for support in table.classes.values())
    assert len(table.classes) > 100


def _installed() -> dict[str, Path]:
    """Return engine -> where its source lies; without ``make engines`` nowhere."""
    places = {
        "vllm": _ENGINES.glob("vllm/lib/python3*/site-packages"),
        "mlx": _ENGINES.glob("mlx/lib/python3*/site-packages"),
        "llama_cpp": _ENGINES.glob("llama.cpp/src/llama_cpp_python-*/vendor/llama.cpp"),
    }
    return {engine: path for engine, paths in places.items() for path in list(paths)[:1]}


@pytest.mark.parametrize("engine", ["llama_cpp", "mlx", "vllm"])
def test_a_shipped_table_is_what_the_installed_source_says(engine: str) -> None:
    source = _installed().get(engine)
    if source is None:
        pytest.skip(f"{engine} is not installed under .engines (make engines)")
    known = engine_named(engine)
    version = known.table or known.version
    assert version is not None
    assert table_of(engine, version, source) == read_table(engine, version)


# ---- what the tables decide ----


@pytest.mark.parametrize(
    ("target", "cls", "feature", "name", "stance"),
    [
        pytest.param("vllm", "LlamaForCausalLM", Feature.MODEL_CLASS, None, Stance.TAKES, id="a class"),
        pytest.param("vllm", "MambaForCausalLM", Feature.MODEL_CLASS, None, Stance.REFUSES, id="not yet"),
        pytest.param("vllm", "Missing", Feature.MODEL_CLASS, None, Stance.UNKNOWN, id="not its own"),
        pytest.param("vllm==0.31.0", "LlamaForCausalLM", Feature.MODEL_CLASS, None, Stance.UNKNOWN, id="not read"),
        pytest.param(
            "vllm==0.32.0rc1", "LlamaForCausalLM", Feature.MODEL_CLASS, None, Stance.TAKES, id="candidate"
        ),
        pytest.param("vllm", "LlamaForCausalLM", Feature.LM_HEAD, "lm_head", Stance.TAKES, id="a head"),
        pytest.param("vllm", "Gemma3ForCausalLM", Feature.LM_HEAD, "lm_head", Stance.REFUSES, id="no head"),
        pytest.param("vllm", "Qwen3ForCausalLM", Feature.TIED_HEAD, "lm_head", Stance.UNKNOWN, id="a tied head"),
        pytest.param(
            "vllm", "Qwen2VLForConditionalGeneration", Feature.TOWERS, "qkv", Stance.IGNORES, id="towers"
        ),
        pytest.param("llama_cpp", "LlamaForCausalLM", Feature.LINEAR, "q_proj", Stance.TAKES, id="a linear"),
        pytest.param(
            "llama_cpp", "DeepseekV3ForCausalLM", Feature.LINEAR, "q_a_proj", Stance.IGNORES, id="past it"
        ),
        pytest.param(
            "llama_cpp", "DeepseekV3ForCausalLM", Feature.LM_HEAD, "lm_head", Stance.IGNORES, id="head too"
        ),
        pytest.param("llama_cpp", "DeepseekV3ForCausalLM", Feature.LINEAR, "o_proj", Stance.TAKES, id="but this"),
        pytest.param("llama_cpp", "Missing", Feature.MODEL_CLASS, None, Stance.REFUSES, id="no converter"),
        pytest.param(
            "sglang", "LlamaForCausalLM", Feature.MODEL_CLASS, None, Stance.TAKES, id="a class of SGLang"
        ),
        pytest.param("sglang", "Missing", Feature.MODEL_CLASS, None, Stance.UNKNOWN, id="none of SGLang"),
    ],
)
def test_what_follows_for_one_class(
    target: str, cls: str, feature: Feature, name: str | None, stance: Stance
) -> None:
    fact = engine_named(target).fact(feature, Model(cls), name)
    assert fact.stance is stance
    assert fact.source or stance is Stance.UNKNOWN


def test_mlx_knows_models_by_type() -> None:
    mlx = engine_named("mlx")
    stances = [mlx.fact(Feature.MODEL_CLASS, Model("Any", name)).stance for name in ("mistral", "missing")]
    assert stances == [Stance.TAKES, Stance.REFUSES]


def test_what_was_run_counts_before_what_a_class_says() -> None:
    """Of Gemma 4 with pictures the class names no embeddings, and the one inside it refuses them."""
    fact = engine_named("vllm").fact(Feature.EMBEDDING, Model("Gemma4ForConditionalGeneration", "gemma4"), "embed")
    assert fact.stance is Stance.REFUSES
