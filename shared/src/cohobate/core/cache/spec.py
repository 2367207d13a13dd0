"""What a cache holds, and how one sample's answer becomes bytes and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.fused import TopK

Form = Literal["dense", "topk"]
Precision = Literal["float16", "bfloat16", "float32"]

_ALIGNMENT = 8  # bytes


@dataclass(frozen=True)
class CacheSpec:
    """Everything a cache must agree on with whoever reads it.

    Attributes:
        teacher: Hash of the teacher's weights (`cohobate.core.teachers.weights_hash`).
        transform: Text that tells what was done to the samples before the teacher saw them.
        classes: Size of the class axis.
        form: All logits, or the top classes with the mass of all others.
        top_k: How many top classes; 0 for ``dense``.
        precision: Type of the stored logits or log-probabilities.
        class_axis: Axis of the classes in the answer to one sample.
        temperature: Temperature of stored log-probabilities.
    """

    teacher: str
    transform: str
    classes: int
    form: Form
    top_k: int
    precision: Precision
    class_axis: int
    temperature: float

    def require(
        self, path: str, *, teacher: str | None, transform: str | None, classes: int | None
    ) -> None:
        """Refuse a cache that was made otherwise.

        Raises:
            InputError: The first thing that differs, with both values.
        """
        asked = {"teacher": teacher, "transform": transform, "number of classes": classes}
        made = {
            "teacher": self.teacher,
            "transform": self.transform,
            "number of classes": self.classes,
        }
        for name, value in asked.items():
            if value is not None and value != made[name]:
                raise InputError(
                    f"{path}: made with {name} {_short(made[name])}, asked for {_short(value)}"
                )

    def to_json(self) -> str:
        """As JSON, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored values."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def id_dtype(self) -> torch.dtype:
        """Type of the stored class indices."""
        return torch.uint16 if self.classes <= 1 << 16 else torch.int32

    def encode(self, answers: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Turn the answers to a batch into bytes.

        Args:
            answers: Logits (B, *sample) with the classes on axis ``class_axis`` of the sample.

        Returns:
            Records (B, bytes) as uint8, and the shape each comes back in: that of the sample, for
            top classes without the class axis.
        """
        if self.form == "dense":
            values = answers.to(self.dtype)
            return _records([values]), tuple(answers.shape[1:])
        z = answers.movedim(self.class_axis + 1, -1).float() / self.temperature
        log_probs = z.log_softmax(-1)
        top, ids = log_probs.topk(self.top_k, dim=-1)
        log_tail = log_probs.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        parts = [log_tail.float(), top.to(self.dtype), ids.to(self.id_dtype)]
        return _records(parts), tuple(z.shape[1:-1])

    def decode(self, records: Tensor, shape: tuple[int, ...]) -> Tensor | TopK:
        """Undo `encode`: a tensor (B, *sample), or top classes (B, *items, k)."""
        count = int(np.prod(shape, dtype=np.int64))
        if self.form == "dense":
            (values,) = _split(records, [(self.dtype, count)])
            return values.view(-1, *shape)
        tops = count * self.top_k
        log_tail, top, ids = _split(
            records, [(torch.float32, count), (self.dtype, tops), (self.id_dtype, tops)]
        )
        return TopK(
            ids.to(torch.int64).view(-1, *shape, self.top_k),
            top.view(-1, *shape, self.top_k),
            log_tail.view(-1, *shape),
        )


def _records(parts: Sequence[Tensor]) -> Tensor:
    """Lay the parts of each sample side by side as bytes, padded to the alignment."""
    rows = [part.contiguous().view(len(part), -1).view(torch.uint8).cpu() for part in parts]
    size = sum(row.shape[1] for row in rows)
    rows.append(rows[0].new_zeros(len(rows[0]), -size % _ALIGNMENT))
    return torch.cat(rows, 1)


def _split(records: Tensor, parts: Sequence[tuple[torch.dtype, int]]) -> Iterator[Tensor]:
    """Cut records (B, bytes) into typed parts (B, count)."""
    start = 0
    for dtype, count in parts:
        stop = start + count * dtype.itemsize
        yield records[:, start:stop].contiguous().view(dtype)
        start = stop


def name_of(sample: str, augmentation: str = "") -> str:
    """The name under which the answer to an augmented sample is stored."""
    return f"{sample}\x1f{augmentation}" if augmentation else sample


def keys_of(names: Sequence[str]) -> np.ndarray:
    """64-bit keys of names."""
    digests = [blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _short(value: object) -> str:
    """A hash or description that fits a line."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]}…"
