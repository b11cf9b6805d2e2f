"""The targets given to PEFT match the planned paths and nothing else, for any set of paths."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from graftkit.planning.matching import (
    LONGEST_NAME,
    key_matches,
    matched_by,
    rewritten_names,
    smallest_exact,
    target_matcher,
    value_at,
)

_parts = st.sampled_from(["layers", "0", "1", "12", "attn", "q", "k", "linear", "mlp", "a_b", "w1"])
_paths = st.lists(st.lists(_parts, min_size=1, max_size=5).map(".".join), min_size=1, max_size=25, unique=True)


@given(paths=_paths, data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_choice_has_an_exact_form(paths: list[str], data: st.DataObject) -> None:
    planned = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    regex_is_safe = data.draw(st.booleans())
    targets = smallest_exact(planned, paths, regex_is_safe=regex_is_safe)
    if regex_is_safe:
        assert sorted(matched_by(targets, paths)) == sorted(planned)
    else:
        assert isinstance(targets, list)


@given(paths=_paths, data=st.data())
@settings(max_examples=200, deadline=None)
def test_matching_agrees_with_peft(paths: list[str], data: st.DataObject) -> None:
    suffixes = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    config = LoraConfig(target_modules=suffixes)
    assert matched_by(suffixes, paths) == [p for p in paths if check_target_module_exists(config, p)]


_keys = st.one_of(
    st.lists(_parts, min_size=1, max_size=3).map(".".join),
    st.sampled_from(["^q$", r"layers\.\d+\.q", "q|k", ".*attn.*", "(?:q|linear)$", "a.b", "lin", ""]),
)


@given(path=_paths.map(lambda paths: paths[0]), keys=st.lists(_keys, max_size=5, unique=True))
@settings(max_examples=400, deadline=None)
def test_a_pattern_s_value_is_the_one_that_peft_uses(path: str, keys: list[str]) -> None:
    pattern = {key: number for number, key in enumerate(keys)}
    assert value_at(pattern, path, "default") == pattern.get(get_pattern_key(keys, path), "default")
    assert [key_matches(key, path) for key in keys] == [get_pattern_key([key, "-"], path) == key for key in keys]


def test_a_key_that_is_the_path_itself_counts_although_it_does_not_match_as_an_expression() -> None:
    assert value_at({"a+b": 4}, "a+b") == {"a+b": 4}[get_pattern_key(["a+b"], "a+b")]


def test_a_name_longer_than_any_module_s_is_not_searched() -> None:
    assert not key_matches("a", "b." * LONGEST_NAME + "a")
    assert value_at(None, "a", 8) == 8


_filters = st.fixed_dictionaries(
    {},
    optional={
        "exclude_modules": st.one_of(st.lists(_keys, min_size=1), st.just(r".*\.0\..*")),
        "layers_to_transform": st.sampled_from([0, 1, [1, 12]]),
        "modules_to_save": st.lists(st.sampled_from(["mlp", "q"]), min_size=1),
    },
)


@given(paths=_paths, targets=st.one_of(st.just(r".*\.(q|k)"), st.lists(_keys, min_size=1)), fields=_filters)
@settings(max_examples=300, deadline=None)
def test_targets_with_filters_are_matched_as_peft_does(
    paths: list[str], targets: str | list[str], fields: dict[str, object]
) -> None:
    if isinstance(targets, str):
        fields.pop("layers_to_transform", None)
    matches = target_matcher({**fields, "target_modules": targets})
    config = LoraConfig(target_modules=targets, **fields)  # type: ignore[arg-type]
    assert [p for p in paths if matches(p)] == [p for p in paths if check_target_module_exists(config, p)]


@pytest.mark.parametrize(
    ("planned", "others", "targets"),
    [
        pytest.param(
            ["m.0.q", "m.1.q", "m.0.k", "m.1.k"], ["m", "m.0", "m.1", "m.0.v"], ["k", "q"], id="suffixes"
        ),
        pytest.param(
            ["text.0.q", "text.1.q"],
            ["vision.0.q", "vision.1.q", "vision.0.q.linear"],
            r"text\.\d+\.q",
            id="one tower of two: a regular expression",
        ),
        pytest.param(
            ["m.0.q", "m.2.q"], ["m.1.q", "m.3.q"], r"m\.(?:0|2)\.q", id="some layers: numbers are named"
        ),
        pytest.param(
            ["v.0.q.linear", "v.0.k.linear"],
            ["v.0.q", "v.0.k", "a.0.q.linear", "a.0.k.linear"],
            r"v\.\d+\.(?:k|q)\.linear",
            id="inner linears of one tower",
        ),
    ],
)
def test_the_form_is_the_smallest(planned: list[str], others: list[str], targets: str | list[str]) -> None:
    assert smallest_exact(planned, planned + others) == targets


def test_a_suffix_that_is_another_path_s_ending_is_not_used() -> None:
    paths = ["q", "layer.q", "layer.k"]
    targets = smallest_exact(["q"], paths)
    assert matched_by(targets, paths) == ["q"]


@pytest.mark.parametrize(
    ("model_type", "name", "rewritten"),
    [
        pytest.param("deepseek_v3", "gate_proj", True, id="deepseek_v3"),
        pytest.param("mixtral", "w1", True, id="mixtral"),
        pytest.param("llama", "gate_proj", False, id="llama"),
        pytest.param("gemma4", "gate_proj", False, id="gemma4"),
        pytest.param(None, "gate_proj", False, id="no transformers model"),
    ],
)
def test_names_that_peft_takes_for_experts(model_type: str | None, name: str, rewritten: bool) -> None:
    assert (name in rewritten_names(model_type)) is rewritten
