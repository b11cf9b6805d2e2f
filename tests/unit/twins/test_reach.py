"""Sites without a gradient: found on a batch, with the cause, and generalized to more layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graftkit as gk
from graftkit.twins.batches.recipe import make_batch
from graftkit.twins.batches.search import find_recipe
from graftkit.twins.reach import NoGradient, unreached, without_gradient
from graftkit.twins.reaching.find import find_patterns, sites_meant
from graftkit.twins.reaching.patterns import all_but_last, generalize, meant_by


class Parts(nn.Module):
    """One linear for each way to get no gradient, and two that get one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.types = nn.Embedding(2, 4, padding_idx=0)  # a batch of the other type trains it
        self.used, self.pooler, self.chooser, self.spare, self.read = (nn.Linear(4, 4) for _ in range(5))
        self.listed = nn.Linear(4, 4)
        self.steps = [self.listed]  # an adapter that takes the place of ``listed`` does not get into the list
        self.routed = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.used(self.embed(ids) + self.types(torch.zeros_like(ids)))
        self.pooler(states)
        for step in self.steps:
            states = step(states)
        order = self.chooser(states).sum(-1).argsort()
        states = states.gather(1, order[..., None].expand_as(states)) @ self.read.weight
        # Whichever is chosen: with other weights it is the other.
        chosen = self.routed[int(self.used.weight.sum() > 0)]
        return {"states": chosen(states) * torch.arange(1, 6)[:, None]}


def test_each_cause_is_told_from_the_others() -> None:
    torch.manual_seed(0)
    model = Parts().eval()
    found = unreached(model, {"ids": torch.arange(10).reshape(2, 5) % 8})
    assert found == {
        "pooler": NoGradient.NOT_READ,
        "chooser": NoGradient.ONLY_CHOOSES,
        "spare": NoGradient.NOT_CALLED,
        "read": NoGradient.READ_PAST,
        "listed": NoGradient.READ_PAST,
    }
    assert model.steps == [model.listed]


class Groups(nn.Module):
    """Layers for each group of queries, of which evaluation runs the first; each group's scores only choose."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scores = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = list(zip(self.outputs, self.scores, strict=True))[: 3 if self.training else 1]
        return {str(i): self._chosen(out(x), score(x)) for i, (out, score) in enumerate(groups)}

    def _chosen(self, states: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return states.gather(0, scores.argsort(0).expand_as(states))


def test_layers_that_only_training_runs_get_their_gradient_there() -> None:
    torch.manual_seed(0)
    model = Groups().eval()
    batch = {"x": torch.randn(5, 4)}
    assert set(unreached(model, batch)) == {f"scores.{i}" for i in range(3)}
    assert find_patterns(model, batch) == {"only_chooses": ("scores.*",)}
    assert not model.training


def test_neither_the_model_nor_the_random_state_changes() -> None:
    model = gk.twin("bert")
    batch = gk.example_batch(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    unreached(model, batch)
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "t5", "qwen3_moe"])
def test_a_model_that_uses_everything_has_no_such_site(model_type: str) -> None:
    model = gk.twin(model_type)
    assert not unreached(model, gk.example_batch(model))


def test_an_indexer_only_chooses_positions() -> None:
    model = gk.twin("deepseek_v32")
    found = unreached(model, gk.example_batch(model))
    assert set(found.values()) == {NoGradient.ONLY_CHOOSES}
    assert all(".indexer." in path for path in found)


def test_the_last_layer_of_a_tower_that_is_read_before_its_end() -> None:
    model = gk.twin("llava")
    found = unreached(model, gk.example_batch(model))
    paths = [site.path for site in gk.survey(model)]
    larger = [path.replace("layers.1.", "layers.23.") for path in paths] + paths
    meant = meant_by(generalize(found, paths), larger)
    assert meant
    assert all(path.startswith("model.vision_tower.encoder.layers.23.") for path in meant)


def test_experts_that_no_token_chose_are_no_pattern() -> None:
    # Its experts are linears of their own, "expert_0" and so on, and its router leaves some without a token.
    model = gk.twin("switch_transformers")
    batch = {name: tensor[:1, :2] for name, tensor in gk.example_batch(model).items()}
    assert any(".experts." in path for path in unreached(model, batch))
    paths = [site.path for site in gk.survey(model)]
    assert not any(".experts." in path for path in sites_meant(find_patterns(model, batch), paths))


class TwoOfThree(nn.Module):
    """One linear that nothing calls, beside two whose names differ in a number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc1, self.fc2 = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.fc(states))
        return out


def test_a_number_in_a_name_is_no_number_in_a_list() -> None:
    torch.manual_seed(0)
    patterns = find_patterns(TwoOfThree(), {"states": torch.randn(2, 4)})
    assert patterns == {"not_called": ("fc1",)}


def test_weights_that_a_parametrization_computes_get_a_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers(states)
            return out

    assert not unreached(Named(), {"states": torch.randn(2, 4)})


# ---- batches that train more ----


@pytest.mark.parametrize(
    ("model_type", "without"),
    [
        # A mask of ones makes all attention global: its own projections then take the place of the usual ones.
        pytest.param("longformer", set(), id="some positions marked"),
        # It reads a sentence from its last token, and without one from the first, which sees no other.
        pytest.param("groupvit", set(), id="a text that ends"),
        # In a small picture its reduced map has one position.
        pytest.param("mobilevit", set(), id="a larger picture"),
        pytest.param("evolla", set(), id="inputs that belong together"),
        pytest.param("higgs_audio_v2", set(), id="inputs with their placeholders"),
        pytest.param("big_bird", {"bert.pooler"}, id="nothing helps"),
    ],
)
def test_a_batch_is_changed_until_it_trains_what_it_can(model_type: str, without: set[str]) -> None:
    model = gk.twin(model_type)
    recipe = find_recipe(model, seconds=500).recipe
    batch = make_batch(recipe, model, 2, torch.Generator().manual_seed(0))
    assert {site.path for site in without_gradient(model, batch) if site.is_linear} == without


# ---- patterns ----


def layers(name: str, number: int, *leaves: str) -> list[str]:
    return [f"{name}.{index}.{leaf}" for index in range(number) for leaf in leaves]


@pytest.mark.parametrize(
    ("dead", "pattern"),
    [
        ({"h.0.a", "h.1.a", "h.2.a"}, ("h.*.a",)),
        ({"h.0.a"}, ("h.0.a",)),
        ({"h.2.a"}, ("h.-1.a",)),
        ({"h.1.a"}, ()),
        ({"h.0.a", "h.1.a"}, ()),
        ({"head"}, ("head",)),
    ],
    ids=["every", "first", "last", "middle", "all but the last", "no layer"],
)
def test_patterns_say_which_layers_agree(dead: set[str], pattern: tuple[str, ...]) -> None:
    paths = [*layers("h", 3, "a", "b"), "head"]
    assert generalize(dead, paths) == pattern


@pytest.mark.parametrize(
    ("number", "dead", "pattern"),
    [
        (3, {"h.0.a", "h.1.a"}, ("h.:-1.a",)),
        (3, {"h.0.a"}, ()),
        (3, {"h.0.a", "h.2.a"}, ()),
        (2, {"h.0.a"}, ()),  # it may be for being the first
    ],
)
def test_all_but_the_last_are_told_from_the_first_by_a_third(
    number: int, dead: set[str], pattern: tuple[str, ...]
) -> None:
    paths = layers("h", number, "a", "b")
    assert all_but_last(dead, paths) == pattern
    assert all_but_last(dead, [*paths, f"h.{number - 1}.extra"]) == (), "the last is of a kind of its own"
    if pattern:
        assert meant_by(pattern, layers("h", 6, "a", "b")) == {f"h.{i}.a" for i in range(5)}


class LastHead(nn.Module):
    """A head for each of three layers, of which the last is used; and experts, of which the last is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[-1](self.experts[-1](x))


def test_heads_that_only_the_last_layer_uses_have_a_pattern_and_experts_have_none() -> None:
    assert find_patterns(LastHead().eval(), {"x": torch.randn(2, 4)}) == {"not_called": ("heads.:-1",)}


def test_the_last_layer_proves_nothing_where_it_is_of_a_kind_of_its_own() -> None:
    paths = [*layers("h", 2, "a"), "h.1.extra"]
    assert generalize({"h.1.a"}, paths) == ()


def test_a_pattern_for_the_last_follows_the_number_of_layers() -> None:
    patterns = generalize({"h.1.a"}, layers("h", 2, "a", "b"))
    assert meant_by(patterns, layers("h", 40, "a", "b")) == {"h.39.a"}


@given(
    st.sets(st.sampled_from([*layers("a", 3, "x", "y"), *layers("b.0.c", 2, "x"), *layers("b.1.c", 2, "x"), "d"]))
)
def test_patterns_never_mean_more_than_what_was_found(dead: set[str]) -> None:
    paths = [*layers("a", 3, "x", "y"), *layers("b.0.c", 2, "x"), *layers("b.1.c", 2, "x"), "d"]
    assert meant_by(generalize(dead, paths), paths) <= dead
