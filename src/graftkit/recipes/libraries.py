"""The libraries that training with a recipe needs, and what imports wherever they are installed."""

from __future__ import annotations

from dataclasses import dataclass

from graftkit.env import is_installed
from graftkit.recipes.initializer import initializer_key, recipe_initializer
from graftkit.recipes.recipe import Recipe


@dataclass(frozen=True)
class Library:
    """A library that a recipe needs.

    Attributes:
        name: what is imported.
        key: the recipe's dotted key that needs it; None where PEFT imports it for every recipe.
        install: what pip installs.
    """

    name: str
    key: str | None
    install: str


# Argument -> the library that the trainer imports where it is set, and its name for pip.
# Source: transformers.training_args, trl.trainer.sft_trainer, trl.trainer.grpo_trainer.
_ARGUMENTS = {
    "deepspeed": ("deepspeed", "deepspeed"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_vllm": ("vllm", "trl[vllm]"),
}


def libraries_of(recipe: Recipe) -> tuple[Library, ...]:
    """Return the libraries that training with this recipe imports, each before those that import it.

    The libraries of its optimizer and its trackers are not among them: transformers says what those need.
    """
    found = []
    if recipe.fields.quantization is not None:
        found.append(Library("bitsandbytes", "quantization", "graftkit[quant]"))
    elif (row := recipe_initializer(recipe)) and row.name == "loftq":  # source: peft.utils.loftq_utils.loftq_init
        found.append(Library("bitsandbytes", ".".join(initializer_key(recipe)), "graftkit[quant]"))
    elif is_installed("bitsandbytes"):  # source: peft.helpers imports it at the top
        found.append(Library("bitsandbytes", None, "graftkit[quant]"))
    found += [Library(name, None, name) for name in ("accelerate", "peft")]
    found += [Library(name, "trainer", "graftkit[train]") for name in ("datasets", "trl")]
    found += [
        Library(name, f"args.{argument}", install)
        for argument, (name, install) in _ARGUMENTS.items()
        if recipe.args.get(argument)
    ]
    return tuple(found)
