"""What a shrunk configuration keeps of the original."""

from __future__ import annotations

import copy

import pytest
from transformers import PretrainedConfig

from graftkit.errors import BuildError
from graftkit.families import geometry
from graftkit.twins.shrink import shrink
from graftkit.twins.sizes.field_sizes import LAYER_COUNTS, REPEATS, is_token_field
from graftkit.twins.sizes.layers import shrink_layers


def _parts(config):
    """The configuration and its sub-configurations, by name."""
    found = {"": config}
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is not None:
            found |= {f"{name}.{inner}".rstrip("."): part for inner, part in _parts(sub).items()}
    return found


def test_towers_are_the_same(case):
    config = case.config()
    assert _parts(shrink(config)).keys() == _parts(config).keys()


def test_layer_kinds_are_the_same(case):
    config = case.config()
    small = _parts(shrink(config))
    for name, part in _parts(config).items():
        for field in ("layer_types", "mlp_layer_types", "layers_block_type"):
            if kinds := getattr(part, field, None):
                assert set(getattr(small[name], field)) == set(kinds)


def test_grouping_of_attention_heads_is_the_same(case):
    config = case.config()
    small = _parts(shrink(config))
    for name, part in _parts(config).items():
        values = part.to_dict()
        heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
        if heads and kv_heads:
            new_heads = small[name].num_attention_heads
            new_kv_heads = small[name].to_dict()["num_key_value_heads"]
            assert (new_kv_heads == 1) == (kv_heads == 1)
            assert (new_kv_heads < new_heads) == (kv_heads < heads)
            assert new_heads % new_kv_heads == 0


def test_ties_and_flags_are_the_same(case):
    config = case.config()
    small = _parts(shrink(config))
    for name, part in _parts(config).items():
        flags = {k: v for k, v in part.to_dict().items() if isinstance(v, bool) or k == "model_type"}
        assert flags == {k: v for k, v in small[name].to_dict().items() if k in flags}


def test_expert_choice_is_the_same(case):
    config = case.config()
    small = _parts(shrink(config))
    for name, part in _parts(config).items():
        experts = next((k for k in EXPERTS if isinstance(getattr(part, k, None), int)), None)
        top_k = next((k for k in TOP_K if isinstance(getattr(part, k, None), int)), None)
        if experts and top_k:
            fewer = getattr(part, top_k) < getattr(part, experts)
            assert (getattr(small[name], top_k) < getattr(small[name], experts)) == fewer
            assert (getattr(small[name], top_k) == 1) == (getattr(part, top_k) == 1)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = ("num_experts_per_tok", "top_k_experts")


def test_special_tokens_stay_distinct_and_inside_the_vocabulary(case):
    config = case.config()
    small = shrink(config)
    names = [k for k, v in config.to_dict().items() if k.endswith(("_token_id", "_index")) and type(v) is int]
    before = [getattr(config, name) for name in names]
    after = [getattr(small, name) for name in names]
    assert len(set(after)) == len(set(before))
    assert all(i < small.get_text_config().vocab_size for i in after if i >= 0)


def test_the_input_is_not_changed(case):
    config = case.config()
    before = copy.deepcopy(config.to_dict())
    shrink(config, {"initializer_range": 0.5})
    assert config.to_dict() == before


def test_shrinking_a_shrunk_configuration_changes_nothing(case):
    once = shrink(case.config())
    assert shrink(once).to_dict() == once.to_dict()


@pytest.mark.parametrize(("size", "shared"), [("E2B", 2), ("E4B", 2), ("31B", 0)], ids=["E2B", "E4B", "31B"])
def test_gemma4_keeps_a_sharing_layer_of_every_kind(size, shared):
    text = shrink(_geometry(size)).text_config
    own = len(text.layer_types) - text.num_kv_shared_layers
    assert text.num_kv_shared_layers == shared
    assert set(text.layer_types[:own]) == set(text.layer_types)
    assert text.kv_sharing_modes.count("reuse") == shared
    if shared:
        assert set(text.layer_types[own:]) == {"sliding_attention", "full_attention"}


def test_gemma4_keeps_wider_heads_in_full_attention_and_fewer_keys():
    text = shrink(_geometry("31B")).text_config
    layers = dict(zip(text.layer_types, text.per_layer_config, strict=True))
    sliding, full = layers["sliding_attention"], layers["full_attention"]
    assert full.head_dim > sliding.head_dim
    assert full.num_key_value_heads < sliding.num_key_value_heads < text.num_attention_heads


def _geometry(size):
    from transformers import Gemma4Config

    return Gemma4Config.from_dict(dict(geometry(f"google/gemma-4-{size}")))


def test_overrides_win_and_reach_into_sub_configurations():
    from transformers import LlavaConfig

    small = shrink(LlavaConfig(), {"text_config": {"vocab_size": 700}, "image_token_index": 650})
    assert (small.text_config.vocab_size, small.image_token_index) == (700, 650)


def test_an_override_for_an_absent_tower_does_not_create_it():
    small = shrink(_geometry("31B"), {"audio_config": {"hidden_size": 32}})
    assert small.audio_config is None


def test_refused_values_name_the_class_and_the_way_out():
    from transformers import Qwen3Config

    with pytest.raises(BuildError) as caught:
        shrink(Qwen3Config(), {"num_hidden_layers": 3, "layer_types": ["full_attention"]})
    assert caught.value.code == "twin"
    assert "Qwen3Config" in caught.value.what
    assert caught.value.help


def test_quantization_is_dropped():
    from transformers import LlamaConfig

    small = shrink(LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    assert getattr(small, "quantization_config", None) is None


# (id, fields, expected values)
LAYERS = (
    ("one-kind", {"num_hidden_layers": 32}, {"num_hidden_layers": 2}),
    ("already-small", {"num_hidden_layers": 1}, {"num_hidden_layers": 1}),
    (
        "pattern",
        {"num_hidden_layers": 6, "layer_types": ["a", "a", "b", "a", "a", "b"]},
        {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
    ),
    (
        "dense-first",
        {"num_hidden_layers": 61, "first_k_dense_replace": 3},
        {"num_hidden_layers": 2, "first_k_dense_replace": 1},
    ),
    (
        "period",
        {
            "num_hidden_layers": 32,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        {"num_hidden_layers": 5},
    ),
    (
        "index-list",
        {"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13]},
        {"num_hidden_layers": 2, "cross_attention_layers": [1]},
    ),
    (
        "index-list-of-tapped-layers",
        {"num_hidden_layers": 32, "intermediate_layers_indices": [3, 7, 15]},
        {"num_hidden_layers": 2, "intermediate_layers_indices": [1]},
    ),
    (
        "a-list-of-pairs-is-not-one-of-layers",
        {"num_hidden_layers": 32, "num_global_layers": 3, "aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        {"num_hidden_layers": 2, "num_global_layers": 2},
    ),
    (
        "shared-suffix",
        {"num_hidden_layers": 6, "layer_types": ["a", "b"] * 3, "num_kv_shared_layers": 2},
        {"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"], "num_kv_shared_layers": 2},
    ),
    (
        "kinds-that-repeat",
        {"num_hidden_layers": 26, "block_types": ["recurrent", "recurrent", "attention"]},
        {"num_hidden_layers": 3},
    ),
    (
        "index-list-by-its-name",
        {"num_hidden_layers": 16, "subsample_layers": [0, 1]},
        {"num_hidden_layers": 2, "subsample_layers": [0]},
    ),
    (
        "block-of-layers",
        {"num_hidden_layers": 48, "n_layers_per_attn_res_block": 6},
        {"num_hidden_layers": 6},
    ),
    (
        "two-stacks",
        {"encoder_layers": 32, "decoder_layers": 4},
        {"encoder_layers": 2, "decoder_layers": 2},
    ),
    (
        "per-layer-override",
        {"num_hidden_layers": 4, "per_layer_config": {"03": {"head_dim": 512}}},
        {"num_hidden_layers": 2, "per_layer_config": {1: {"head_dim": 512}}},
    ),
)


@pytest.mark.parametrize(("fields", "expected"), [c[1:] for c in LAYERS], ids=[c[0] for c in LAYERS])
def test_layers_kept(fields, expected):
    changed = shrink_layers(fields)
    assert {k: changed[k] for k in expected} == expected


def _widths(config):
    """Every integer field, of the parts too, that is neither a token's id nor a count of repeats."""
    counts = {*LAYER_COUNTS, *REPEATS, "num_kv_shared_layers", "first_k_dense_replace"}
    return {
        (part, name): value
        for part, own in _parts(config).items()
        for name, value in own.to_dict().items()
        if type(value) is int and name not in counts and not is_token_field(name)
    }


def test_everything_but_depth_can_be_kept(case):
    config = case.config()
    small = shrink(config, kept=["*"])
    assert _widths(small) == _widths(config)
    for name, part in _parts(shrink(config)).items():
        counts = [field for field in LAYER_COUNTS if hasattr(part, field)]
        assert [getattr(_parts(small)[name], c) for c in counts] == [getattr(part, c) for c in counts]


def test_everything_can_be_kept_with_its_layers(case):
    config = case.config()
    small = shrink(config, kept=["**"])
    for name, part in _parts(config).items():
        for field in (*LAYER_COUNTS, "layer_types", "hidden_size"):
            assert getattr(_parts(small)[name], field, None) == getattr(part, field, None), (name, field)


def test_one_part_can_be_kept():
    from transformers import LlavaConfig

    config = LlavaConfig()
    nothing, small = shrink(config), shrink(config, kept=["vision_config.*"])
    assert small.vision_config.hidden_size == config.vision_config.hidden_size
    assert small.vision_config.image_size == config.vision_config.image_size
    assert small.vision_config.num_hidden_layers == nothing.vision_config.num_hidden_layers
    assert small.text_config.to_dict() == nothing.text_config.to_dict()


def test_one_field_of_one_part_can_be_kept():
    from transformers import LlavaConfig

    config = LlavaConfig()
    small = shrink(config, kept=["text_config.intermediate_size"])
    assert small.text_config.intermediate_size == config.text_config.intermediate_size
    assert small.vision_config.to_dict() == shrink(config).vision_config.to_dict()


def test_related_sizes_follow_a_kept_one():
    from transformers import Qwen3Config

    config = Qwen3Config(hidden_size=4096, num_attention_heads=32, head_dim=128)
    small = shrink(config, kept=["hidden_size"])
    assert small.hidden_size == small.head_dim * small.num_attention_heads == 4096


def test_a_kept_list_of_layers_keeps_the_layers_of_its_part():
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig()
    small = shrink(config, kept=["layer_types"])
    assert (small.layer_types, small.num_hidden_layers) == (config.layer_types, config.num_hidden_layers)


def test_overrides_win_over_what_is_kept():
    from transformers import LlamaConfig

    assert shrink(LlamaConfig(), {"hidden_size": 32}, kept=["*"]).hidden_size == 32


def test_a_width_that_joins_two_parts_stays_their_sum():
    from transformers import Xcodec2Config

    config = Xcodec2Config()
    assert config.quantization_dim == config.hidden_size + config.semantic_model_config.hidden_size
    small = shrink(config)
    assert small.quantization_dim == small.hidden_size + small.semantic_model_config.hidden_size == 128


@pytest.mark.parametrize("kept", [(), ("dit_config.head_dim",)])
def test_parts_that_read_each_others_keys_have_heads_of_one_size(kept):
    from transformers import PI0Config

    small = shrink(PI0Config(), kept=kept)
    assert small.dit_config.head_dim == small.vlm_config.text_config.head_dim


# (id, fields of one part, expected values)
RELATIONS = (
    (
        "heads-of-stages-keep-their-share",
        {"embed_dim": 96, "num_heads": [3, 6, 12, 24], "depths": [2, 2, 6, 2]},
        {"embed_dim": 64, "num_heads": [2, 4, 8, 16], "depths": [2, 2, 2, 2]},
    ),
    (
        "one-head-at-the-first-stage-stays-one",
        {"embed_dim": 96, "num_heads": [1, 2, 4]},
        {"embed_dim": 64, "num_heads": [1, 2, 4]},
    ),
    (
        "the-last-stage-has-a-window-of-patches",
        {"image_size": 224, "patch_size": 4, "depths": [2, 2, 6, 2], "window_size": 7},
        {"image_size": 128, "window_size": 4},
    ),
    (
        "widths-double-at-each-stage",
        {"hidden_size": 768, "patch_embeds_hidden_size": 96, "depths": [2, 2, 6, 2]},
        {"hidden_size": 768},
    ),
    ("a-listed-width-stays", {"hidden_size": 96, "widths": [96, 192]}, {"hidden_size": 96, "widths": [96, 192]}),
    (
        "what-was-as-wide-still-is",
        {"hidden_size": 768, "conv_out_channels": 768, "image_size": 768, "flow_dim": 512},
        {"hidden_size": 64, "conv_out_channels": 64, "image_size": 768, "flow_dim": 512},
    ),
    ("narrow-embeddings-stay-so", {"hidden_size": 256, "embedding_size": 128}, {"embedding_size": 32}),
    ("wide-embeddings-stay-so", {"hidden_size": 512, "embedding_size": 1024}, {"embedding_size": 128}),
    ("embeddings-as-wide-stay-so", {"hidden_size": 512, "embedding_size": 512}, {"embedding_size": 64}),
    (
        "heads-by-another-name-fill-the-width",
        {"d_model": 1024, "n_head": 16, "d_head": 64},
        {"d_model": 64, "n_head": 4, "d_head": 16},
    ),
    (
        "a-picture-of-two-squares",
        {"image_size": [896, 448], "patch_size": 16},
        {"image_size": [128, 64]},
    ),
    (
        "a-head-of-some-layers-is-the-sum-of-its-parts",
        {
            "num_hidden_layers": 4,
            "head_dim": 256,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "per_layer_config": {2: {"qk_nope_head_dim": 192}},
        },
        {"head_dim": 8 + 32, "qk_nope_head_dim": 16},
    ),
    (
        "states-of-listed-layers-and-the-last-side-by-side",
        {"hidden_size": 128, "num_hidden_layers": 9, "taps_layers": [3, 7], "vision_output_dim": 3 * 128},
        {"taps_layers": [1], "vision_output_dim": 2 * 64},
    ),
    (
        "corners-and-sides-of-a-box-side-by-side",
        {"hidden_size": 768, "coordinate_size": 171, "shape_size": 42},
        {"coordinate_size": 8, "shape_size": 16},
    ),
    (
        "a-picture-counted-in-patches",
        {"image_size": 1024, "patch_size": 16, "image_embedding_size": 64},
        {"image_size": 64, "image_embedding_size": 4},
    ),
)


class AnyConfig(PretrainedConfig):
    """A configuration of whatever fields it is given."""

    model_type = "any_fields"


@pytest.mark.parametrize(("fields", "expected"), [c[1:] for c in RELATIONS], ids=[c[0] for c in RELATIONS])
def test_related_fields_change_together(fields, expected):
    small = shrink(AnyConfig(**fields)).to_dict()
    assert {name: small[name] for name in expected} == expected


def test_pictures_that_several_parts_read_stay_alike():
    from transformers import Sam2Config

    small = shrink(Sam2Config())
    vision = small.vision_config
    assert [small.prompt_encoder_config.image_size] * 2 == list(vision.backbone_config.image_size) == [64, 64]
    assert vision.backbone_feature_sizes == [[16, 16], [8, 8], [4, 4]]


def test_what_one_part_holds_for_another_is_as_wide_as_that():
    from transformers import SamConfig, UnlimitedOcrConfig

    small = shrink(SamConfig())
    width = small.prompt_encoder_config.hidden_size
    assert small.vision_config.output_channels == 2 * small.vision_config.num_pos_feats == width == 64
    joined = shrink(UnlimitedOcrConfig()).vision_config
    assert list(joined.sam_config.downsample_channels) == [512, joined.encoder_config.hidden_size]
    kept = shrink(SamConfig(), kept=["vision_config.output_channels"])
    assert kept.vision_config.output_channels == 256


def test_a_width_that_joins_two_parts_of_a_model_without_one_stays_their_sum():
    from transformers import CONFIG_MAPPING

    full = CONFIG_MAPPING["xcodec"]()
    small = shrink(full)
    assert full.codebook_dim == full.acoustic_model_config.hidden_size + full.semantic_model_config.hidden_size
    assert small.codebook_dim == small.acoustic_model_config.hidden_size + small.semantic_model_config.hidden_size
    assert small.codebook_dim < full.codebook_dim


@pytest.mark.parametrize(
    ("model_type", "fields", "field", "value"),
    [
        ("ministral", {}, "head_dim", 16),
        ("deepseek_v2", {}, "num_experts_per_tok", 2),
        ("esm", {}, "vocab_size", 512),
        ("time_series_transformer", {}, "prediction_length", 8),
        ("mistral", {"sliding_window": None}, "sliding_window", None),
    ],
)
def test_what_a_class_cannot_compute_without_is_set_where_it_is_open(model_type, fields, field, value):
    from transformers import CONFIG_MAPPING

    assert getattr(shrink(CONFIG_MAPPING[model_type](**fields)), field) == value


def test_placeholders_that_a_default_configuration_leaves_open_are_in_the_vocabulary():
    from transformers import Blip2Config

    small = shrink(Blip2Config())
    assert Blip2Config().image_token_index is None
    assert 448 <= small.image_token_index < small.text_config.vocab_size


def test_a_width_of_merged_patches_goes_with_the_towers():
    from transformers import CONFIG_MAPPING

    small = shrink(CONFIG_MAPPING["muse_spark"]())
    assert small.out_hidden_size == small.vision_config.hidden_size * small.vision_config.merge_size**2
