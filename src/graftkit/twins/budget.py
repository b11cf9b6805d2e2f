"""A bound on the time and the memory of code that is not ours: each operation is asked for both before it runs."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.errors import BuildError
from graftkit.text import size

if TYPE_CHECKING:
    from torch import Tensor

# What the tensors that a block makes may take at once: several times what a twin of the largest size weighs.
MEMORY = 4_000_000_000
# Operations that cannot make more elements than this, by what they are given, are not estimated first.
_SMALL = 1 << 24
# What one thread of a slow machine multiplies and adds in a second.
_FLOPS = 5e9
# What torch calls a dispatch mode through.
_DISPATCH = re.compile(r"torch[/\\](_compile|_dynamo[/\\]\w+)\.py$")


class OverBudgetError(BuildError):
    """Code was stopped because it needs more time or memory than it may have."""

    code = "twin"


@contextmanager
def within(seconds: float, memory: int = MEMORY) -> Iterator[None]:
    """Stop what the block computes with torch on the CPU once it took too long, or would take too much memory.

    Every operation is counted, in a backward pass too. One that makes much from what it is given is tried on the
    meta device first, so that a single large one is stopped before it runs. Python code between operations is not
    stopped.

    Args:
        seconds: of this thread's computing: other processes do not count.
        memory: bytes that the tensors which the block makes may take at once.

    Raises:
        OverBudgetError: from the operation that went too far, and from each one after it.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    meter = _Meter(time.thread_time() + seconds, memory)

    class Metered(TorchDispatchMode):  # type: ignore[no-untyped-call]
        # Operators that contain others, such as flex attention, run as they are.
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return meter.run(func, args, kwargs or {})

    with Metered():  # type: ignore[no-untyped-call]
        yield


class _Meter:
    """What a block has used: its time, and the storages that it made and that are alive."""

    def __init__(self, deadline: float, memory: int) -> None:
        self.deadline = deadline
        self.memory = memory
        self.alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.used = 0

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation unless it goes too far."""
        if time.thread_time() > self.deadline:
            raise _too_slow()
        if getattr(func, "is_view", False):
            return func(*args, **kwargs)
        if _may_be_large(args, kwargs) and not _is_on_meta(args, kwargs):
            self._estimate(func, args, kwargs)
        made = func(*args, **kwargs)
        for tensor in _tensors(made):
            self._count(tensor)
        if self.used > self.memory:
            raise _too_large(self.used, self.memory)
        return made

    def _estimate(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Refuse an operation whose result would be too large, or take longer than there is time."""
        import torch
        from torch.utils._pytree import tree_map
        from torch.utils.flop_counter import flop_registry

        args, kwargs = tree_map(_on_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        if "generator" in kwargs:
            kwargs["generator"] = None
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        try:
            made = func(*args, **kwargs)
        except Exception:  # its result depends on values, or it has no such form: it is counted once it ran
            return
        new = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in _tensors(made))}
        wanted = self.used + sum(size for key, size in new.items() if key not in given)
        if wanted > self.memory:
            raise _too_large(wanted, self.memory)
        flops = flop_registry.get(getattr(func, "_overloadpacket", None))
        left = self.deadline - time.thread_time()
        if flops is not None and flops(*args, **kwargs, out_val=made) > left * _FLOPS:
            raise _too_slow()

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, taken = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = (weakref.ref(storage, lambda _: self._free(key)), taken)
            self.used += taken

    def _free(self, key: int) -> None:
        self.used -= self.alive.pop(key)[1]


def let_go(error: BaseException) -> None:
    """Take the tracebacks from an error that is kept, and from those that led to it: they hold what was computed.

    Their frames keep every local variable alive, which in a forward pass are activations, and modules in a
    constructor. Emptying the frames is not enough: the functions that they ran hold what these closed over.
    """
    behind, seen = [error], set[int]()
    while behind:
        one = behind.pop()
        if id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            behind += [other for other in (one.__cause__, one.__context__) if other is not None]


def unmetered(calls: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the calls that led to an error, with their files, without those that a block's bounds put between."""
    found = list(calls)
    if any(file == __file__ for file, _ in found):
        found = found[: [file for file, _ in found].index(__file__)]
        while found and _DISPATCH.search(found[-1][0]):
            found.pop()
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _may_be_large(args: Any, kwargs: Any) -> bool:
    """Check whether an operation may make many elements: as many as every one of its numbers times every other."""
    return _product([*args, *kwargs.values()]) > _SMALL


def _is_on_meta(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return bool(device.type == "meta")
    return any(tensor.device.type == "meta" for tensor in _tensors([args, kwargs]))


def _product(values: Any) -> int:
    import torch

    product = 1
    for value in values:
        if isinstance(value, torch.Tensor):
            product *= max(1, value.numel())
        elif isinstance(value, list | tuple):
            product *= _product(value)
        elif isinstance(value, int):
            product *= max(1, value)
    return product


def _on_meta(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _too_slow() -> OverBudgetError:
    return OverBudgetError("it takes longer than there is time", help="pass overrides that make the twin smaller")


def _too_large(wanted: int, memory: int) -> OverBudgetError:
    what = f"it needs {size(wanted)} of memory at once, more than {size(memory)}"
    return OverBudgetError(what, help="pass overrides that make the twin smaller")
