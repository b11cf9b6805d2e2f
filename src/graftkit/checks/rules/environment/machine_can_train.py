"""The machine must be able to compute what the recipe asks for: its precision, its attention, its initializer.

## Why it matters

Some of it is refused only after the model was loaded. Some is not refused at all: on a CPU accelerate leaves
`fp16` out, and the run is in another precision than the recipe says.

## Example

`attn_implementation: flash_attention_2` without flash-attn, or `init_lora_weights: loftq` without a GPU.

## How safe that is

A recipe for another machine is right as it is: `graft verify --recipe FILE --twin` rehearses it on any.

## Sources

- https://github.com/huggingface/trl/issues/3616
- https://github.com/databrickslabs/dolly/issues/11
- transformers: TrainingArguments._validate_args, PreTrainedModel._check_and_adjust_attn_implementation
- accelerate: Accelerator.__init__
- peft: utils.loftq_utils.loftq_init
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.faults import Fault, failed_with
from graftkit.checks.engine.rule import Observation, Rule, passed
from graftkit.checks.probes.attention import attention_refusal
from graftkit.errors import BuildError, SourceError
from graftkit.findings import Severity, Source
from graftkit.recipes.initializer import initializer_key, recipe_initializer
from graftkit.recipes.training import precision_of, uses_cpu

# Source: peft.utils.loftq_utils.loftq_init, which computes there and nowhere else.
_LOFTQ_RUNS_ON = ("cuda", "xpu")


def _check(context: CheckContext) -> Observation:
    faults = [*_precision(context), *_attention(context), *_initializer(context)]
    if faults:
        return failed_with(faults, context.recipe)
    device = "cpu" if uses_cpu(context.recipe.args, context.machine) else context.machine.accelerator
    return passed(f"{device or 'cpu'} can compute what the recipe asks for", device=device or "cpu")


def _precision(context: CheckContext) -> Iterator[Fault]:
    args, machine = context.recipe.args, context.machine
    precision, key = precision_of(args), "args.fp16" if args.get("fp16") else "args.bf16"
    if uses_cpu(args, machine):
        if precision == "fp16":
            message = "fp16 has no effect on a CPU: accelerate leaves it out, and says nothing"
            yield Fault("fp16-on-cpu", message, "args: {bf16: true} or {bf16: false}, without fp16", key)
    elif precision == "bf16" and not machine.bf16:
        if machine.accelerator is None:
            asked = "use_cpu: false asks for one" if args.get("use_cpu") is False else "DeepSpeed needs one for it"
            message = f"bf16, which is TRL's default, but there is no accelerator, and {asked}"
            yield Fault("bf16-without-accelerator", message, "args: {use_cpu: true} or {bf16: false}", key)
        else:
            message = f"{machine.accelerator} has no bfloat16 here, which is TRL's default"
            yield Fault("no-bf16", message, "args: {fp16: true}, or {bf16: false} for float32", key)


def _attention(context: CheckContext) -> Iterator[Fault]:
    options = context.recipe.args.get("model_init_kwargs")
    asked = options.get("attn_implementation") if isinstance(options, Mapping) else None
    if not isinstance(asked, str):
        return
    try:
        refusal = attention_refusal(context.recipe.fields.model, asked)
    except (SourceError, BuildError):
        return  # what is wrong with the model is said elsewhere
    if refusal is not None:
        package = " pip install flash-attn --no-build-isolation, with a GPU; or" if "flash" in asked else ""
        yield Fault(
            "attention",
            f"attn_implementation {asked} cannot be used: {refusal}",
            f"{package} leave attn_implementation out: transformers then chooses sdpa".strip(),
            "args.model_init_kwargs.attn_implementation",
        )


def _initializer(context: CheckContext) -> Iterator[Fault]:
    row, accelerator = recipe_initializer(context.recipe), context.machine.accelerator
    if row is not None and row.name == "loftq" and accelerator not in _LOFTQ_RUNS_ON:
        yield Fault(
            "loftq-without-gpu",
            f"LoftQ computes on {' or '.join(_LOFTQ_RUNS_ON)}, and this machine has {accelerator or 'neither'}",
            "train on such a machine, or use another initializer: pissa and olora need none",
            ".".join(initializer_key(context.recipe)),
        )


RULE = Rule(
    code="GK005",
    title="this machine can compute what the recipe asks for",
    severity=Severity.ERROR,
    needs=("recipe", "machine"),
    check=_check,
    help="train on a machine that can, or change the recipe",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
