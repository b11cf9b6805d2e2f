"""Candidates for text, and for the labels of any class."""

from __future__ import annotations

from graftkit.twins.batches.facts import ModelFacts

TEXT_TOKENS = 12
_TARGET_TOKENS = 4
_CODEBOOKS = ("num_codebooks", "num_channels", "n_codebooks", "num_quantizers", "num_vq", "n_codes_total")
_VOCABULARIES = ("vocab_size", "text_vocab_size", "audio_vocab_size")


def texts(facts: ModelFacts) -> list[dict[str, str]]:
    """Return groups of inputs for text: tokens, or codes of several books a step."""
    if not facts.takes("input_ids"):
        return []
    groups = [_with_masks(facts, ids) for ids in (f"tokens({TEXT_TOKENS})", *_codes(facts))]
    if not facts.is_encoder_decoder or not facts.takes("decoder_input_ids"):
        return groups
    return [{**group, "decoder_input_ids": ids} for group in groups for ids in decoder_ids(facts)]


def _with_masks(facts: ModelFacts, ids: str) -> dict[str, str]:
    group = {"input_ids": ids}
    if facts.takes("attention_mask"):
        group["attention_mask"] = "ones(B, T)"
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if facts.takes(name):
            group[name] = "types()"
    if facts.takes("token_type_ids", "pixel_values"):
        group["token_type_ids"] = "types()"
    return group


def decoder_ids(facts: ModelFacts) -> list[str]:
    """Return ids for a decoder of a few steps: tokens, or several codes a step."""
    codes = [code.replace(f" {TEXT_TOKENS}", f" {_TARGET_TOKENS}") for code in _codes(facts)]
    return [f"words({_TARGET_TOKENS})", *codes]


def _codes(facts: ModelFacts) -> list[str]:
    books, limit = facts.fields(_CODEBOOKS), facts.fields(_VOCABULARIES)
    if not limit:
        return []
    low = min(limit, key=facts.value)
    numbers = [book for book in books if isinstance(facts.value(book), int) and "vision" not in book]
    steps = [f"B, {TEXT_TOKENS}, {{}}", f"B, {{}}, {TEXT_TOKENS}"]
    counts = [*numbers, *(f"{book} + 1" for book in numbers)]
    return [f"integers(0, {low}, {shape.format(count)})" for count in counts for shape in steps]


def labels(facts: ModelFacts, *, has_text: bool) -> list[dict[str, str]]:
    """Return what a class may compute a loss from, the best guess first."""
    found: list[dict[str, str]] = []
    if facts.takes("labels"):
        found += [{"labels": value} for value in _labels(facts, has_text=has_text)]
    if facts.takes("return_loss"):
        found.append({"return_loss": "True"})
    return found


def _labels(facts: ModelFacts, *, has_text: bool) -> list[str]:
    classes, steps = "integers(0, num_labels, B)", f"integers(1, vocab_size, B, {_TARGET_TOKENS})"
    if facts.is_encoder_decoder:
        return decoder_ids(facts)
    if has_text:
        return ["targets()", "integers(0, num_labels, B, T)", classes]
    by_step = len(facts.inputs["labels"].shape) == 2
    return [steps, classes] if by_step else [classes, steps]
