"""Which tensors another one was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING: frozenset[str] = frozenset()


@contextmanager
def recording_origins(tensors: Mapping[str, Tensor]) -> Iterator[Callable[[Tensor], frozenset[str]]]:
    """Record for the block what is computed from named tensors, on any device, meta included.

    Yields:
        A function from a tensor to the names of those that it was computed from, or that it is.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def origins_of(tensor: Tensor) -> frozenset[str]:
        found: frozenset[str] = getattr(tensor, "_graftkit_origins", _NOTHING)
        return found

    class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            given = (origins_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
            origins = _NOTHING.union(*given)
            for value in tree_leaves(made):
                if isinstance(value, torch.Tensor):
                    value._graftkit_origins = origins  # type: ignore[attr-defined]
            return made

    for name, tensor in tensors.items():
        tensor._graftkit_origins = frozenset((name,))  # type: ignore[attr-defined]
    with Recording():  # type: ignore[no-untyped-call]
        yield origins_of
