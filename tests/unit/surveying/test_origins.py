"""What a tensor was computed from is recorded through views, joins and in-place changes, on meta too."""

from __future__ import annotations

import pytest
import torch

from graftkit.surveying.checkpoint.origins import recording_origins


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_origins(device: str) -> None:
    a, b, c = (torch.ones(4, 2, device=device) for _ in range(3))
    with recording_origins({"a": a, "b": b, "c": c}) as origins_of, torch.no_grad():
        parts = a.unbind(0)
        joined = torch.cat([parts[1][None].transpose(0, 1), b.t().contiguous()], dim=1)
        changed = torch.zeros(4, 2, device=device).copy_(c)
        alone = torch.zeros(1, device=device)
    assert origins_of(a) == origins_of(parts[3]) == {"a"}
    assert origins_of(joined) == {"a", "b"}
    assert origins_of(changed) == {"c"}
    assert origins_of(alone) == frozenset()
