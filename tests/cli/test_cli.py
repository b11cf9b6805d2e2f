"""The command line is a contract: JSON on stdout, everything else on stderr, and the exit status."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import fields_of, forked, graft, refused

from graftkit.cli.commands.verify import ATTACHING
from graftkit.cli.group import COMMANDS, Group
from graftkit.cli.launch import without_launch

E2B = "google/gemma-4-E2B-it"


def test_survey_json() -> None:
    done = graft("survey", E2B, "--json")
    assert done.returncode == 0
    fields = fields_of(done)
    assert fields["model"]["origin"] == "family data"
    assert {t["name"] for t in fields["towers"]} == {"vision", "language", "audio", "projector", "head"}
    wrapped = [s for s in fields["sites"] if s["wrapper"]]
    assert wrapped[0]["wrapper"].keys() == {"class", "path"}


def test_survey_for_people() -> None:
    done = graft("survey", "llama")
    assert done.returncode == 0
    assert "self_attn.q_proj" in done.stdout
    assert "\x1b[" not in done.stdout


def test_plan_json_and_written_configuration(tmp_path: Path) -> None:
    target = tmp_path / "adapter_config.json"
    done = graft("plan", E2B, "--scope", "language,vision", "--r", "8", "--write", str(target), "--format", "json")
    assert done.returncode == 0, done.stderr
    fields = fields_of(done)
    assert fields["scope"] == ["language", "vision"]
    assert json.loads(target.read_text()) == fields["peft_config"]
    assert str(target.name) in done.stderr

    from peft import LoraConfig

    assert LoraConfig.from_pretrained(tmp_path).r == 8


def test_verify_the_twin() -> None:
    done = graft("verify", "llama", "--twin", "--json", "-r", "4")
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.splitlines()) <= {ATTACHING}, "what libraries say of the checks' own batches is no news"
    fields = fields_of(done)
    assert fields["summary"].keys() == {"error", "warning", "info", "unknown", "ok"}
    assert {f["code"] for f in fields["findings"] if f["severity"] == "ok"} >= {
        "GK115",
        "GK203",
        "GK508",
        "GK601",
        "GK607",
    }
    contract = {"code", "severity", "title", "where", "message", "help", "url", "source", "fix"}
    assert contract <= fields["findings"][0].keys()
    assert fields["twin"]["changes"]["num_hidden_layers"] == {"source": 32, "twin": 2}


def test_verify_exits_1_on_a_finding() -> None:
    # Llava takes its features from the last layer but one: the last layer's adapters never get a gradient.
    # A plan leaves them out unless they are named.
    last = "model.vision_tower.encoder.layers.1.mlp.fc1"
    done = forked("verify", "llava", "--twin", "--scope", "vision", "--targets", last, "--json", "-r", "4")
    assert done.returncode == 1, done.stderr
    failing = [f for f in fields_of(done)["findings"] if f["severity"] == "error"]
    assert [f["code"] for f in failing] == ["GK203"]


def test_env() -> None:
    fields = fields_of(graft("env", "--json"))
    assert fields["packages"]["graftkit"] == "0.1.0"
    assert fields["system"]["python"] == sys.version.split()[0]


def test_version() -> None:
    said = graft("--version").stdout.strip()
    assert said == "0.1.0"
    assert f"graftkit: {said}" in graft("env").stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    script = "import sys; sys.argv[0] = 'graft'; from graftkit.cli.main import main; main()"
    words = {"COMP_WORDS": "graft mer", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "graft mer"}
    environment = {
        **os.environ,
        **words,
        "_GRAFT_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "merge" in done.stdout
    assert "train" not in done.stdout


def _corrupt(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return str(folder)


def _empty(folder: Path) -> str:
    return str(folder)


@pytest.mark.parametrize(
    ("args", "code", "name"),
    [
        pytest.param(["survey", "gemma5"], "model-type-unknown", "gemma", id="unknown model type"),
        pytest.param(["survey", "owner/name"], "hub-offline", "owner/name", id="hub id offline"),
        pytest.param(["survey", "./nowhere"], "not-found", "nowhere", id="no such path"),
        pytest.param(["survey", _empty], "not-a-model-directory", "config.json", id="not a model directory"),
        pytest.param(["survey", _corrupt], "config-corrupt", "config.json", id="corrupt config.json"),
        pytest.param(["plan", "llama", "--scope", "vision"], "scope-missing", "language", id="no such tower"),
        pytest.param(["plan", "llama", "--targets", "q_prj"], "target-unmatched", "q_proj", id="no such target"),
        pytest.param(
            ["plan", "llama", "--targets", "input_layernorm"],
            "target-not-adaptable",
            "input_layernorm",
            id="only norms",
        ),
        pytest.param(
            ["plan", "mixtral", "-t", "attention,mlp", "--strict"],
            "target-unmatched",
            "experts",
            id="no such role",
        ),
        pytest.param(["plan", "llama", "--rank", "0"], "rank-invalid", "r=16", id="rank 0"),
        pytest.param(["plan", "llama", "--rank", "many"], "usage", "--help", id="rank is no number"),
        pytest.param(["plan"], "usage", "--help", id="no model"),
        pytest.param(["plant", "llama"], "usage", "--help", id="no such command"),
        pytest.param(["survey", "llama", "--frmat", "json"], "usage", "--help", id="no such option"),
    ],
)
def test_bad_input(tmp_path: Path, args: list[Any], code: str, name: str) -> None:
    error = refused(*(arg(tmp_path) if callable(arg) else arg for arg in args))
    assert error["code"] == code
    assert error["help"]
    assert name in json.dumps(error)


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A hub cache with the model's configuration, and none of its weights."""
    commit = "0" * 40
    repository = tmp_path / "home" / "hub" / "models--tiny--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    return tmp_path / "home"


@pytest.mark.parametrize(
    "away", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}]
)
@pytest.mark.parametrize(
    "args",
    [["verify", "tiny/llama"], ["rekey", "tiny/llama", "out"], ["survey", "tiny/llama", "--headers"]],
    ids=lambda args: args[0],
)
def test_weights_that_are_not_here(
    config_only: Path, tmp_path: Path, args: list[str], away: dict[str, str]
) -> None:
    """The repository may well have them: what is missing is the hub."""
    done = graft(*args, "--json", cwd=tmp_path, HF_HOME=str(config_only), **away)
    error = fields_of(done)["error"]
    assert (done.returncode, error["code"], error["where"]) == (2, "weights-not-local", "tiny/llama")
    assert "hf download tiny/llama" in error["help"]


def test_weights_of_a_model_that_graftkit_only_knows_the_shape_of(tmp_path: Path) -> None:
    error = fields_of(graft("verify", E2B, "--json", HF_HOME=str(tmp_path)))["error"]
    assert (error["code"], error["where"]) == ("weights-not-local", E2B)


def test_an_error_for_people_goes_to_stderr() -> None:
    done = graft("plan", "llama", "--rank", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "[rank-invalid]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_traceback_only_when_asked() -> None:
    done = graft("plan", "llama", "--rank", "0", GRAFT_DEBUG="1")
    assert "Traceback" in done.stderr


def test_writing_where_one_may_not_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = forked("plan", "llama", "--write", str(tmp_path / "file" / "config.json"), "--json")
    assert done.returncode == 2
    assert fields_of(done)["error"]["code"] == "output-not-writable"
    assert (tmp_path / "file").read_text() == "mine"


def test_graft_alone_shows_its_help() -> None:
    done = forked()
    assert done.returncode == 2
    assert "survey" in done.stdout
    assert "error" not in done.stderr


def test_help_lists_each_command_with_all_that_it_does() -> None:
    """No summary is cut short, whatever the width of the terminal."""
    for columns in ("60", "200"):
        shown = graft("--help", COLUMNS=columns)
        assert shown.returncode == 0
        text = " ".join(shown.stdout.split())
        for name in COMMANDS:
            stem = name.replace("-", "_")
            function = getattr(importlib.import_module(f"graftkit.cli.commands.{stem}"), stem)
            summary = " ".join(function.__doc__.partition("\n\n")[0].split())
            assert f" {name} {summary}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_its_options(name: str) -> None:
    shown = graft(name, "--help", COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    words = set(shown.stdout.replace(",", " ").split())
    shown_ones = [p for p in Group().commands[name].params if not getattr(p, "hidden", False)]
    assert {option for p in shown_ones for option in p.opts if option.startswith("-")} <= words
    assert "--help" in words


@pytest.mark.parametrize("command", [["survey", E2B], ["plan", E2B, "--scope", "language,vision"]])
def test_html_is_one_self_contained_page(command: list[str]) -> None:
    done = forked(*command, "--format", "html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().startswith("<!doctype html>")
    assert "self_attn.q_proj.linear" in done.stdout
    assert "://" not in done.stdout.replace("http://www.w3.org/", "")


def test_a_result_without_a_page_says_so() -> None:
    done = forked("env", "--format", "html")
    assert done.returncode == 2
    assert "[format-unsupported]" in done.stderr


def test_plan_explains_one_site() -> None:
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    done = forked("plan", E2B, "--scope", "language,vision", "--explain", path)
    assert done.returncode == 0, done.stderr
    assert f"{path}.linear" in done.stdout


def test_plan_takes_any_method_and_its_options() -> None:
    done = forked("plan", "llama", "-m", "ia3", "--json")
    assert done.returncode == 0, done.stderr
    assert fields_of(done)["peft_config"]["peft_type"] == "IA3"
    done = forked(
        "plan", "llama", "-q", "4bit", "-o", "use_rslora=true", "-o", "init_lora_weights=gaussian", "--json"
    )
    assert done.returncode == 0, done.stderr
    config = fields_of(done)["peft_config"]
    assert (config["use_rslora"], config["init_lora_weights"], config["r"]) == (True, "gaussian", 16)
    assert fields_of(done)["quantization"]["bits"] == "4bit"


def test_plan_for_people_names_what_quantization_leaves() -> None:
    done = forked("plan", "google/gemma-4-26B-A4B-it", "-q", "4bit")
    assert done.returncode == 0, done.stderr
    assert "4bit" in done.stdout
    assert "30 of 30" in done.stdout


def test_rules_are_listed_and_shown() -> None:
    listed = fields_of(graft("rules", "--json"))["rules"]
    assert {"GK115", "GK203", "GK508", "GK601", "GK607"} <= {rule["code"] for rule in listed}
    page = graft("rules", "gk601")
    assert page.returncode == 0
    assert "GK601" in page.stdout
    assert refused("rules", "GK6O1")["code"] == "rule-unknown"


def test_unknown_can_fail_too() -> None:
    assert forked("verify", "llama", "--twin", "-m", "beft", "--json").returncode == 0
    assert forked("verify", "llama", "--twin", "-m", "beft", "--fail-level", "unknown", "--json").returncode == 1


def test_spaces_after_commas_are_no_part_of_a_name() -> None:
    done = forked("plan", "llama", "--targets", "q_proj, v_proj", "--json")
    assert fields_of(done)["targets"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("shell", "status"),
    [pytest.param("{graft} survey llama --json | true", 141, id="closed pipe"),
     pytest.param("{graft} survey llama --json > /dev/full", 2, id="full disk"),
     pytest.param("{graft} survey llama --json >&-", 2, id="closed stdout"),
     pytest.param("{graft} survey llama --json <&- >&-", 2, id="closed stdin and stdout")],
)  # fmt: skip
def test_output_that_cannot_be_written_is_no_traceback(shell: str, status: int) -> None:
    command = f"{sys.executable} -c 'from graftkit.cli.main import main; main()'"
    script = f"set -o pipefail; {shell.format(graft=command)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert status != 2 or "output-not-writable" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-"])
def test_without_stderr_the_result_is_written(closed: str) -> None:
    command = f"{sys.executable} -c 'from graftkit.cli.main import main; main()' survey llama --json {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0
    assert json.loads(done.stdout)["sites"]


@pytest.mark.parametrize("architectures", [[1], ["set_seed"], ["AutoModel"], ["LlamaConfig"]])
def test_odd_architectures_fall_back_to_the_type(tmp_path: Path, architectures: list[Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": architectures}))
    done = forked("survey", str(tmp_path), "--json")
    fields = json.loads(done.stdout)
    assert done.returncode == 0 or fields["error"]["code"] == "config-invalid"


@pytest.mark.parametrize("words", [("verify", "llama", "--twin"), ("doctor",)])
def test_a_fix_needs_a_file(tmp_path: Path, words: tuple[str, ...]) -> None:
    error = refused(*words, "--fix", cwd=tmp_path)
    assert error["code"] == "usage"
    assert "--recipe" in error["help"]


@pytest.mark.parametrize(
    "given",
    [
        ["--launch", "2"],
        ["--launch=2"],
        ["--launch", "3", "--launch", "2"],
        ["--launch=3", "--launch", "2", "--launch=2"],
    ],
)
def test_a_launch_is_launched_once(given: list[str]) -> None:
    for words in (["train", "r.yaml", "--resume", *given], ["train", *given, "r.yaml", "--resume"]):
        assert without_launch(words) == ["train", "r.yaml", "--resume"]
