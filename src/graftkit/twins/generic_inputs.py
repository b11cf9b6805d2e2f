"""Model inputs derived from the names that a model's forward accepts, and from its configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.families import IGNORED_LABEL
from graftkit.modeling.device import cast_inputs
from graftkit.modeling.module_mode import evaluating

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_TEXT_TOKENS = 12
_IMAGE_TYPE = 1
# Strided feature extractors of raw audio reduce by 320: this makes about twenty frames.
_SAMPLES = 6400
_FRAMES = 64
_TARGET_TOKENS = 4
_IMAGE_TOKENS = ("image_token_id", "image_token_index")
_AUDIO_TOKENS = ("audio_token_id", "audio_token_index")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_MEL_BINS = ("num_mel_bins", "input_feat_size", "mel_dim", "feature_size", "input_dim")


@dataclass(frozen=True)
class GenericInputs:
    """Inputs of one model, for each modality that is asked for and that its forward takes."""

    model: PreTrainedModel
    batch_size: int
    generator: torch.Generator
    modalities: frozenset[str]

    def batch(self) -> dict[str, torch.Tensor]:
        """Return the inputs and the labels, on the CPU and in float32."""
        images = self._images() if "image" in self.modalities and self._takes("pixel_values") else {}
        audio = self._audio() if "audio" in self.modalities else {}
        batch = images | audio
        if self._takes("input_ids") and not self._is_speech_to_text():
            batch |= self._text(images, audio)
        if not batch:
            raise ValueError(f"its forward takes none of: {', '.join(sorted(self.modalities))}")
        return batch | self._labels(batch)

    # What the model says about itself

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(type(self.model).forward).parameters

    def _tower_takes(self, name: str) -> bool:
        vision = getattr(self.config, "vision_config", None)
        towers = [m for m in self.model.modules() if getattr(m, "config", None) is vision]
        return not towers or name in inspect.signature(type(towers[0]).forward).parameters

    def _is_speech_to_text(self) -> bool:
        takes_audio = self._takes("input_features") or self._takes("input_values")
        return takes_audio and bool(self.config.is_encoder_decoder)

    def _find(self, names: Iterable[str], *, within: str | None = None, default: Any = None) -> Any:
        """Return the first of these fields that the configuration, or one of its parts, sets."""
        part = getattr(self.config, within, None) if within else None
        for config in (part, getattr(self.config, "encoder_config", None), self.config):
            for name in names:
                if config is not None and (value := getattr(config, name, None)) is not None:
                    return value
        return default

    # Images

    def _images(self) -> dict[str, torch.Tensor]:
        if self._takes("image_grid_thw"):
            return self._patches()
        height, width = _pair(self._find(("image_size", "input_size"), within="vision_config", default=32))
        channels = self._find(_CHANNELS, within="vision_config", default=3)
        pixels = self._normal(self.batch_size, *self._per_row(), channels, height, width)
        return {"pixel_values": pixels, **self._image_sizes(height, width)}

    def _per_row(self) -> tuple[int, ...]:
        """Return the axis for several images a row: an image and its tiles, or images that are masked by pixel."""
        if self._find(("image_grid_pinpoints",)):
            return (2,)
        return (1,) if self._takes("pixel_attention_mask") else ()

    def _image_sizes(self, height: int, width: int) -> dict[str, torch.Tensor]:
        import torch

        # Some language models pass the sizes on to whatever tower they have; not every tower takes them.
        used = self._find(("image_grid_pinpoints",)) or self._tower_takes("image_sizes")
        if not self._takes("image_sizes") or not used:
            return {}
        return {"image_sizes": torch.tensor([[height, width]] * self.batch_size)}

    def _patches(self) -> dict[str, torch.Tensor]:
        """Return images as rows of flattened patches, with one (time, height, width) grid an image."""
        import torch

        vision = self.config.vision_config
        side = 2 * getattr(vision, "spatial_merge_size", 1)
        channels = self._find(_CHANNELS, within="vision_config", default=3)
        size = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        grid = torch.tensor([[1, side, side]] * self.batch_size)
        return {"pixel_values": self._normal(self.batch_size * side * side, size), "image_grid_thw": grid}

    # Audio

    def _audio(self) -> dict[str, torch.Tensor]:
        import torch

        if self._takes("input_features"):
            bins = self._find(_MEL_BINS, within="audio_config", default=80)
            positions = self._find(("max_source_positions",), within="audio_config")
            # Encoders with a table of positions take (bins, frames) of exactly that length, the others
            # (frames, bins) of any.
            frames = 2 * positions if positions else _FRAMES
            shape = (bins, frames) if positions else (frames, bins)
            features = {"input_features": self._normal(self.batch_size, *shape)}
            for name in ("feature_attention_mask", "input_features_mask"):
                if self._takes(name):
                    features[name] = torch.ones(self.batch_size, frames, dtype=torch.long)
            return features
        return {"input_values": self._normal(self.batch_size, _SAMPLES)} if self._takes("input_values") else {}

    # Text

    def _text(
        self, images: Mapping[str, torch.Tensor], audio: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        import torch

        pieces = list(self._random_ids(_TEXT_TOKENS).chunk(2, dim=1))
        for inputs, names, features in (
            (images, _IMAGE_TOKENS, "get_image_features"),
            (audio, _AUDIO_TOKENS, "get_audio_features"),
        ):
            token = self._find(names)
            if inputs and token is not None:
                count = self._soft_tokens(features, inputs)
                pieces.insert(-1, torch.full((self.batch_size, count), token))
        ids = torch.cat(pieces, dim=1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        image_token = self._find(_IMAGE_TOKENS)
        if images and image_token is not None:
            types = (ids == image_token).long() * _IMAGE_TYPE
            batch |= {"mm_token_type_ids": types, "token_type_ids": types}
        return {name: tensor for name, tensor in batch.items() if self._takes(name)}

    def _random_ids(self, length: int) -> torch.Tensor:
        import torch

        vocabulary = self.config.get_text_config().vocab_size
        special = [i for i in _special_ids(self.config) if 3 < i < vocabulary]
        high = min([i for i in special if i > vocabulary // 2] + [vocabulary])
        return torch.randint(3, high, (self.batch_size, length), generator=self.generator)

    def _soft_tokens(self, method: str, inputs: Mapping[str, torch.Tensor]) -> int:
        """Return how many placeholders a row needs: as many as the tower, which is run, returns features."""
        import torch

        compute = getattr(self.model, method, None) or getattr(self.model.base_model, method)
        accepted = inspect.signature(compute).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        given = {k: v for k, v in cast_inputs(self.model, inputs).items() if takes_any or k in accepted}
        with torch.no_grad(), evaluating(self.model):
            features = compute(**given)
        return _rows(features) // self.batch_size

    # Labels

    def _labels(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        if not self._takes("labels"):
            return {"return_loss": torch.tensor(True)} if self._takes("return_loss") else {}
        if self.config.is_encoder_decoder:
            targets = self._random_ids(_TARGET_TOKENS)
            if getattr(self.config, "decoder_start_token_id", None) is None:
                # Without a start token the model cannot make the decoder's inputs from the labels.
                return {"labels": targets, "decoder_input_ids": targets.clone()}
            return {"labels": targets}
        if "input_ids" in batch and self.model.get_output_embeddings() is not None:
            ids = batch["input_ids"]
            soft = [t for t in (self._find(_IMAGE_TOKENS), self._find(_AUDIO_TOKENS)) if t is not None]
            return {"labels": ids.masked_fill(torch.isin(ids, torch.tensor(soft)), IGNORED_LABEL)}
        with torch.no_grad(), evaluating(self.model):
            output = self.model(**cast_inputs(self.model, batch))
        return {"labels": self._labels_like(output.logits)}

    def _labels_like(self, logits: torch.Tensor) -> torch.Tensor:
        import torch

        classes = logits.shape[-1]
        if logits.ndim == 2:
            return torch.randint(0, classes, logits.shape[:1], generator=self.generator)
        # A score per step and no text: a transcription, shorter than the steps, without the blank (0).
        steps = min(_TARGET_TOKENS, math.ceil(logits.shape[1] / 2))
        return torch.randint(1, classes, (logits.shape[0], steps), generator=self.generator)

    def _normal(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.randn(shape, generator=self.generator)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def _special_ids(config: PretrainedConfig) -> set[int]:
    fields = config.to_dict()
    parts = [fields, *(v for v in fields.values() if isinstance(v, dict))]
    values = [v for part in parts for k, v in part.items() if str(k).endswith(("_token_id", "_token_index"))]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return {i for i in flat if isinstance(i, int)}


def _rows(features: Any) -> int:
    """Count the feature vectors in a tower's output: a tensor, several, or an object that holds them."""
    import torch

    if isinstance(features, torch.Tensor):
        return math.prod(features.shape[:-1])
    for name in ("pooler_output", "last_hidden_state"):
        if (output := getattr(features, name, None)) is not None:
            return _rows(output)
    return sum(_rows(part) for part in features)
