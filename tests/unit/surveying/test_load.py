"""Everything on this machine that can name a model, and what is said where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import Gemma4Config, LlamaConfig, PretrainedConfig

from graftkit.errors import BuildError, MissingDependencyError, ModelTypeError, SourceError
from graftkit.surveying.sources import load_config as load
from graftkit.surveying.sources.config_file import unknown_model_type
from graftkit.surveying.sources.load_config import LoadedConfig, load_config
from graftkit.surveying.sources.model_class import model_class_for, model_class_of, remote_model_class

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
MAIN_CODE = """
import pathlib, torch
from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedModel
pathlib.Path({mark!r}).touch()

class HutConfig(PretrainedConfig):
    model_type = "hut"

class HutModel(PreTrainedModel):
    config_class = HutConfig
    def __init__(self, config):
        super().__init__(config)
        self.proj = torch.nn.Linear(2, 2)
        self.post_init()

class Llama(LlamaForCausalLM):
    pass
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of the test's own, and no network, whatever the environment says."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model directory: name, the value (or text) of its config.json."""

    def write(name: str, config: Any = LLAMA) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    return write


def _refusal(source: Any, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        load_config(source, **options)
    return caught.value


def test_a_configuration_is_taken_as_it_is() -> None:
    config = LlamaConfig(hidden_size=64)
    assert load_config(config) == LoadedConfig(config, "config", "llama")


def test_a_directory_and_its_file(model: Callable[..., Path]) -> None:
    folder = model("here")
    from_directory = load_config(folder)
    assert (from_directory.origin, from_directory.name) == ("directory", str(folder))
    assert isinstance(from_directory.config, LlamaConfig)
    assert (from_directory.config.hidden_size, from_directory.config.name_or_path) == (64, str(folder))
    from_file = load_config(str(folder / "config.json"))
    assert (from_file.origin, from_file.config.name_or_path) == ("file", str(folder))
    assert from_file.config.to_dict() == from_directory.config.to_dict()


def test_a_file_of_another_name(model: Callable[..., Path]) -> None:
    file = (model("here") / "config.json").rename(model("there") / "mine.json")
    assert load_config(file).config.hidden_size == 64


def test_the_home_directory_is_expanded(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model("here").parent))
    assert load_config("~/here").origin == "directory"


def test_a_file_that_transformers_redirects(model: Callable[..., Path]) -> None:
    config = {"model_type": "mistral", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    assert load_config(model("here", config)).config.model_type == "ministral"


def test_a_model_type() -> None:
    loaded = load_config("gemma4")
    assert (loaded.origin, loaded.name, type(loaded.config)) == ("model type", "gemma4", Gemma4Config)


@pytest.mark.parametrize("model_type", ["nougat", "gemma4_assistant"])
def test_a_model_type_without_defaults(model_type: str) -> None:
    error = _refusal(model_type)
    assert (error.code, error.where) == ("config-invalid", model_type)


@pytest.mark.parametrize(
    ("written", "holds", "expected"),
    [
        ("gemma4", "nothing", "model type"),
        ("gemma4", "an adapter", "model type"),
        ("gemma4", "a file of that name", "model type"),
        ("gemma4", "a model", "directory"),
        ("./gemma4", "a model", "directory"),
        ("./gemma4", "nothing", "not-a-model-directory"),
        (Path("gemma4"), "a model", "directory"),
        (Path("gemma4"), "an adapter", "not-a-model-directory"),
        (Path("llama"), "nothing", "not-found"),
        ("mine", "nothing", "model-type-unknown"),
        ("mine.json", "nothing", "not-found"),
    ],
)
def test_a_directory_named_like_a_model_type(
    written: str | Path, holds: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "gemma4"
    if holds == "a file of that name":
        folder.write_text("notes")
    else:
        folder.mkdir()
    if holds == "a model":
        (folder / "config.json").write_text(json.dumps(LLAMA))
    if holds == "an adapter":
        (folder / "adapter_config.json").write_text("{}")
    if expected in ("model type", "directory"):
        assert load_config(written).origin == expected
    else:
        assert _refusal(written).code == expected


def test_a_path_wins_over_a_hub_id(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model("owner/name")
    (tmp_path / "owner" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("owner/name").origin == "directory"
    assert _refusal("owner/empty").code == "not-a-model-directory"
    assert _refusal("owner/absent").code == "hub-offline"


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_a_bare_id_is_a_cached_model_first(
    name: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    snapshot = empty_cache / f"models--{name}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 24}))
    refs = empty_cache / f"models--{name}" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = load_config(name)
    assert (loaded.origin, loaded.revision, loaded.config.n_embd) == ("cache", commit, 24)


def test_a_bare_id_that_is_not_cached() -> None:
    assert load_config("gpt2").origin == "model type"
    error = _refusal("distilgpt2")
    assert error.code == "model-type-unknown"
    assert "owner/name" in str(error.help)


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({}, ""),
        ({"adapter_config.json": '{"base_model_name_or_path": "a/b"}'}, "a/b"),
        ({"adapter_config.json": "{"}, "adapter"),
        ({"notes.txt": "", "b": ""}, "b, notes.txt"),
        (dict.fromkeys("abcdef", ""), "a, b, c, d, e and 1 more"),
    ],
    ids=["empty", "adapter", "broken adapter", "other", "many"],
)
def test_directories_that_hold_no_model(files: dict[str, str], shown: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    error = _refusal(folder)
    assert (error.code, error.where) == ("not-a-model-directory", str(folder))
    assert error.why
    assert shown in error.why


@pytest.mark.parametrize(
    ("config", "code", "why"),
    [
        pytest.param('{"model_type": "lla', "config-corrupt", "Unterminated", id="truncated"),
        pytest.param("", "config-corrupt", "Expecting value", id="empty"),
        pytest.param("<html>busy</html>", "config-corrupt", "Expecting value", id="not json"),
        pytest.param("[" * 200_000, "config-corrupt", "recursion", id="nested too deeply"),
        pytest.param('{"a": ' + "9" * 5000 + "}", "config-corrupt", "digits", id="huge number"),
        pytest.param("[1]", "config-without-model-type", "list", id="list"),
        pytest.param("{}", "config-without-model-type", "model_type", id="no type"),
        pytest.param({"model_type": 3}, "config-without-model-type", "model_type", id="type is a number"),
        pytest.param(
            {"peft_type": "LORA", "base_model_name_or_path": "a/b"},
            "config-without-model-type",
            "a/b",
            id="adapter",
        ),
        pytest.param(LLAMA | {"hidden_size": "wide"}, "config-invalid", "hidden_size", id="wrong value"),
        pytest.param(LLAMA | {"hidden_size": 7}, "config-invalid", "multiple", id="inconsistent values"),
    ],
)
def test_configurations_that_cannot_be_used(config: Any, code: str, why: str, model: Callable[..., Path]) -> None:
    folder = model("here", config)
    error = _refusal(folder)
    assert (error.code, error.where) == (code, str(folder / "config.json"))
    assert why in str(error.why)


def test_values_nested_deeply_do_no_harm(model: Callable[..., Path]) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"more": deep}
    assert load_config(model("here", LLAMA | {"extra": deep})).config.hidden_size == 64


def test_a_weight_file_is_not_read(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(2**36)
    error = _refusal(weights)
    assert error.code == "config-corrupt"
    assert str(2**36) in str(error.why)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\xff\xfe\x00")
    assert _refusal(tmp_path / "x.gguf").code == "config-corrupt"


@pytest.mark.parametrize(
    ("text", "near"),
    [("gemma5", "gemma4"), ("lama", "llama"), ("Gemma4", "gemma4"), ("qwen3.6", "qwen3"), ("gpt-oss", "gpt_oss")],
)
def test_an_unknown_model_type_suggests(text: str, near: str) -> None:
    error = _refusal(text)
    assert error.code == "model-type-unknown"
    assert repr(text) in error.what
    assert near in str(error.help)


def test_an_unknown_model_type_in_a_file_says_what_wrote_it(model: Callable[..., Path]) -> None:
    error = _refusal(model("here", {"model_type": "zzz", "transformers_version": "9.1.0"}))
    assert error.code == "model-type-unknown"
    assert isinstance(error, ModelTypeError)
    assert error.config == {"model_type": "zzz", "transformers_version": "9.1.0"}
    assert "9.1.0" in str(error.why)
    assert "pip install --upgrade transformers" in str(error.help)
    assert unknown_model_type("zzz", "here").config["transformers_version"] is None


@pytest.mark.parametrize("source", [None, 3, b"gemma4", {"model_type": "gemma4"}, LlamaConfig])
def test_what_cannot_name_a_model(source: Any) -> None:
    error = _refusal(source)
    assert error.code == "source-type"
    assert type(source).__name__ in error.what


@pytest.mark.parametrize("text", ["", ".nowhere", "a/b/c", "/no/such/thing", "x" * 5000, "a\0b", "no such", "~"])
def test_what_is_not_there(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    monkeypatch.chdir(tmp_path)
    assert _refusal(text).code in ("not-found", "model-type-unknown")


def test_family_data_is_not_changed_by_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"model_type": "gemma4", "text_config": {"hidden_size": 64, "num_hidden_layers": 6}}
    before = json.dumps(known)
    monkeypatch.setattr(load, "geometry", lambda hub_id: known)
    loaded = load_config("owner/name")
    assert (loaded.origin, loaded.config.text_config.hidden_size) == ("family data", 64)
    assert json.dumps(known) == before


@pytest.fixture
def with_code(
    model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, Path]]:
    """Write a model with code of its own; also gives the file that appears where the code was run."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def write(name: str, config: dict[str, Any]) -> tuple[Path, Path]:
        folder, mark = model(name, config), tmp_path / "code-was-run"
        (folder / "code.py").write_text(MAIN_CODE.format(mark=str(mark)))
        return folder, mark

    return write


HUT = {
    "model_type": "hut",
    "auto_map": {"AutoConfig": "code.HutConfig", "AutoModel": "code.HutModel", "AutoTokenizer": ["code.T", None]},
}


def test_a_directory_with_code(with_code: Callable[..., tuple[Path, Path]]) -> None:
    folder, mark = with_code("hut", HUT)
    error = _refusal(folder)
    assert (error.code, error.why) == ("remote-code", "auto_map names code.HutConfig")
    assert not mark.exists()
    loaded = load_config(folder, trust_remote_code=True)
    assert mark.exists()
    assert (type(loaded.config).__name__, loaded.code) == ("HutConfig", str(folder))
    model_class = remote_model_class(loaded)
    assert model_class is not None
    assert model_class(loaded.config).num_parameters() == 6


def test_model_code_for_a_known_type(with_code: Callable[..., tuple[Path, Path]]) -> None:
    config = LLAMA | {"architectures": ["Llama"], "auto_map": {"AutoModelForCausalLM": "code.Llama"}}
    folder, mark = with_code("hutlike", config)
    plain = load_config(folder)
    assert (plain.code, remote_model_class(plain)) == (None, None)
    assert not mark.exists()
    trusted = load_config(folder, trust_remote_code=True)
    assert type(trusted.config) is LlamaConfig
    model_class = remote_model_class(trusted)
    assert model_class is not None
    assert model_class.__name__ == "Llama"


def test_code_for_a_known_type_goes_first_where_it_may_run(
    with_code: Callable[..., tuple[Path, Path]],
) -> None:
    folder, _ = with_code("own", LLAMA | {"auto_map": {"AutoConfig": "code.HutConfig"}})
    assert type(load_config(folder).config) is LlamaConfig
    trusted = load_config(folder, trust_remote_code=True)
    assert type(trusted.config).__name__ == "HutConfig"
    assert remote_model_class(trusted) is None


def test_code_that_does_not_run(with_code: Callable[..., tuple[Path, Path]]) -> None:
    folder, _ = with_code("broken", HUT)
    (folder / "code.py").write_text("raise OSError('no such device')")
    error = _refusal(folder, trust_remote_code=True)
    assert error.code == "remote-code-failed"
    assert "no such device" in str(error.why)


@pytest.mark.parametrize(
    ("auto_map", "expected"),
    [([], 64), ("x", 64), ({}, 64), ({"AutoConfig": 3}, "config-invalid")],
)
@pytest.mark.parametrize("trust", [False, True])
def test_an_auto_map_that_names_no_code(
    auto_map: Any, expected: int | str, trust: bool, model: Callable[..., Path]
) -> None:
    folder = model("here", LLAMA | {"auto_map": auto_map})
    if isinstance(expected, int):
        assert load_config(folder, trust_remote_code=trust).config.hidden_size == expected
    else:
        assert _refusal(folder, trust_remote_code=trust).code == expected


def test_a_class_that_transformers_names_and_does_not_export() -> None:
    with pytest.raises(BuildError) as caught:
        model_class_of(load_config("voxtral_realtime_text"))
    assert caught.value.code == "no-model-class"


def test_a_model_that_reads_text_is_loaded_with_its_recognition_head() -> None:
    assert model_class_of(load_config("pp_ocrv6_tiny_rec")).__name__ == "PPOCRV6TinyRecForTextRecognition"


@pytest.mark.skipif(find_spec("torchaudio") is not None, reason="torchaudio is installed")
def test_a_class_whose_package_is_not_installed_is_an_error_that_names_it():
    with pytest.raises(MissingDependencyError) as caught:
        model_class_of(load_config("higgs_audio_v2_tokenizer"))
    assert "torchaudio" in caught.value.what
    assert "torchaudio" in caught.value.help


def test_a_type_imports_no_other_family() -> None:
    """The auto classes list hundreds of them, and would import each to compare it."""
    code = (
        "import sys\n"
        "from graftkit.surveying.survey import survey\n"
        "assert survey('llama').model.cls == 'LlamaForCausalLM'\n"
        "families = {n.split('.')[2] for n in sys.modules if n.startswith('transformers.models.')}\n"
        "assert not families & {'bert', 'whisper', 't5', 'clip'}, families"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_stranger_of_the_same_name_is_not_taken_for_it() -> None:
    class LlamaConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
        model_type = "llama"

    with pytest.raises(BuildError) as caught:
        model_class_for(LlamaConfig())
    assert caught.value.code == "no-model-class"


def test_a_class_of_several_types_has_its_model() -> None:
    """One configuration can serve several model types, and not every one of them has a model."""
    from transformers import GPT2Config

    assert model_class_for(GPT2Config()).__name__ == "GPT2LMHeadModel"


def test_a_registered_class_has_its_model() -> None:
    from transformers import AutoModel, LlamaModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    class HouseConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
        model_type = "house"

    class House(LlamaModel):  # type: ignore[misc]  # transformers is untyped
        config_class = HouseConfig

    AutoModel.register(HouseConfig, House)
    try:
        assert model_class_for(HouseConfig()) is House
    finally:
        MODEL_MAPPING._extra_content.pop(HouseConfig)
