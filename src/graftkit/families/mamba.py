"""Mamba (first generation): weights that the mixer reads past their modules."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

# From the mixers' forward in transformers: ``mamba_inner_fn`` takes the weights themselves, and the time step
# is ``dt_proj.weight @ x`` with or without that kernel. PEFT refuses LoRA on conv1d and out_proj of these
# types by name (``_check_lora_target_modules_mamba``).
FAMILY = Family(
    name="mamba",
    model_types=("mamba", "falcon_mamba"),
    bypassed=(
        Bypassed("*mixer.conv1d", "the mixer hands conv1d.weight to a causal convolution function"),
        Bypassed("*mixer.dt_proj", "the mixer multiplies by dt_proj.weight itself"),
        Bypassed("*mixer.x_proj", "in training the fused kernel reads x_proj.weight"),
        Bypassed("*mixer.out_proj", "in training the fused kernel reads out_proj.weight"),
    ),
)
