"""MLX through mlx-lm, on whatever device it finds."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any


def start(job: dict[str, Any], _folder: Path) -> MlxSession:
    """Note what is served: mlx-lm puts adapters into a model to stay, so each is given a fresh one."""
    return MlxSession(Path(job["base"]), job["prefixes"], job.get("options", {}))


class MlxSession:
    """A base that is loaded once for each adapter (see ``launch.Session``)."""

    replaced: tuple[str, ...] = ()

    def __init__(self, base: Path, prefixes: list[list[int]], options: dict[str, Any]) -> None:
        self.version = version("mlx-lm")
        self._base = base
        self._prefixes = prefixes
        self._options = options

    def base(self) -> Any:
        return self._log_probabilities(self._model())

    def load(self, _name: str, path: str) -> Any:
        from mlx_lm.utils import load_adapters

        model = load_adapters(self._model(), path)
        model.eval()
        return model

    def adapted(self, adapter: Any) -> Any:
        return self._log_probabilities(adapter)

    def _model(self) -> Any:
        from mlx_lm.utils import load_model

        model, _config = load_model(self._base, **self._options)
        return model

    def _log_probabilities(self, model: Any) -> Any:
        import mlx.core as mx
        import numpy as np

        rows = []
        for prefix in self._prefixes:
            logits = model(mx.array([prefix]))[0, -1].astype(mx.float32)
            rows.append(np.array(logits - mx.logsumexp(logits)))
        return np.stack(rows)
