"""Gemma 4: released geometries, what the twin must keep, and a batch that feeds every tower.

The figures are those of the public configuration files of the released checkpoints, as quoted in public
code; the tests build each geometry on the meta device and compare wrapper and parameter counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.families._base import IGNORED_LABEL, Family, Requirement, ServedTwin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Two stride-2 convolutions stand before the audio conformer (Gemma4AudioSubSampleConvProjection): four mel
# frames become one soft token. Their widths fix the mel bins to 4 * (channels[0] // 4) = 128.
_AUDIO_FRAMES = 24
# Images are patch grids of 2 x 2 pooling windows.
_WINDOWS_PER_SIDE = 2
_TEXT_TOKENS = 8
# mm_token_type_ids: 0 text, 1 image, 2 video, 3 audio (Gemma4Processor).
_IMAGE_TYPE, _AUDIO_TYPE = 1, 3


# The texts of the special tokens (``extra_special_tokens`` of the released tokenizer_config.json).
_TOKENS = {
    "boi_token_id": "<|image>",
    "image_token_id": "<|image|>",
    "eoi_token_id": "<image|>",
    "video_token_id": "<|video|>",
    "boa_token_id": "<|audio>",
    "audio_token_id": "<|audio|>",
    "eoa_token_index": "<audio|>",
}
# vLLM takes these numbers of soft tokens alone, 70 the least (_SUPPORTED_SOFT_TOKENS in gemma4_mm.py).
_SOFT_TOKENS = 70
_PROCESSOR = {
    "processor_class": "Gemma4Processor",
    "image_seq_length": _SOFT_TOKENS,
    "image_processor": {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": _SOFT_TOKENS},
    "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor", "max_soft_tokens": _SOFT_TOKENS},
}


def _layers(sliding: int, repeats: int) -> list[str]:
    return (["sliding_attention"] * sliding + ["full_attention"]) * repeats


def _text(**facts: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
        "attention_bias": False,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": None,
        **facts,
    }


def _vision(**facts: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma4_vision",
        "hidden_activation": "gelu_pytorch_tanh",
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10240,
        **facts,
    }


_SMALL_VISION = _vision(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=16,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    use_clipped_linears=True,
    standardize=False,
)
_LARGE_VISION = _vision(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=72,
    use_clipped_linears=False,
    standardize=True,
)
_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "output_proj_dims": 1536,
    "subsampling_conv_channels": [128, 32],
    "use_clipped_linears": True,
}


def _model(text: dict[str, Any], vision: dict[str, Any], audio: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": vision,
        "audio_config": audio,
        "boi_token_id": 255999,
        "eoi_token_id": 258882,
        "image_token_id": 258880,
        "video_token_id": 258884,
        "boa_token_id": 256000,
        "eoa_token_index": 258883,
        "audio_token_id": 258881,
        "tie_word_embeddings": True,
    }


def _small(**facts: Any) -> dict[str, Any]:
    """Return a geometry with audio, wrapped linears, shared keys and values, and an input to every layer."""
    text = {"sliding_window": 512, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
    return _model(_text(num_attention_heads=8, **text, **facts), _SMALL_VISION, _AUDIO)


def _large(**facts: Any) -> dict[str, Any]:
    """Return a geometry without audio, whose global layers use their keys as values."""
    text = {"sliding_window": 1024, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    return _model(_text(use_bidirectional_attention="vision", **text, **facts), _LARGE_VISION, None)


_SIZES: dict[str, dict[str, Any]] = {
    "E2B": _small(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_key_value_heads=1,
        layer_types=_layers(4, 7),
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "E4B": _small(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=42,
        num_key_value_heads=2,
        layer_types=_layers(5, 7),
        num_kv_shared_layers=18,
    ),
    "26B-A4B": _large(
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        layer_types=_layers(5, 5),
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31B": _large(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        layer_types=_layers(5, 10),
    ),
}


def _example_inputs(
    model: PreTrainedModel, batch_size: int, generator: torch.Generator, modalities: frozenset[str]
) -> dict[str, torch.Tensor]:
    """Return text around one image and, where the model has an audio tower, one clip per row.

    Shapes, for ``batch_size`` B, P patches of C pixel values each, F mel frames and a sequence of T tokens:
    ``pixel_values`` (B, P, C) float in [0, 1], ``image_position_ids`` (B, P, 2) int (x, y),
    ``input_features`` (B, F, 128) float, ``input_features_mask`` (B, F) bool, and (B, T) int tensors
    ``input_ids``, ``attention_mask``, ``mm_token_type_ids``, ``labels``. A tower on its own gets its own
    input under the names its forward has, and no labels.
    """
    import torch

    config = model.config
    if config.model_type == "gemma4_vision":
        image = _image(config, batch_size, generator)
        return {"pixel_values": image["pixel_values"], "pixel_position_ids": image["image_position_ids"]}
    if config.model_type == "gemma4_audio":
        clip = _clip(config, batch_size, generator)
        return {"input_features": clip["input_features"], "attention_mask": clip["input_features_mask"]}
    ids = torch.randint(3, _first_special_id(config), (batch_size, 2 * _TEXT_TOKENS), generator=generator)
    # Each piece of a row with the type of its tokens; images and audio go before the last one.
    pieces = [(ids[:, :_TEXT_TOKENS], 0), (ids[:, _TEXT_TOKENS:], 0)]
    features: dict[str, torch.Tensor] = {}
    if "image" in modalities and getattr(config, "vision_config", None) is not None:
        placeholders = torch.full((batch_size, _WINDOWS_PER_SIDE**2), config.image_token_id)
        pieces.insert(-1, (placeholders, _IMAGE_TYPE))
        features |= _image(config.vision_config, batch_size, generator)
    if "audio" in modalities and getattr(config, "audio_config", None) is not None:
        placeholders = torch.full((batch_size, _AUDIO_FRAMES // 4), config.audio_token_id)
        pieces.insert(-1, (placeholders, _AUDIO_TYPE))
        features |= _clip(config.audio_config, batch_size, generator)
    input_ids = torch.cat([piece for piece, _ in pieces], dim=1)
    types = torch.cat([torch.full_like(piece, kind) for piece, kind in pieces], dim=1)
    labels = input_ids.masked_fill(types != 0, IGNORED_LABEL)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    return batch | {"mm_token_type_ids": types} | features if features else batch


def _first_special_id(config: Any) -> int:
    special = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    vocabulary: int = config.get_text_config().vocab_size
    return min([i for i in special if isinstance(i, int) and i > 3] + [vocabulary])


def _image(vision: Any, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    side = _WINDOWS_PER_SIDE * vision.pooling_kernel_size
    pixels = torch.rand(batch_size, side * side, 3 * vision.patch_size**2, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
    return {"pixel_values": pixels, "image_position_ids": positions.expand(batch_size, -1, -1).contiguous()}


def _clip(audio: Any, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    import torch

    mel_bins = 4 * (audio.subsampling_conv_channels[0] // 4)
    features = torch.randn(batch_size, _AUDIO_FRAMES, mel_bins, generator=generator)
    mask = torch.ones(batch_size, _AUDIO_FRAMES, dtype=torch.bool)
    return {"input_features": features, "input_features_mask": mask}


def _released(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the global layers' sizes where released configurations state them, and not layer by layer."""
    text = fields.get("text_config", {})
    layers = text.get("per_layer_config") or {}
    sizes: Mapping[str, Any] = next(iter(layers.values()), {})
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {"text_config": {names[name]: value for name, value in sizes.items() if name in names}}


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text", "gemma4_vision", "gemma4_audio"),
    geometries={
        f"google/gemma-4-{size}{tuning}": config for size, config in _SIZES.items() for tuning in ("-it", "")
    },
    example_inputs=_example_inputs,
    requires=(
        Requirement(
            "transformers",
            ">=5.5.0",
            "transformers has these models since 5.5.0",
            "https://github.com/ggml-org/llama.cpp/pull/21617",
        ),
        Requirement(
            "transformers",
            ">=5.5.2",
            "layers that share keys and values compute wrong logits without a cache, and so in training",
            "https://github.com/huggingface/transformers/issues/45242",
        ),
    ),
    served_twin=ServedTwin(
        overrides={
            # mlx-lm reads the vocabulary's size here alone (mlx_lm/models/gemma4.py).
            "vocab_size": 512,
            # vLLM asks how many tokens a picture becomes (vllm/model_executor/models/gemma4_mm.py).
            "vision_config": {"default_output_length": _SOFT_TOKENS},
        },
        tokens=_TOKENS,
        files={"processor_config.json": _PROCESSOR},
        released=_released,
        # llama.cpp does so whatever the tokenizer says (src/llama-vocab.cpp, "workaround for Gemma 4").
        starts_with_bos=True,
    ),
)
