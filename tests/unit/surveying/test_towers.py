"""Towers of models that declare none: what feeds what decides, names are the last resort, "unknown" the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.surveying.handmade import (
    Block,
    Composite,
    Decoder,
    Encoder,
    Flat,
    FlatPatches,
    Frames,
    Patches,
    blocks,
    rename,
)
from torch import Tensor, nn

import graftkit as gk

TOKENS = torch.arange(6)[None]
PICTURE, CUT = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 48)
COMPOSITES = [
    pytest.param(lambda: Composite(Encoder(Patches(32), 32)), PICTURE, "vision", id="convolution over patches"),
    pytest.param(lambda: Composite(Encoder(FlatPatches(32), 32)), CUT, "vision", id="linear over patches"),
    pytest.param(lambda: Composite(Encoder(Frames(32), 32)), torch.randn(1, 80, 8), "audio", id="spectrogram"),
    pytest.param(lambda: Flat(), PICTURE, "vision", id="no containers"),
    pytest.param(lambda: Composite(Encoder(nn.Linear(40, 32), 32)), CUT[..., :40], "unknown", id="precomputed"),
]


def towers_of(model: nn.Module) -> dict[str, str]:
    """Return the first name of each site's path, with its tower: of the model's children, where each has one."""
    found: dict[str, set[str]] = {}
    for site in gk.survey(model):
        found.setdefault(site.path.partition(".")[0], set()).add(site.tower)
    assert all(len(towers) == 1 for towers in found.values()), found
    return {name: next(iter(towers)) for name, towers in found.items()}


def read_by(model: nn.Module, tokens: Tensor, other: Tensor) -> dict[str, list[Tensor]]:
    """Return what each linear takes in, in one forward pass."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(tokens, other)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("build", "other", "tower"), COMPOSITES)
def test_language_is_what_text_reaches(build: Callable[[], nn.Module], other: Tensor, tower: str) -> None:
    """Nothing but the widths is given away; the oracle is a forward pass with other tokens."""
    model = build()
    before, after = read_by(model, TOKENS, other), read_by(model, TOKENS + 7, other)
    reached = {path for path in before if not all(map(torch.equal, before[path], after[path]))}
    sites = gk.survey(model)
    assert {s.path for s in sites if s.is_linear and s.tower == "language"} == reached
    assert {s.tower for s in sites} == {"language", "projector", tower}


@pytest.mark.parametrize(("build", "other", "tower"), COMPOSITES[:4])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_names_change_nothing_where_structure_decides(
    build: Callable[[], nn.Module], other: Tensor, tower: str, data: st.DataObject
) -> None:
    words = ("vision_tower", "language_model", "audio", "text", "projector", "lm_head", "x", "y", "head")
    model = build()
    expected = [site.tower for site in gk.survey(model)]
    for module in [m for m in model.modules() if not isinstance(m, nn.ModuleList | nn.Sequential)]:
        children = [name for name, _ in module.named_children()]
        rename(module, **dict(zip(children, data.draw(st.permutations(words)), strict=False)))
    assert [site.tower for site in gk.survey(model)] == expected


@pytest.mark.parametrize(
    ("names", "tower"),
    [
        pytest.param({}, "unknown", id="no name"),
        pytest.param({"a": "vision_tower"}, "vision", id="vision"),
        pytest.param({"a": "speech_encoder"}, "audio", id="audio"),
        pytest.param({"a": "context"}, "unknown", id="a word that only contains one"),
    ],
)
def test_what_takes_precomputed_features_is_named_or_unknown(names: dict[str, str], tower: str) -> None:
    model = rename(Composite(Encoder(nn.Linear(40, 32), 32)), **names)
    assert list(towers_of(model).values()) == [tower, "projector", "language"]


class WithFeatures(nn.Module):
    """Features as wide as the text, so that widths alone cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = blocks(64), Decoder()

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        for block in self.a:
            features = block(features)
        return self.c(tokens, features)


class WithAnything(WithFeatures):
    """The same, of which the forward does not say what it takes."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["tokens"], batch["features"])


class WithStrange(WithFeatures):
    """The same, of which the forward takes something that is not the text."""

    def forward(self, s: Tensor, tokens: Tensor) -> Tensor:
        return super().forward(tokens, s)


@pytest.mark.parametrize("build", [WithFeatures, WithAnything, WithStrange])
def test_features_as_wide_as_the_text_are_unknown(build: Callable[[], nn.Module]) -> None:
    assert towers_of(build()) == {"a": "unknown", "c": "language"}
    assert towers_of(rename(WithFeatures(), a="image_encoder")) == {"image_encoder": "vision", "c": "language"}


def test_equal_widths_leave_it_to_names() -> None:
    model = Flat(64)
    expected = {"a": "vision", "b": "unknown", "c": "unknown", "d": "language", "e": "unknown", "g": "language"}
    assert towers_of(model) == expected
    model = rename(Flat(64), b="vision_blocks", c="projection")
    expected = {
        "a": "vision",
        "vision_blocks": "vision",
        "projection": "projector",
        "d": "language",
        "e": "language",
    }
    assert towers_of(model) == expected | {"g": "language"}


class GPT(nn.Module):
    """Text alone, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Embedding(64, 32)
        self.blocks = blocks(32)
        self.tokens = nn.Embedding(99, 32)
        self.blocks[0].up = nn.Sequential(nn.Linear(32, 64))
        self.blocks[0].up.vision_tower = nn.Linear(64, 64)
        self.out = nn.Linear(32, 99)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.vision_tower(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def test_a_model_that_takes_text_alone_is_language_whatever_its_names() -> None:
    assert {site.tower for site in gk.survey(GPT())} == {"language"}
    assert {site.tower for site in gk.survey(nn.DataParallel(GPT()))} == {"language"}


class Translator(nn.Module):
    """Text in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.encoder, self.decoder = nn.Embedding(99, 32), blocks(32), blocks(32)
        self.between, self.out = nn.Linear(32, 32), nn.Linear(32, 99)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.out(self.tokens(src) + self.tokens(tgt))


def test_text_in_two_places_is_language() -> None:
    assert {site.tower for site in gk.survey(Translator())} == {"language"}


class ViT(nn.Module):
    """Pixels alone, with positions in an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = Patches(32), nn.Embedding(5, 32)
        self.text, self.out = blocks(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


@pytest.mark.parametrize(
    ("model", "tower"),
    [
        pytest.param(ViT(), "vision", id="pixels alone"),
        pytest.param(Encoder(Frames(32), 32), "audio", id="sound alone"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), "vision", id="convnet"),
        pytest.param(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), "unknown", id="a table's columns"),
        pytest.param(
            nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3)), "unknown", id="grey, or a spectrogram"
        ),
        pytest.param(nn.ModuleDict({"vision_tower": nn.Conv2d(1, 8, 3)}), "vision", id="grey, named"),
        pytest.param(nn.Sequential(nn.Embedding(99, 8), Block(8)), "language", id="tokens in"),
    ],
)
def test_a_model_of_one_input_is_one_tower(model: nn.Module, tower: str) -> None:
    assert {found.name for found in gk.survey(model).towers} == {tower}
    assert {a.site.tower for a in gk.plan(model, targets=[".*"]).attached} == {tower}


def test_a_custom_transformers_model_that_declares_nothing() -> None:
    from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    class Remote(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.vision_tower, self.bridge = Encoder(Patches(32), 32), nn.Linear(32, 64)
            self.decoder = Decoder()
            self.post_init()

        def get_output_embeddings(self) -> nn.Module:
            return self.decoder.out

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            return self.decoder(input_ids, self.bridge(self.vision_tower(pixel_values)))

    class WithVision(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.extra = Encoder(Patches(32), 32)
            self.model.bridge = nn.Linear(32, 64)

    remote = gk.survey(Remote(PretrainedConfig()))
    assert remote["vision_tower.blocks.0.q"].tower == "vision"
    assert remote["bridge"].tower == "projector"
    assert remote["decoder.layers.0.q"].tower == "language"
    assert remote["decoder.out"].tower == "head"
    small = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    llama = gk.survey(WithVision(small))
    assert {s.tower for s in llama if s.path.startswith("model.extra.")} == {"vision"}
    assert llama["model.bridge"].tower == "projector"
    assert {s.tower for s in llama if s.path.startswith(("model.layers.", "model.embed"))} == {"language"}
    assert llama["lm_head"].tower == "head"


def test_transformers_models_in_a_plain_module_say_what_they_are(twin_of: Callable[[str], nn.Module]) -> None:
    vision, language = copy.deepcopy(twin_of("clip_vision_model")), copy.deepcopy(twin_of("llama"))
    between = nn.Linear(vision.config.hidden_size, language.config.hidden_size)
    model = nn.ModuleDict({"a": vision, "b": between, "c": language})
    found = gk.survey(model)
    assert {s.tower for s in found if s.path.startswith("a.")} == {"vision"}
    assert {s.tower for s in found if s.path.startswith("c.model.")} == {"language"}
    if vision.config.hidden_size != language.config.hidden_size:
        assert found["b"].tower == "projector"


@pytest.mark.parametrize(("build", "other", "tower"), COMPOSITES)
def test_adapters_do_not_change_the_towers(build: Callable[[], nn.Module], other: Tensor, tower: str) -> None:
    from peft import LoraConfig, get_peft_model

    from graftkit.surveying.towers.find import tower_finder

    model = build()
    expected = {site.path: site.tower for site in gk.survey(model)}
    config = LoraConfig(target_modules=list(expected), r=2)
    adapted = get_peft_model(model, config)
    tower_of = tower_finder(adapted.get_base_model())
    assert {path: tower_of(path) for path in expected} == expected
    assert {path: tower_of(f"{path}.lora_A.default") for path in expected} == expected


def test_a_class_may_have_several_main_inputs() -> None:
    """OneFormer's are a list, which no lookup by name takes."""
    assert {site.tower for site in gk.survey("oneformer") if site.path.startswith("pixel_level_module")} == {
        "vision"
    }


def test_a_decoder_of_the_encoder_s_weights_is_of_its_tower(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("diffusion_gemma")
    model_map = gk.survey(model)
    decoder = [site for site in model_map if site.path.startswith("model.decoder.")]
    assert {site.tower for site in decoder} == {"language"}
    assert {site.path for site in decoder if not site.tied_to}, "what only the decoder has comes with the rest"
    assert {site.tower for site in model_map if "vision_tower" in site.path} == {"vision"}
    assert {site.tower for site in model_map if "embed_vision" in site.path} == {"projector"}
    plan = gk.plan(model, targets=["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], r=2)
    assert {site.path: site.tower for site in gk.survey(gk.attach(model, plan))} == {
        site.path: site.tower for site in model_map
    }
