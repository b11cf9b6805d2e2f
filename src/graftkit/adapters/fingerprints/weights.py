"""What tells the weight files of one model from those of another, without reading them whole.

The headers of a base and of its instruction-tuned sibling are equal: names, dtypes and shapes. So bytes are
sampled as well: a block in the middle of up to 256 tensors, spread evenly over the sorted names. Together that is
at most a megabyte, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from graftkit.adapters.record import Fingerprint, TensorSample
from graftkit.errors import reraise_as
from graftkit.surveying.checkpoint.headers import Headers, read_headers
from graftkit.surveying.checkpoint.safetensors_header import StoredTensor, malformed

_BLOCK_BYTES = 4096
_CONTENT_TENSORS = 256
# Kept one by one, for a base that was quantized or saved in another dtype: mostly matrices, which fine-tuning
# changes more surely than norms.
_SAMPLED_MATRICES, _SAMPLED_VECTORS = 12, 4
_VALUES = 4
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Likeness(StrEnum):
    """How a base's weight files compare with those that an adapter was trained on."""

    SAME = "same"
    ROUNDED = "same values in another dtype"
    REPACKED = "same, as far as it is stored as it was"
    OTHER = "other weights"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare_weights`.

    Attributes:
        compared: tensors of which bytes or values were compared.
        different: names of those that differ.
        why: what could not be compared, where the likeness is unknown.
        dtypes: dtype of the compared tensors in the record -> that in the files, where they differ.
    """

    likeness: Likeness
    compared: int = 0
    different: tuple[str, ...] = ()
    why: str | None = None
    dtypes: Mapping[str, str] | None = None


def fingerprint(folder: Path) -> Fingerprint:
    """Return the fingerprint of a folder's safetensors files.

    Raises:
        SourceError: ``weights-not-found``, ``weights-header``: there are none, or they cannot be read.
    """
    headers = read_headers(folder)
    read = _Reader(folder, headers)
    samples = tuple(_sample(name, read) for name in _sampled(headers))
    return Fingerprint(headers=_headers_hash(headers), content=_content_hash(headers, read), samples=samples)


def compare_weights(known: Fingerprint, folder: Path) -> Comparison:
    """Compare a folder's safetensors files with a fingerprint.

    Raises:
        SourceError: as :func:`fingerprint`.
    """
    headers = read_headers(folder)
    read = _Reader(folder, headers)
    if _headers_hash(headers) == known.headers and _content_hash(headers, read) == known.content:
        return Comparison(Likeness.SAME, compared=min(len(headers), _CONTENT_TENSORS))
    return _by_samples(known, headers, read)


def _by_samples(known: Fingerprint, headers: Headers, read: _Reader) -> Comparison:
    verdicts: dict[str, bool] = {}
    dtypes: dict[str, str] = {}
    matrices = 0
    for sample in known.samples:
        stored = headers.get(sample.name)
        if stored is None or stored.shape != sample.shape:
            continue
        same = _same_sample(sample, _sample(sample.name, read))
        if same is None:
            continue
        verdicts[sample.name] = same
        matrices += len(sample.shape) > 1
        if stored.dtype != sample.dtype:
            dtypes[sample.dtype] = stored.dtype
    different = tuple(name for name, same in verdicts.items() if not same)
    found = Comparison(Likeness.UNKNOWN, len(verdicts), different, dtypes=dtypes or None)
    return _judged(found, known, headers, matrices)


def _judged(found: Comparison, known: Fingerprint, headers: Headers, matrices: int) -> Comparison:
    def judged(likeness: Likeness, why: str | None = None) -> Comparison:
        return Comparison(likeness, found.compared, found.different, why, found.dtypes)

    if found.different:
        return judged(Likeness.OTHER)
    if _headers_hash(headers) == known.headers:
        # The samples agree, and other tensors differ.
        return judged(Likeness.OTHER)
    if not matrices:
        return judged(Likeness.UNKNOWN, "no matrix in these files is stored under the name and in the form it had")
    return judged(Likeness.ROUNDED if found.compared == len(known.samples) and found.dtypes else Likeness.REPACKED)


def _same_sample(known: TensorSample, now: TensorSample) -> bool | None:
    """Compare bytes where the dtypes are equal, values where both are numbers; None where neither can be."""
    if known.dtype == now.dtype:
        return known.digest == now.digest
    if not known.values or not now.values:
        return None
    pairs = zip(known.values, now.values, strict=False)
    return all(_is_rounding(a, known.dtype, b, now.dtype) for a, b in pairs)


def _is_rounding(a: float, dtype: str, b: float, other: str) -> bool:
    """Check whether one number, rounded to the other's dtype, is the other."""
    return rounded(a, other) == b or rounded(b, dtype) == a


def rounded(value: float, dtype: str) -> float:
    """Return the value of a floating-point dtype that is nearest to a number."""
    try:
        if dtype == "BF16":
            return _rounded_to_bfloat16(value)
        formats = {"F16": "<e", "F32": "<f", "F64": "<d"}
        return float(struct.unpack(formats[dtype], struct.pack(formats[dtype], value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _rounded_to_bfloat16(value: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    # To nearest, ties to even: half of the last kept digit, less one where that digit is even.
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _headers_hash(headers: Headers) -> str:
    entries = sorted((name, stored.dtype, list(stored.shape)) for name, stored in headers.items())
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()


def _content_hash(headers: Headers, read: _Reader) -> str:
    digest = hashlib.sha256()
    for name in _spread(sorted(headers), _CONTENT_TENSORS):
        digest.update(read.block(name))
    return digest.hexdigest()


def _sampled(headers: Headers) -> list[str]:
    names = sorted(name for name, stored in headers.items() if stored.dtype in _FLOATS and all(stored.shape))
    matrices = [name for name in names if len(headers[name].shape) > 1]
    vectors = [name for name in names if len(headers[name].shape) == 1]
    return [*_spread(matrices, _SAMPLED_MATRICES), *_spread(vectors, _SAMPLED_VECTORS)]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """Return up to ``most`` of the names, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]


def _sample(name: str, read: _Reader) -> TensorSample:
    stored = read.headers[name]
    return TensorSample(
        name=name,
        dtype=stored.dtype,
        shape=stored.shape,
        digest=hashlib.sha256(read.block(name)).hexdigest()[:16],
        values=read.values(name),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads bytes of tensors from the files of a folder."""

    folder: Path
    headers: Headers

    def block(self, name: str) -> bytes:
        """Return a block from the middle of a tensor's data, all of a small one."""
        stored = self._stored(name)
        length = min(_BLOCK_BYTES, stored.nbytes)
        return self._bytes(name, stored.begin + (stored.nbytes - length) // 2, length)

    def values(self, name: str) -> tuple[float, ...]:
        """Return a few finite elements from fixed places; none of a tensor that is not floating-point."""
        stored = self._stored(name)
        width, count = _FLOATS.get(stored.dtype), stored.numel
        if width is None or not count:
            return ()
        places = [count * (2 * place + 1) // (2 * _VALUES) for place in range(_VALUES)]
        raw = [self._bytes(name, stored.begin + place * width, width) for place in places]
        found = [_number(item, stored.dtype) for item in raw]
        return tuple(found) if all(map(math.isfinite, found)) else ()

    def _stored(self, name: str) -> StoredTensor:
        return self.headers.files[self.headers[name].file].tensors[name]

    def _bytes(self, name: str, start: int, length: int) -> bytes:
        path = self.folder / self.headers[name].file
        with reraise_as(malformed, path), path.open("rb") as file:
            file.seek(start)
            content = file.read(length)
        if len(content) < length:
            raise malformed(str(path), "it became shorter while it was read")
        return content


def _number(raw: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    return float(struct.unpack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], raw)[0])
