"""The random state that a model draws from: kept, or fixed for the time of a block."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def fork_random_state(model: nn.Module) -> Iterator[None]:
    """Restore after the block the random state of Python, NumPy, the CPU and the model's devices."""
    import numpy as np
    import torch

    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def seeding(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the block from a fixed random state; restore after it the one that was.

    Models draw from torch's generators, and a few masks and samplers of transformers from Python's and NumPy's.
    """
    import numpy as np
    import torch

    with fork_random_state(model):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
