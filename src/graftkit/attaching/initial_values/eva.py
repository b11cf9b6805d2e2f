"""EVA: the principal components of each layer's inputs, and ranks by what they explain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.attaching.initial_values.layers import PlainLora, check_reached, inputs_of, name_targets
from graftkit.errors import AttachError
from graftkit.modeling.device import on_device_of
from graftkit.modeling.entry import run
from graftkit.modeling.module_mode import evaluating

if TYPE_CHECKING:
    from torch import Tensor

# PEFT repeats the batches until the components converge: with few batches that can take long, and with a threshold
# that they never reach would not end.
_MOST_PASSES = 200


def eva(lora: PlainLora, batches: Sequence[Mapping[str, Any]]) -> None:
    """Fill ``lora_A`` with components; layers may get other ranks, down to none."""
    from peft import initialize_lora_eva_weights

    _check_examples(lora, _examples(lora, batches))
    dtypes = {path: layer.lora_A[lora.adapter].weight.dtype for path, layer in lora.layers.items()}
    # PEFT moves what it is given to a device, and warns of anything that is not a tensor.
    options = {n: value for batch in batches for n, value in batch.items() if not hasattr(value, "to")}
    lora.set_initializer()
    initialize_lora_eva_weights(
        lora.model,
        [{n: t for n, t in on_device_of(lora.base, batch).items() if n not in options} for batch in batches],
        forward_fn=_counted_forward(len(batches), options),
        prepare_model_inputs_fn=_token_mask,
        prepare_layer_inputs_fn=_layer_rows,
        adapter_name=lora.adapter,
        # Every process has the same batches.
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    for path, layer in lora.layers.items():
        lora.keep_state(layer, dtypes[path])
    name_targets(lora)


def _counted_forward(batches: int, options: Mapping[str, Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    left = iter(range(_MOST_PASSES * batches))

    def forward(model: Any, inputs: Mapping[str, Any]) -> Any:
        if next(left, None) is None:
            raise AttachError(
                f"EVA's components did not converge in {_MOST_PASSES} passes over the batches",
                why="their directions still turn more from batch to batch than eva_config.tau allows",
                help="pass more or larger batches, a lower rank, or a lower tau",
                code="initialize-unsettled",
            )
        with evaluating(model):
            return run(model, {**inputs, **options})

    return forward


def _token_mask(inputs: Mapping[str, Any], config: Any) -> Tensor | None:
    """Return (B, T) bool, the tokens that count, or None for inputs that are not tokens."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        return None
    mask = inputs.get("attention_mask")
    counted = tokens.new_ones(tokens.shape).bool() if mask is None or mask.shape != tokens.shape else mask.bool()
    labels = inputs.get("labels")
    if config.eva_config.use_label_mask and labels is not None and labels.shape == counted.shape:
        counted = counted & (labels != config.eva_config.label_mask_value)
    return counted  # type: ignore[no-any-return]


def _layer_rows(layer_input: Any, mask: Tensor | None, _layer_name: str) -> Tensor:
    """Return (examples, features): the tokens that count, or every row of a layer that does not run on tokens."""
    rows = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if mask is not None and rows.dim() == 3 and rows.shape[:2] == mask.shape:
        return rows[mask.to(rows.device)]  # type: ignore[no-any-return]
    # PEFT views it as one row, which a transposed input has no memory for.
    return rows.reshape(-1, rows.shape[-1]).contiguous()  # type: ignore[no-any-return]


def _examples(lora: PlainLora, batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the examples of each layer in the batch that gives it most; the first must reach them all."""
    most = dict.fromkeys(lora.layers, 0)
    for number, batch in enumerate(batches):
        mask = _token_mask(on_device_of(lora.base, batch), lora.config)
        for path, inputs in inputs_of(lora.base, most, batch).items():
            most[path] = max(most[path], len(_layer_rows(inputs, mask, path)))
        if number == 0:
            check_reached(most)
    return most


def _check_examples(lora: PlainLora, examples: Mapping[str, int]) -> None:
    rho: float = lora.config.eva_config.rho
    for path, found in examples.items():
        rank, features = lora.rank(path), lora.layers[path].in_features
        needed = round(rank * rho)
        if min(found, features) < needed:
            raise AttachError(
                f"EVA looks for {needed} components and gets {found} examples of {features} features",
                where=path,
                why=f"it looks for rank {rank} times rho {rho:g} in each batch",
                help="pass larger batches, a lower rank, or eva_config with rho=1.0",
                code="initialize-few",
            )
