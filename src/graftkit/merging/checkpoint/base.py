"""The base of a merge: a local checkpoint folder, and its model on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import MergeError, SourceError, reraise_as
from graftkit.files import why_no_folder
from graftkit.merging.checkpoint.shards import Weights, read_weights
from graftkit.merging.checkpoint.weight_conversion import Groups, group_weights
from graftkit.merging.errors import base_unreadable
from graftkit.surveying.checkpoint.comparison import Checkpoint, compare
from graftkit.surveying.checkpoint.complete import check_complete
from graftkit.surveying.checkpoint.headers import cached_weights, read_headers
from graftkit.surveying.sources import hub
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.hub_errors import weights_not_local
from graftkit.surveying.sources.load_config import load_config
from graftkit.surveying.sources.model_class import model_class_of
from graftkit.surveying.ties import tied_names
from graftkit.text import describe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Files with these suffixes are weights; all others (configuration, tokenizer, code, licence) are copied.
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".npz", ".ot"}
)


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter is merged into.

    Attributes:
        build: builds its model on the meta device.
    """

    weights: Weights
    build: Callable[[], PreTrainedModel] = field(repr=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, on the meta device. Building it imports its class, which may take seconds."""
        return self.build()

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @cached_property
    def groups(self) -> Groups:
        """Disk tensors and parameters that are converted together."""
        return group_weights(self.model, self.weights.shard_of)

    @cached_property
    def compared(self) -> Checkpoint:
        """The weight files against the model's class."""
        return compare(self.model, read_headers(self.folder))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters and saved buffers."""
        return {name: tuple(t.shape) for name, t in self.model.state_dict(keep_vars=True).items()}

    @cached_property
    def ties(self) -> dict[str, tuple[str, ...]]:
        """Parameter -> all its names, for those that have several."""
        return {name: names for names in tied_names(self.model) for name in names}

    def stored_as(self, parameter: str) -> str:
        """Return the name under which the files hold a parameter: one that is tied may be there under another."""
        names = (parameter, *self.ties.get(parameter, ()))
        return next((name for name in names if name in self.groups.of_param), parameter)

    @property
    def companions(self) -> tuple[Path, ...]:
        """The files that are copied unchanged.

        Raises:
            SourceError: ``not-readable``: the folder no longer exists.
        """
        with reraise_as(base_unreadable, self.folder):
            files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return tuple(p for p in files if p.suffix not in _WEIGHT_SUFFIXES and not p.name.endswith(".index.json"))


def read_base(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Base:
    """Read the base from a directory or a hub id, and refuse one that lacks weights of its class.

    Raises:
        SourceError: ``weights-incomplete``; as :func:`open_base`.
        MergeError: ``merge-quantized-base``.
    """
    base = open_base(source, trust_remote_code=trust_remote_code, revision=revision)
    _check_not_quantized(base.model.config, base.folder)
    check_complete(base.compared, str(source))
    return base


def open_base(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Base:
    """Read a base from a directory or a hub id, whether or not its weights load into its class.

    Raises:
        SourceError: as :func:`graftkit.surveying.sources.load_config.load_config` and
            :func:`graftkit.surveying.checkpoint.headers.read_headers`; ``weights-not-local`` where the
            hub's weights are not in the cache and cannot be downloaded.
    """
    folder = _folder(source, revision)
    model = _build(folder, trust_remote_code)
    return Base(read_weights(folder), lambda: model)


def local_base(source: str | Path, revision: str | None = None) -> Base | None:
    """Return a base whose files are on this machine, None where they are not. Nothing of it is checked or built.

    Raises:
        SourceError: as :func:`graftkit.surveying.checkpoint.headers.read_headers`.
    """
    folder = _local_folder(source, revision)
    return None if folder is None else Base(read_weights(folder), partial(_build, folder, trust_remote_code=False))


def _build(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    loaded = load_config(folder, trust_remote_code=trust_remote_code)
    return build_on_meta(loaded.config, model_class_of(loaded))


def _local_folder(source: str | Path, revision: str | None) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    cached = None if isinstance(source, Path) else cached_weights(str(source), revision)
    if cached is not None and (cached.path.parent / "config.json").is_file():
        return cached.path.parent
    return None


def _folder(source: str | Path, revision: str | None) -> Path:
    local = _local_folder(source, revision)
    if local is not None:
        return local
    text = str(source)
    if isinstance(source, Path) or not (hub.is_hub_id(text) or hub.from_cache(text, "config.json", revision)):
        raise SourceError(
            "no such directory or hub id",
            where=text,
            why=why_no_folder(Path(source).expanduser()),
            help="name the folder that save_pretrained() wrote, or a hub id as owner/name",
            code="not-found",
        )
    return _fetched(text, revision)


def _fetched(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    refusal = hub.why_not_asked(repo_id, revision)
    if refusal is not None and refusal.code == "hub-offline":
        raise weights_not_local(repo_id, revision, refusal.why) from refusal
    # A repository without a configuration is fetched, to say what it holds instead.
    if refusal is not None and refusal.code != "hub-no-file":
        raise refusal
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md"]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise weights_not_local(repo_id, revision, describe(error)) from error


def _check_not_quantized(config: PretrainedConfig, folder: Path) -> None:
    quantization = config.to_dict().get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown method")
    raise MergeError(
        "the base is quantized, and rounding would lose the update",
        where=str(folder),
        why=f"its weights are quantized ({method})",
        help="merge into the 16-bit model that it was made from, then quantize the result",
        code="merge-quantized-base",
    )
