"""Hub ids: what is fetched, from where, and what is said where it cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.unit.surveying.conftest import Answers, LocalHub

PROBE = ("HEAD", "config.json")
GET = ("GET", "config.json")


def test_only_the_configuration_is_fetched(online: Answers, local_hub: LocalHub) -> None:
    answer = online["first"]
    assert (answer["origin"], answer["name"], answer["base"]) == ("hub", "tiny/llama", "tiny/llama")
    assert answer["revision"] == local_hub.repos["tiny/llama"].commit
    assert answer["config"]["hidden_size"] == 64
    # One to see whether the hub answers, then huggingface_hub's own two.
    assert local_hub.asked("tiny/llama") == [PROBE, PROBE, GET]


def test_a_cached_file_costs_one_question(online: Answers, local_hub: LocalHub) -> None:
    assert online["again"]["origin"] == "hub"
    assert online["again"]["config"] == online["fetched-before"]["config"]
    assert local_hub.asked("tiny/llama-twice") == [PROBE, PROBE, GET, PROBE]


def test_the_token_and_the_endpoint_of_the_environment_are_used(online: Answers, local_hub: LocalHub) -> None:
    tokens = {request.token for request in local_hub.requests if request.repo == "tiny/llama"}
    assert tokens == {"Bearer hf_local_test_token"}


def test_a_revision_is_asked_for(online: Answers, local_hub: LocalHub) -> None:
    assert online["revision"]["revision"] == local_hub.repos["tiny/llama-v2"].commit
    assert online["no-revision"]["code"] == "hub-no-revision"
    assert "'v3'" in online["no-revision"]["what"]


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        ("missing", "hub-not-found", "HF_TOKEN"),
        ("private", "hub-not-found", "HF_TOKEN"),
        ("bad-token", "hub-not-found", "HF_TOKEN"),
        ("disabled", "hub-not-found", "disabled"),
        ("gated", "hub-gated", "/tiny/gated and set HF_TOKEN"),
        ("forbidden", "hub-gated", "accept the terms"),
        ("down", "hub-offline", "503"),
        ("odd", "hub-error", "418"),
        ("adapter", "hub-no-config", "name the base model: tiny/llama"),
        ("other", "hub-no-config", "not those of a transformers model"),
        ("truncated", "config-corrupt", "tiny/truncated"),
        ("huge", "hub-file-too-large", "100000000000 bytes"),
        ("spelling", "not-found", "owner/name"),
    ],
)
def test_what_the_hub_refuses(case: str, code: str, said: str, online: Answers) -> None:
    answer = online[case]
    assert answer["code"] == code
    assert said in " ".join(str(answer[key]) for key in ("what", "where", "why", "help"))
    assert answer["seconds"] < 5


def test_a_bare_word_is_never_asked_for(online: Answers, local_hub: LocalHub) -> None:
    assert online["legacy"]["code"] == "model-type-unknown"
    # The three requests are those of hf_hub_download, which put it into the cache.
    assert local_hub.asked("tiny-legacy") == [PROBE, GET]


def test_code_is_neither_run_nor_fetched_unless_allowed(online: Answers, local_hub: LocalHub) -> None:
    assert online["closed"]["code"] == "remote-code"
    assert "configuration_house.HouseConfig" in online["closed"]["why"]
    assert local_hub.asked("tiny/closed") == [PROBE, PROBE, GET]
    assert online["code-was-run"]["yes"] is False


def test_code_runs_where_it_is_allowed(online: Answers, local_hub: LocalHub) -> None:
    config = online["open"]
    assert (config["class"], config["code"], config["config"]["width"]) == ("HouseConfig", "tiny/open", 6)
    # A 6 x 6 linear and its bias; the causal model, as the configuration's architectures say.
    assert (online["open-model"]["class"], online["open-model"]["parameters"]) == ("HouseForCausalLM", 42)
    assert online["code-was-run-then"]["yes"] is True
    fetched = {file for _, file in local_hub.asked("tiny/open")}
    assert fetched == {"config.json", "configuration_house.py", "modeling_house.py"}


def _check_away(answers: Answers, local_hub: LocalHub) -> None:
    cached = answers["cached"]
    assert (cached["origin"], cached["config"]["hidden_size"]) == ("cache", 64)
    assert cached["revision"] == local_hub.repos["tiny/llama"].commit
    assert answers["cached-revision"]["origin"] == "cache"
    assert answers["other-revision"]["code"] == "hub-offline"
    assert "config.json --revision v2`" in answers["other-revision"]["help"]
    assert answers["unknown"]["code"] == "hub-offline"
    assert "hf download tiny/never-fetched config.json" in answers["unknown"]["help"]
    assert answers["cached-and-known"]["origin"] == "cache"
    known = answers["known"]
    assert (known["origin"], known["base"], known["config"]["hidden_size"]) == ("family data", "tiny/known", 96)
    assert answers["known-revision"]["code"] == "hub-offline"
    assert answers["adapter"]["code"] == "hub-no-config"
    assert answers["closed"]["code"] == "remote-code"
    assert (answers["open"]["origin"], answers["open"]["class"]) == ("cache", "HouseConfig")
    legacy = answers["legacy"]
    assert (legacy["origin"], legacy["name"]) == ("cache", "tiny-legacy")


def test_a_file_in_a_folder_has_the_commit_of_its_repository(
    online: Answers, offline: Answers, local_hub: LocalHub
) -> None:
    commit = local_hub.repos["tiny/nested"].commit
    assert (online["nested"]["commit"], offline["nested"]["commit"]) == (commit, commit)


def test_offline_nothing_is_asked_for(offline: Answers, local_hub: LocalHub) -> None:
    _check_away(offline, local_hub)
    assert offline["unknown"]["why"] == "offline mode is on (HF_HUB_OFFLINE)"
    assert offline["requests"] == {"count": 0}


def test_an_unreachable_hub_is_given_up_at_once(unreachable: Answers, local_hub: LocalHub) -> None:
    _check_away(unreachable, local_hub)
    assert "ConnectError" in unreachable["unknown"]["why"]
    slowest: Any = max(answer["seconds"] for name, answer in unreachable.items() if name != "cached")
    assert slowest < 5


def test_a_hub_that_does_not_answer_is_given_up(silent: Answers) -> None:
    assert silent["unknown"]["code"] == "hub-offline"
    assert "Timeout" in silent["unknown"]["why"]
    # HF_HUB_ETAG_TIMEOUT is 1 there. The rest is what importing the library takes.
    assert silent["unknown"]["seconds"] < 6
