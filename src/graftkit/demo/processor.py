"""A tokenizer and a processor for the demo's digits, made locally: nothing is downloaded.

Only the vocabulary is made up. Pictures go through transformers' own Gemma 4 image processor, and text
through its own placeholder expansion, so that the batches have the keys, shapes and token types of the
real model's batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from transformers import Gemma4Processor, PreTrainedTokenizerFast

PATCH_SIZE = 2
"""Side of one patch in pixels: an 8x8 digit has 16 patches."""

POOLING_KERNEL_SIZE = 2
"""Patches pooled along each side into one soft token.

Not 1: without pooling, Gemma 4's vision tower keeps the padding patches instead of the picture's
(transformers 5.23, ``Gemma4VisionPooler.forward`` returns the mask of padding uninverted).
"""

SOFT_TOKENS = 4
"""Soft tokens of one 8x8 digit: ``(8 / (PATCH_SIZE * POOLING_KERNEL_SIZE)) ** 2``."""

_MAX_SOFT_TOKENS = 70  # the smallest budget that Gemma 4's image processor takes
_VOCAB_MULTIPLE = 64

# Gemma 4's special tokens; the first three also have Gemma 4's ids: 0, 1, 2.
_STANDARD = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
_PLACEHOLDERS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
_WORDS = (*"0123456789", "digit")


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer for the ten digits, the prompt's word and Gemma 4's special tokens.

    The special tokens are also attributes (``image_token``, ``image_token_id``, ``boi_token`` …), as on
    Gemma 4's own tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Placeholders last, as in Gemma 4's own vocabulary: every id below them is ordinary text.
    tokens = (*_STANDARD.values(), *_WORDS, *_PLACEHOLDERS.values())
    vocabulary = {token: at for at, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_STANDARD["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=_PLACEHOLDERS, model_max_length=256, **_STANDARD
    )


def digit_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> Gemma4Processor:
    """Return Gemma 4's processor for the digits.

    A batch has ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (1 on the picture's tokens),
    ``pixel_values`` and ``image_position_ids``. For B digits, ``pixel_values`` is float32 of shape (B, 16, 12)
    with values in [0, 1] and ``image_position_ids`` is int64 of shape (B, 16, 2): each patch's column and row.

    Args:
        tokenizer: the tokenizer to use; by default, a new :func:`digit_tokenizer`.
    """
    from transformers import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    image_processor = Gemma4ImageProcessorPil(
        patch_size=PATCH_SIZE,
        pooling_kernel_size=POOLING_KERNEL_SIZE,
        max_soft_tokens=_MAX_SOFT_TOKENS,
        do_resize=False,  # resizing would enlarge a digit to the whole budget of patches
    )
    return _processor_class()(Gemma4AudioFeatureExtractor(), image_processor, tokenizer or digit_tokenizer())


def config_overrides(tokenizer: PreTrainedTokenizerFast | None = None) -> dict[str, Any]:
    """Return the fields of a ``Gemma4Config`` that have to agree with the tokenizer and the image processor.

    A nested mapping: token ids, vocabulary size (rounded up to a multiple of 64), patch size and pooling.

    Args:
        tokenizer: the tokenizer to agree with; by default, a new :func:`digit_tokenizer`.
    """
    known = tokenizer or digit_tokenizer()
    size = -(-len(known) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    ids = {name: known.convert_tokens_to_ids(token) for name, token in (_STANDARD | _PLACEHOLDERS).items()}
    return {
        "image_token_id": ids["image_token"],
        "boi_token_id": ids["boi_token"],
        "eoi_token_id": ids["eoi_token"],
        "audio_token_id": ids["audio_token"],
        "boa_token_id": ids["boa_token"],
        "eoa_token_index": ids["eoa_token"],
        "video_token_id": ids["video_token"],
        "text_config": {
            "vocab_size": size,
            "vocab_size_per_layer_input": size,
            "pad_token_id": ids["pad_token"],
            "eos_token_id": ids["eos_token"],
            "bos_token_id": ids["bos_token"],
        },
        "vision_config": {"patch_size": PATCH_SIZE, "pooling_kernel_size": POOLING_KERNEL_SIZE},
    }


@contextmanager
def known_to_transformers(processor: Gemma4Processor) -> Iterator[None]:
    """Let ``AutoProcessor`` load this processor's class, as it loads Gemma 4's own if torchvision is installed."""
    from transformers import AutoProcessor, Gemma4Config
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    AutoProcessor.register(Gemma4Config, type(processor), exist_ok=True)
    try:
        yield
    finally:
        PROCESSOR_MAPPING._extra_content.pop(Gemma4Config)


@functools.cache
def _processor_class() -> type[Gemma4Processor]:
    """Return Gemma 4's processor class without its video part, which needs torchvision.

    Made on first use, because its base class is a heavy import.
    """
    from transformers import Gemma4Processor
    from transformers.processing_utils import ProcessorMixin

    class DigitProcessor(Gemma4Processor):  # type: ignore[misc]  # transformers is untyped
        # ProcessorMixin reads the names of the parts from this signature.
        def __init__(
            self, feature_extractor: Any, image_processor: Any, tokenizer: Any, chat_template: Any = None
        ) -> None:
            self.image_seq_length = SOFT_TOKENS
            self.audio_seq_length = 750
            self.audio_ms_per_token = 40
            for kind in ("image", "audio", "video"):
                setattr(self, f"{kind}_token", getattr(tokenizer, f"{kind}_token"))
                setattr(self, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
            for edge in ("boi_token", "eoi_token", "boa_token", "eoa_token"):
                setattr(self, edge, getattr(tokenizer, edge))
            ProcessorMixin.__init__(
                self, feature_extractor, image_processor, tokenizer, chat_template=chat_template
            )

        def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
            pictures, placeholders = super()._process_images(images, **kwargs)
            return _without_padding(pictures), placeholders

    return DigitProcessor


def _without_padding(pictures: Any) -> Any:
    """Cut the padding that all pictures of the batch share.

    The image processor pads 16 patches to its smallest budget, 280; the tower would spend nine tenths of its
    time on patches that it then drops. The results are the same without them.
    """
    used = int((pictures["image_position_ids"] >= 0).all(-1).sum(-1).max())
    for name in ("pixel_values", "image_position_ids"):
        pictures[name] = pictures[name][:, :used]
    return pictures
