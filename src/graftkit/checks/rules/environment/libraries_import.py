"""Every library that training with the recipe needs must be installed, and must import.

## Why it matters

Some libraries are imported only after the model was loaded, others wherever they are installed: bitsandbytes that
does not find its CUDA libraries takes PEFT with it, whether or not anything is quantized.

## Example

`quantization: 4bit` without bitsandbytes, or `use_liger_kernel: true` without liger-kernel.

## How safe that is

Installing a library may change the versions of others: `pip install` says which, before it does.

## Sources

- peft: helpers, import_utils.is_bnb_available
- https://github.com/bitsandbytes-foundation/bitsandbytes/issues/266
- https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1449
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.faults import Fault, failed_with
from graftkit.checks.engine.rule import Observation, Rule, passed
from graftkit.env import ImportFailure, import_failure, is_installed
from graftkit.findings import Severity, Source
from graftkit.recipes.libraries import Library, libraries_of


def _check(context: CheckContext) -> Observation:
    needed = libraries_of(context.recipe)
    faults: dict[str, Fault] = {}
    for library in needed:
        failure = import_failure(library.name)
        if failure is not None:  # one that is broken breaks those that import it
            faults.setdefault(failure.package, _fault(library, failure))
    if faults:
        return failed_with(list(faults.values()), context.recipe)
    return passed(f"{', '.join(library.name for library in needed)} can be imported", libraries=len(needed))


def _fault(library: Library, failure: ImportFailure) -> Fault:
    missing = library.name == failure.package and not is_installed(library.name)
    if missing:
        return Fault(
            "missing", f"{library.name} is not installed", f"pip install '{library.install}'", library.key
        )
    return Fault("broken", f"{failure.package} cannot be imported: {failure.why}", failure.help, library.key)


RULE = Rule(
    code="GK004",
    title="every library that the recipe needs is installed and imports",
    severity=Severity.ERROR,
    needs=("recipe", "machine"),
    check=_check,
    help='pip install "graftkit[train]"',
    since="0.1.0",
    source=Source.VERSIONS,
)
