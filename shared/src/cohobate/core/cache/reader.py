"""Read a cache: as a map-style data set, beside the student's samples, or as a teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cohobate.core.cache.shards import Shard, shard_path
from cohobate.core.cache.spec import CacheSpec, keys_of, name_of
from cohobate.core.errors import InputError
from cohobate.core.fused import TopK

META = "cache.json"

Answer = Tensor | TopK


def read_meta(folder: Path) -> dict[str, Any]:
    """What a cache says about itself; ``spec`` as a `CacheSpec`.

    Raises:
        InputError: There is no cache, or its description is damaged.
    """
    path = folder / META
    if not path.is_file():
        raise InputError(f"{path}: no such cache")
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        meta["spec"] = CacheSpec(**meta["spec"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error}") from None
    return meta


class TeacherCache(Dataset[Answer]):
    """A teacher's answers on disk, by sample name or by position.

    Opening it reads the shards' indices; records are memory-mapped and each is checked against its
    checksum when read. It may be pickled to workers, which map the files anew.

    Args:
        path: Folder of the cache.
        teacher: Hash the cache must have been made with.
        transform: Transform it must have been made with.
        classes: Number of classes it must have.

    Raises:
        InputError: It was made otherwise, is incomplete, or is damaged.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        teacher: str | None = None,
        transform: str | None = None,
        classes: int | None = None,
    ) -> None:
        self.path = Path(path)
        meta = read_meta(self.path)
        self.spec: CacheSpec = meta["spec"]
        self.spec.require(str(self.path), teacher=teacher, transform=transform, classes=classes)
        count = -(-int(meta["samples"]) // int(meta["shard_samples"]))
        files = [shard_path(self.path, number) for number in range(count)]
        absent = [file for file in files if not file.exists()]
        if absent:
            raise InputError(
                f"{absent[0]}: missing, with {len(absent)} of {count} shards; "
                "the command that writes the cache goes on where it stopped"
            )
        self._files = files
        self._open()

    def _open(self) -> None:
        self._shards = [Shard(file) for file in self._files]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        keys = np.concatenate([shard.key for shard in self._shards])
        self._order = keys.argsort(kind="stable")
        self._sorted = keys[self._order]
        if len(keys) > 1 and (self._sorted[1:] == self._sorted[:-1]).any():
            raise InputError(f"{self.path}: two samples of one key")
        self._sizes = np.concatenate([shard.sizes for shard in self._shards])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "spec": self.spec, "_files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def names(self) -> list[tuple[str, str]]:
        """Sample id and augmentation key of every position."""
        flat = [name.partition("\x1f") for shard in self._shards for name in shard.names]
        return [(sample, augmentation) for sample, _, augmentation in flat]

    def __getitem__(self, position: int) -> Answer:
        """The answer at a position, without a batch axis."""
        answer = self.__getitems__([position])
        return TopK(*(t[0] for t in answer)) if isinstance(answer, TopK) else answer[0]

    def __getitems__(self, positions: Sequence[int] | np.ndarray) -> Answer:
        """The answers at positions, as one batch (so give the loader ``collate_fn=lambda x: x``).

        Raises:
            InputError: Their shapes differ, or a record is damaged.
        """
        places = np.asarray(positions, dtype=np.int64)
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        rows = places - self._starts[numbers]
        sizes = self._sizes[places]
        records = np.empty((len(places), int(sizes[0])), dtype=np.uint8)
        shape: tuple[int, ...] | None = None
        for number in np.unique(numbers):
            mine = numbers == number
            shard = self._shards[number]
            shapes = np.unique(shard.shape[rows[mine]], axis=0)
            if len(shapes) > 1 or shape not in (None, found := tuple(shapes[0].tolist())):
                raise InputError(f"{self.path}: answers of different shapes do not make a batch")
            shape = found
            part = np.empty((int(mine.sum()), records.shape[1]), dtype=np.uint8)
            shard.read(rows[mine], part)
            records[mine] = part
        assert shape is not None
        return self.spec.decode(torch.from_numpy(records), shape)

    def find(
        self, samples: Sequence[str], augmentations: Sequence[str] | None = None
    ) -> np.ndarray:
        """Positions of samples by name.

        Args:
            samples: Sample ids.
            augmentations: Key of each sample's augmentation; ``None`` for none.

        Raises:
            InputError: A sample is not there, or only under other augmentations.
        """
        names = (
            list(samples)
            if augmentations is None
            else [name_of(*pair) for pair in zip(samples, augmentations, strict=True)]
        )
        keys = keys_of(names)
        places = np.searchsorted(self._sorted, keys).clip(max=len(self) - 1)
        wrong = np.flatnonzero(self._sorted[places] != keys)
        if len(wrong):
            raise InputError(f"{self.path}: {self._absent(names[wrong[0]])}")
        return self._order[places]

    def _absent(self, name: str) -> str:
        sample, _, augmentation = name.partition("\x1f")
        known = [key for other, key in self.names if other == sample]
        asked = f"under augmentation {augmentation!r}" if augmentation else "without augmentation"
        if not known:
            return f"no sample {sample}"
        return f"no sample {sample} {asked}; it is there under {known[0]!r}, {len(known)} in all"

    def read(self, samples: Sequence[str], augmentations: Sequence[str] | None = None) -> Answer:
        """The answers to samples by name, as one batch.

        Raises:
            InputError: As `find`, or a record is damaged.
        """
        return self.__getitems__(self.find(samples, augmentations))

    def verify(self, *, progress: bool = True) -> None:
        """Read every record.

        Raises:
            InputError: One is damaged.
        """
        for shard in tqdm(self._shards, unit="shard", disable=not progress, desc=str(self.path)):
            for size in np.unique(shard.sizes):
                rows = np.flatnonzero(shard.sizes == size)
                shard.read(rows, np.empty((len(rows), int(size)), dtype=np.uint8))


class WithAnswers(Dataset[Any]):
    """A data set of dictionaries that also carry the teacher's cached answer.

    Args:
        dataset: Samples with names (`cohobate.core.cache.KeyedDataset`).
        cache: The answers.
        field: Key under which each sample gets its answer.
    """

    def __init__(self, dataset: Any, cache: TeacherCache, *, field: str = "teacher") -> None:
        self.dataset, self.cache, self.field = dataset, cache, field

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples with answers; the answers are read as one batch."""
        samples, augmentations = zip(*(self.dataset.sample_key(i) for i in indices), strict=True)
        answers = self.cache.read(samples, augmentations)
        found = []
        for place, index in enumerate(indices):
            answer: Any
            if isinstance(answers, TopK):
                answer = TopK(*(tensor[place] for tensor in answers))
            else:
                answer = answers[place]
            found.append({**self.dataset[index], self.field: answer})
        return found
