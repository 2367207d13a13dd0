"""Write a cache: resumable, by several processes, whole shard by whole shard."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from cohobate.core.cache.reader import META, TeacherCache, read_meta
from cohobate.core.cache.shards import shard_path, write_shard
from cohobate.core.cache.spec import CacheSpec, Form, Precision, name_of
from cohobate.core.errors import InputError
from cohobate.core.io import write_json
from cohobate.core.training.data import Draw

_SHARD_BYTES = 64 << 20
_SHARD_SAMPLES = 4096  # what a killed writer loses at most


class KeyedDataset(Protocol):
    """A map-style data set whose samples have names.

    ``sample_key(index)`` gives the sample's id and the key of its augmentation, a text from which
    the augmentation follows (crop corner, flips, or the seed of the draw); empty when there is no
    random augmentation. For ``cohobate cache`` it also has a ``transform_key``: a text that tells
    what is done to every sample, such as spacing and normalisation.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Any:
        """A sample; ``index`` may be a `cohobate.core.training.data.Draw`."""

    def sample_key(self, index: int) -> tuple[str, str]:
        """Id and augmentation key of that sample."""


def write_cache(
    out: Path,
    *,
    dataset: KeyedDataset,
    ask: Callable[[Any], Tensor],
    teacher: str,
    transform: str,
    form: Form = "topk",
    top_k: int = 64,
    precision: Precision = "float16",
    class_dim: int = 1,
    temperature: float = 1.0,
    draws: Sequence[int] | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    collate: Callable[[list[Any]], Any] = default_collate,
    shard_samples: int | None = None,
    part: int = 0,
    parts: int = 1,
    progress: bool = True,
) -> TeacherCache | None:
    """Ask a teacher about every sample once and keep its answers on disk.

    A shard appears whole or not at all, so a run that was killed goes on with the first shard that
    is missing, to the same files. Several processes may write one cache, each its ``part``.

    Args:
        out: Folder of the cache.
        dataset: The samples and their names.
        ask: From a collated batch to the teacher's logits (B, ...).
        teacher: Hash of the teacher's weights (`cohobate.core.teachers.weights_hash`).
        transform: Text that tells what is done to the samples; a reader must give the same.
        form: ``"dense"`` keeps all logits, ``"topk"`` the ``top_k`` largest and the others' mass.
        top_k: Classes kept by ``"topk"``.
        precision: Type of the stored logits or log-probabilities.
        class_dim: Axis of the classes in the batch's logits.
        temperature: Temperature of the stored log-probabilities (dense logits have none).
        draws: Indices to ask about, plain or with the seeds of augmentations; default all samples
            once. Draws of one name are stored once.
        batch_size: Samples in a batch.
        num_workers: Processes that load samples.
        collate: From samples to a batch.
        shard_samples: Samples in a shard; default 4096, or fewer that make 64 MiB.
        part: Which share of the shards this process writes.
        parts: Number of processes.
        progress: Show a progress bar.

    Returns:
        The cache, open for reading; ``None`` when shards of other parts are still missing.

    Raises:
        InputError: The folder holds another cache; the augmentation is random and has no key; a
            file cannot be written.
    """
    if not 0 <= part < parts:
        raise InputError(f"part: {part} is not in 0..{parts - 1}")
    plan = _names(dataset, range(len(dataset)) if draws is None else draws)
    if not plan:
        raise InputError(f"{out}: there is no sample to ask about")
    _refuse_unkeyed(dataset, plan)
    questions = _Questions(dataset, ask, plan, collate, num_workers)
    first = questions.first()
    if not -first.dim() <= class_dim < first.dim() or class_dim % first.dim() == 0:
        raise InputError(f"class_dim: {class_dim} is no class axis of logits {tuple(first.shape)}")
    axis = class_dim % first.dim() - 1
    classes = first.shape[axis + 1]
    if form == "topk" and not 0 < top_k <= classes:
        raise InputError(f"top_k: {top_k} of {classes} classes")
    spec = CacheSpec(
        teacher=teacher,
        transform=transform,
        classes=classes,
        form=form,
        top_k=top_k if form == "topk" else 0,
        precision=precision,
        class_axis=axis,
        temperature=temperature,
    )
    record = spec.encode(first[:1])[0].shape[1]
    default = max(1, min(_SHARD_SAMPLES, _SHARD_BYTES // record))
    samples = _settle(out, spec, list(plan), shard_samples or default)
    _write_shards(out, questions, spec, samples, (part, parts), batch_size, progress)
    count = -(-len(plan) // samples)
    complete = all(shard_path(out, n).exists() for n in range(count))
    return TeacherCache(out) if complete else None


def _write_shards(
    out: Path,
    questions: _Questions,
    spec: CacheSpec,
    samples: int,
    share: tuple[int, int],
    batch_size: int,
    progress: bool,
) -> None:
    """Write the shards of one part that are missing."""
    names = list(questions.plan)
    shards = [names[i : i + samples] for i in range(0, len(names), samples)]
    mine = range(share[0], len(shards), share[1])
    missing = [n for n in mine if not shard_path(out, n).exists()]
    _clean(out, missing)
    batches = [
        shards[n][i : i + batch_size] for n in missing for i in range(0, len(shards[n]), batch_size)
    ]
    answers = questions.answers(batches, spec)
    total = sum(len(shards[n]) for n in mine)
    left = sum(len(batch) for batch in batches)
    with tqdm(
        total=total, initial=total - left, unit="sample", disable=not progress, desc=str(out)
    ) as bar:
        for number in missing:
            records, shapes = [], []
            for _ in shards[number]:
                record, shape = next(answers)
                records.append(record)
                shapes.append(shape)
                bar.update()
            write_shard(shard_path(out, number), shards[number], records, shapes)


@dataclass
class _Questions:
    """What the teacher is asked, and how."""

    dataset: KeyedDataset
    ask: Callable[[Any], Tensor]
    plan: dict[str, int]
    collate: Callable[[list[Any]], Any]
    num_workers: int

    def first(self) -> Tensor:
        """The answer to the first sample."""
        draw = next(iter(self.plan.values()))
        with torch.no_grad():
            return self.ask(self.collate([self.dataset[draw]]))

    def answers(
        self, batches: list[list[str]], spec: CacheSpec
    ) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """Record and shape of every sample of the batches, in order."""
        places = iter(range(sum(len(batch) for batch in batches)))
        loader: DataLoader[Any] = DataLoader(
            _Drawn(self.dataset, [self.plan[name] for batch in batches for name in batch]),
            batch_sampler=[[next(places) for _ in batch] for batch in batches],
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # leaves the global random state alone
        )
        for batch in loader:
            with torch.no_grad():
                records, shape = spec.encode(self.ask(batch))
            for record in records:
                yield record, shape


class _Drawn(torch.utils.data.Dataset[Any]):
    """The samples of given draws."""

    def __init__(self, dataset: KeyedDataset, draws: list[int]) -> None:
        self.dataset, self.draws = dataset, draws

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, place: int) -> Any:
        return self.dataset[self.draws[place]]


def _names(dataset: KeyedDataset, draws: Sequence[int]) -> dict[str, int]:
    """Draws by name, in order, each name once."""
    plan: dict[str, int] = {}
    for draw in draws:
        plan.setdefault(name_of(*dataset.sample_key(draw)), draw)
    return plan


def _refuse_unkeyed(dataset: KeyedDataset, plan: dict[str, int]) -> None:
    """Refuse a data set that augments at random without saying how.

    The answer would belong to a crop nobody can find again. Two draws of one sample with different
    seeds tell, whatever the data set claims.
    """
    index = next(iter(plan.values()))
    sample, augmentation = dataset.sample_key(index)
    if augmentation:
        return
    with torch.random.fork_rng(devices=[]):
        seen = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            seen.append(dataset[Draw(int(index), seed)])
    if not _same(*seen):
        raise InputError(
            f"sample {sample}: two draws of it differ but have no augmentation key; "
            "cache the samples without random crops, or give sample_key the crop"
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two samples are equal, whatever they are made of."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "shape"):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


def _settle(out: Path, spec: CacheSpec, names: list[str], samples: int) -> int:
    """Found the cache, or check that the one there is the same; samples in a shard."""
    digest = blake2b("\0".join(names).encode(), digest_size=16).hexdigest()
    if (out / META).exists():
        meta = read_meta(out)
        meta["spec"].require(
            str(out), teacher=spec.teacher, transform=spec.transform, classes=spec.classes
        )
        if meta["spec"] != spec:
            raise InputError(f"{out}: made with {meta['spec']}, asked for {spec}")
        if meta["names"] != digest:
            raise InputError(f"{out}: made for {meta['samples']} other samples than these")
        return int(meta["shard_samples"])
    meta = {
        "format": 1,
        "spec": json.loads(spec.to_json()),
        "samples": len(names),
        "shard_samples": samples,
        "names": digest,
    }
    write_json(out / META, meta)
    return samples


def _clean(out: Path, missing: Sequence[int]) -> None:
    """Remove what killed writers left of the shards that are missing."""
    for number in missing:
        for leftover in out.glob(f".{shard_path(out, number).stem}.*"):
            pid = leftover.name.split(".")[2]
            with contextlib.suppress(ProcessLookupError, ValueError, PermissionError):
                os.kill(int(pid), 0)
                continue  # someone is writing it right now
            leftover.unlink(missing_ok=True)
