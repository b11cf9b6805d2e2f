"""A live server is asked what it does with an adapter: real models answer, in the forms that servers have."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.unit.serving.live_server import Live, serving, sleeping
from tests.unit.serving.signed import Signed, write_signed
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftkit as gk
from graftkit.adapters.file import RECORD_NAME
from graftkit.adapters.record import AdapterRecord, write_record
from graftkit.engines.outcome import Outcome
from graftkit.errors import AdapterError, GraftError, ServerError
from graftkit.serving.probe import report_of

KEY = "sk-secret-0123456789"
CARDS = [
    {"id": "base", "owned_by": "vllm", "parent": None},
    {"id": "tuned", "owned_by": "vllm", "parent": "base"},
]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRAFT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def adapted(signed: Signed, factor: float = 1.0, without: str | None = None) -> torch.nn.Module:
    """Return the adapted model, its update scaled; or without the part of it in some modules."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(signed.base), signed.adapter)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            share = 0.0 if without is not None and without in name else factor
            module.scaling = {adapter: value * share for adapter, value in module.scaling.items()}
    return model.eval()


def another_base(signed: Signed) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(signed.base)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def live(signed: Signed) -> Live:
    """A server as vLLM's, which applies the adapter."""
    base = AutoModelForCausalLM.from_pretrained(signed.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(signed.base)
    return Live(tokenizer, {"base": base, "tuned": adapted(signed)}, cards=CARDS, form="ids")


def with_models(live: Live, **models: torch.nn.Module) -> Live:
    return replace(live, models={**live.models, **models}, requests=[])


def probed(live: Live, signed: Signed, **options: Any) -> Any:
    with serving(live) as url:
        return gk.probe(url, signed.adapter, **options)


FORMS = [
    pytest.param({"form": "openai"}, id="completions, texts"),
    pytest.param({"form": "ids"}, id="completions, ids"),
    pytest.param({"form": "list", "takes_ids": False}, id="completions, lists"),
    pytest.param({"form": "ids", "most": 5}, id="five only"),
]


@pytest.mark.parametrize("form", FORMS)
def test_applied(live: Live, signed: Signed, form: dict[str, Any]) -> None:
    found = probed(replace(live, **form), signed)
    assert found.outcome is Outcome.APPLIED
    assert found.factor == pytest.approx(1, abs=0.02)
    assert found.effect > 0.5
    assert found.error < 1e-3
    assert found.base_error < 1e-3
    assert found.compared >= 7


@pytest.mark.parametrize("form", FORMS)
def test_ignored(live: Live, signed: Signed, form: dict[str, Any]) -> None:
    found = probed(replace(with_models(live, tuned=live.models["base"]), **form), signed)
    assert (found.outcome, found.factor) == (Outcome.IGNORED, 0)
    assert report_of(found).errors


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.7, 1.4, 1.8])
def test_scaled(live: Live, signed: Signed, factor: float) -> None:
    """Between the scales that are in the record, the factor is read from a curve."""
    found = probed(with_models(live, tuned=adapted(signed, factor)), signed)
    assert found.outcome is Outcome.SCALED
    assert found.factor == pytest.approx(factor, abs=0.05)


def test_scaled_beyond_what_the_record_has(live: Live, signed: Signed) -> None:
    found = probed(with_models(live, tuned=adapted(signed, 3.0)), signed)
    assert found.outcome is not Outcome.APPLIED
    assert not report_of(found).proven


def test_one_kind_of_module_left_out(live: Live, signed: Signed) -> None:
    found = probed(with_models(live, tuned=adapted(signed, without="down_proj")), signed)
    assert found.outcome is Outcome.DIFFERENT


def test_another_base(live: Live, signed: Signed) -> None:
    other = another_base(signed)
    found = probed(with_models(live, base=other, tuned=PeftModel.from_pretrained(other, signed.adapter)), signed)
    assert found.outcome is Outcome.OTHER_BASE


def test_the_names_exchanged(live: Live, signed: Signed) -> None:
    found = probed(live, signed, model="base", base="tuned")
    assert found.outcome is Outcome.OTHER_BASE


def test_another_template(live: Live, signed: Signed) -> None:
    template = "{% for m in messages %}### {{ m['role'] }}\n\n{{ m['content'] }}\n\n{% endfor %}### Response:\n"
    found = probed(replace(live, chat_template=template), signed)
    assert found.outcome is Outcome.OTHER_TEMPLATE


@pytest.mark.parametrize("takes_ids", [True, False])
def test_a_tokenizer_that_makes_other_ids(live: Live, signed: Signed, takes_ids: bool) -> None:
    """As one that puts a token before each text, where training had none."""

    class Other:
        def __init__(self, tokenizer: Any) -> None:
            self.inner = tokenizer

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *self.inner(text)["input_ids"]]}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    found = probed(replace(live, tokenizer=Other(live.tokenizer), takes_ids=takes_ids), signed)
    assert found.outcome is Outcome.OTHER_TEMPLATE
    # What it answers to another prompt is compared with nothing.
    assert found.error is None or found.error < 1e-3


def test_a_coarse_engine(live: Live, signed: Signed) -> None:
    """Errors of half precision, measured on the base, do not hide what is done with the adapter."""
    coarse = replace(live, noise=0.03)
    assert probed(coarse, signed).outcome is Outcome.APPLIED
    scaled = probed(with_models(coarse, tuned=adapted(signed, 0.5)), signed)
    assert scaled.outcome is Outcome.SCALED
    assert scaled.factor == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("std", "outcome"), [(0.06, Outcome.APPLIED), (0.25, Outcome.UNKNOWN)])
def test_a_server_in_half_precision(std: float, outcome: Outcome, tmp_path: Path) -> None:
    """A strong adapter has several times its base's error there; that is no other adapter."""
    signed = write_signed(tmp_path, "llama", std=std)
    base = AutoModelForCausalLM.from_pretrained(signed.base).eval().bfloat16()
    models = {"base": base, "tuned": adapted(signed).bfloat16()}
    live = Live(AutoTokenizer.from_pretrained(signed.base), models, cards=CARDS, form="ids")
    assert probed(live, signed).outcome is outcome
    dropped = with_models(live, tuned=adapted(signed, without="down_proj").bfloat16())
    assert probed(dropped, signed).outcome is Outcome.DIFFERENT


def test_an_engine_too_coarse_to_tell(live: Live, signed: Signed) -> None:
    found = probed(replace(live, noise=0.4), signed)
    assert found.outcome is Outcome.UNKNOWN
    assert found.says


def test_without_the_base(live: Live, signed: Signed) -> None:
    """Only what is very near to an expected value can be told."""
    alone = replace(live, cards=[{"id": "tuned", "owned_by": "me"}])
    assert probed(alone, signed).outcome is Outcome.APPLIED
    assert probed(with_models(alone, tuned=live.models["base"]), signed).outcome is Outcome.IGNORED
    found = probed(with_models(alone, tuned=another_base(signed)), signed)
    assert found.outcome is Outcome.UNKNOWN
    assert found.base_error is None


def test_a_server_whose_adapters_a_request_switches_off(live: Live, signed: Signed) -> None:
    """As llama.cpp's own has it: one model, and the adapter's scale in the request."""
    cards, loras = [{"id": "tuned", "owned_by": "llamacpp"}], [{"id": 0, "path": "adapter.gguf", "scale": 1.0}]
    one = replace(live, cards=cards, loras=loras, form="list")
    found = probed(one, signed)
    assert found.outcome is Outcome.APPLIED
    assert found.base_error is not None
    ignoring = with_models(one, tuned=live.models["base"])
    assert probed(ignoring, signed).outcome is Outcome.IGNORED


def test_a_list_of_bases_is_not_taken_for_the_adapter(live: Live, signed: Signed) -> None:
    """mlx_lm.server lists the folder of the base, and no owner."""
    assert error_of(replace(live, cards=[{"id": "base"}]), signed).code == "server-no-model"


def test_no_log_probabilities(live: Live, signed: Signed) -> None:
    found = probed(replace(live, most=0), signed)
    assert found.outcome is Outcome.UNKNOWN
    assert report_of(found).findings[0].severity is gk.Severity.UNKNOWN


def test_too_few_log_probabilities(live: Live, signed: Signed) -> None:
    """Two of a whole record agree, which may be chance."""
    found = probed(replace(live, form="openai", most=2), signed)
    assert found.outcome is Outcome.UNKNOWN
    assert found.compared < 6


def test_a_server_without_a_list_of_models(live: Live, signed: Signed) -> None:
    unlisted = replace(live, cards=None)
    assert probed(unlisted, signed, model="tuned", base="base").outcome is Outcome.APPLIED
    with pytest.raises(ServerError) as caught, serving(unlisted) as url:
        gk.probe(url, signed.adapter)
    assert caught.value.code == "server-no-model"


def test_an_adapter_signed_without_a_tokenizer(live: Live, signed: Signed, tmp_path: Path) -> None:
    """It has ids alone, and its tokens no text."""
    model = adapted(signed)
    model.save_pretrained(tmp_path)
    gk.sign(model, None, tmp_path)
    with serving(live) as url:
        assert gk.probe(url, tmp_path).outcome is Outcome.APPLIED
    with serving(replace(live, form="openai")) as url:
        assert gk.probe(url, tmp_path).outcome is Outcome.UNKNOWN


# ---- what goes wrong ----


def failed(call: Callable[[], Any]) -> GraftError:
    with pytest.raises(GraftError) as caught:
        call()
    assert caught.value.help
    return caught.value


def error_of(live: Live, signed: Signed, **options: Any) -> GraftError:
    with serving(live) as url:
        return failed(lambda: gk.probe(url, signed.adapter, **options))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param(lambda path, body: (200, b"<html><body>Welcome</body></html>"), "server-answer", id="HTML"),
        pytest.param(lambda path, body: (200, b""), "server-no-model", id="nothing"),
        pytest.param(lambda path, body: (200, b"[" * 100_000), "server-answer", id="deep JSON"),
        pytest.param(lambda path, body: (401, b'{"error": "no key"}'), "server-refused", id="no key"),
        pytest.param(lambda path, body: (503, b'{"error": "loading"}'), "server-refused", id="not ready"),
        pytest.param(lambda path, body: (307, b"http://127.0.0.1:1/"), "server-no-model", id="a redirect"),
        pytest.param(sleeping(0.6), "server-timeout", id="slow"),
        pytest.param(
            lambda path, body: None if body is None else (200, b"<html>"), "server-answer", id="HTML to a prompt"
        ),
        pytest.param(
            lambda path, body: (
                None if body is None else (400, b'{"error": {"message": "logprobs is not allowed"}}')
            ),
            "server-refused",
            id="no log-probabilities",
        ),
        pytest.param(lambda path, body: None if body is None else (429, b"{}"), "server-refused", id="too many"),
    ],
)
def test_faults(live: Live, signed: Signed, fault: Any, code: str) -> None:
    assert error_of(replace(live, fault=fault), signed, timeout=0.3).code == code


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'"text"', b"3", b'{"choices": [{"logprobs": {"content": 3}}]}']
)
def test_answers_without_sense_are_unknown(live: Live, signed: Signed, content: bytes) -> None:
    strange = replace(live, fault=lambda path, body: None if body is None else (200, content))
    assert probed(strange, signed).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("options", [{"model": "tunes"}, {"model": "tuned", "base": "none"}])
def test_no_such_model(live: Live, signed: Signed, options: dict[str, str]) -> None:
    assert error_of(live, signed, **options).code == "server-no-model"
    assert error_of(replace(live, cards=[{"id": "default"}]), signed, **options).code == "server-no-model"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("localhost:8000", "server-url"),
        ("ftp://localhost", "server-url"),
        ("http://", "server-url"),
        ("http://host:port", "server-url"),
        ("http://ho st/", "server-url"),
        ("", "server-url"),
        ("http://127.0.0.1:1", "server-unreachable"),
        ("http://no-such-host.invalid", "server-unreachable"),
    ],
)
def test_addresses(signed: Signed, url: str, code: str) -> None:
    assert failed(lambda: gk.probe(url, signed.adapter, timeout=5)).code == code


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/completions", "/v1/chat/completions"])
def test_every_way_to_write_the_address(live: Live, signed: Signed, path: str) -> None:
    with serving(live) as url:
        assert gk.probe(url + path, signed.adapter).outcome is Outcome.APPLIED


def test_a_server_that_closes_the_connection(signed: Signed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert failed(lambda: gk.probe(f"http://127.0.0.1:{port}", signed.adapter)).code == "server-unreachable"


def test_adapters_that_say_nothing(live: Live, signed: Signed, tmp_path: Path) -> None:
    def code(folder: Path) -> str:
        with serving(live) as url:
            return failed(lambda: gk.probe(url, folder)).code

    assert code(tmp_path / "none") == "adapter-not-found"
    assert code(tmp_path) == "adapter-not-signed"
    write_record(tmp_path, AdapterRecord(unknown={"expected": "sharded"}))
    assert code(tmp_path) == "adapter-not-signed"
    (tmp_path / RECORD_NAME).write_text("{")
    assert code(tmp_path) == "adapter-record"
    assert issubclass(AdapterError, GraftError)


# ---- the key ----


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRAFT_API_KEY", KEY)
    return KEY


def test_the_key_is_sent(live: Live, signed: Signed, key: str) -> None:
    probed(with_models(live), signed)
    asked = with_models(live)
    probed(asked, signed)
    assert {headers.get("Authorization") for _, headers, _ in asked.requests} == {f"Bearer {key}"}


def echoing(path: str, body: Any) -> tuple[int, bytes]:
    """Some servers repeat the key in their refusal."""
    return 401, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()


def test_the_key_is_in_no_error(live: Live, signed: Signed, key: str) -> None:
    for fault in (echoing, lambda path, body: (401, KEY.encode()), lambda path, body: (200, KEY.encode())):
        error = error_of(replace(live, fault=fault), signed)
        shown = f"{error}{error!r}{error.to_dict()}{error.__cause__}{error.__context__}"
        assert KEY not in shown


def test_the_key_does_not_follow_a_redirect(live: Live, signed: Signed, key: str) -> None:
    other = with_models(live)
    with serving(other) as elsewhere:
        to = elsewhere.encode() + b"/v1/models"
        error_of(replace(live, fault=lambda path, body: (302, to)), signed)
    assert other.requests == []


@pytest.mark.parametrize("url", ["http://user:pass-word@localhost:8000", "http://pass-word@localhost"])
def test_a_key_in_the_address_is_refused(signed: Signed, url: str) -> None:
    error = failed(lambda: gk.probe(url, signed.adapter))
    assert error.code == "server-url"
    assert "pass-word" not in f"{error}{error.to_dict()}"


def test_a_key_that_is_no_header(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "pass\nword")
    error = failed(lambda: gk.probe("http://127.0.0.1:1", signed.adapter))
    assert error.code == "server-key"
    assert "word" not in str(error)


# ---- the command ----


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom graftkit.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules), 'heavy'"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_command_needs_no_torch(live: Live, signed: Signed) -> None:
    with serving(live) as url:
        done = run("probe", url, "--adapter", str(signed.adapter), "--json")
        assert (done.returncode, done.stderr.strip()) == (0, "")
        (finding,) = json.loads(done.stdout)["findings"]
        assert (finding["code"], finding["severity"]) == ("GK706", "ok")
        assert finding["evidence"]["outcome"] == "applied"
        missing = run("probe", url, "--adapter", str(signed.adapter), "--model", "nothing")
        assert missing.returncode == 2
        assert "heavy" not in missing.stderr
    with serving(with_models(live, tuned=live.models["base"])) as url:
        assert run("probe", url, "--adapter", str(signed.adapter)).returncode == 1
