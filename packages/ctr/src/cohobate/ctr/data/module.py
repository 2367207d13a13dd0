"""The data module: a folder of parquet shards, a public set as downloaded, or generated clicks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from cohobate.core.errors import InputError
from cohobate.core.training.data import ResumableLoader
from cohobate.ctr.data.cache import prepared
from cohobate.ctr.data.columns import Future
from cohobate.ctr.data.generator import SPLITS, write_generated
from cohobate.ctr.data.layouts import prepare
from cohobate.ctr.data.schema import Schema, read_schema
from cohobate.ctr.data.stream import BatchOrder, ClickRows, Piece, plan
from cohobate.ctr.nets.inputs import Batch, Layout


class ClickData(pl.LightningDataModule):
    """Click logs, streamed from parquet.

    ``root`` is one of

    - nothing: generated clicks (SYNTHETIC) with a known best AUC;
    - a folder with ``schema.yaml`` and shards, either in ``train``, ``valid`` and ``test`` or flat,
      split by the schema's ``valid_from`` and ``test_from``;
    - a public set as downloaded: MovieLens (``ratings.csv``), KuaiRand-Pure, Taobao display ads,
      Ele.me; it is prepared once into the cache.

    Args:
        root: the folder.
        schema: the schema when it is not ``schema.yaml`` in ``root``.
        length: newest behaviours kept (L), instead of the schema's.
        batch_size: rows a training batch in each process.
        eval_batch_size: rows a batch of validation and test.
        shuffle: permute row groups and the rows inside each epoch; a log is read in time order
            otherwise, as the paper does.
        num_workers: processes that decode; the order does not depend on it.
        future: a behaviour later than its impression is an ``error`` or is left out (``drop``).
        limit_rows: train on the first so many rows only (scaling-law runs).
        permute_labels: shuffle the labels of training and validation part: from them nothing can be
            learned, and no epoch chosen.
        rows: rows of the generated train, validation and test part.
        sample: seed of the generated users.
        cache: folder for prepared data.
        seed: of the order.

    Attributes:
        layout: sizes the networks need.
        sample_rate: share of the negatives in the data.
        first_epoch: number that the order of the first epoch is drawn for.
        best_auc: best reachable test AUC; None where the clicks' probabilities are not known.

    Raises:
        InputError: the folder is no known layout, or a file in it is wrong.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        schema: Path | None = None,
        length: int | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 4096,
        shuffle: bool = False,
        num_workers: int = 0,
        future: Future = "error",
        limit_rows: int | None = None,
        permute_labels: bool = False,
        rows: tuple[int, int, int] = (20_000, 5_000, 10_000),
        sample: int = 0,
        cache: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise InputError(f"data.batch_size {batch_size}: batch normalisation needs at least 2")
        self.folder, found = self._folder(root, schema, cache, rows, sample, length)
        self.schema: Schema = replace(found, length=length or found.length)
        self.layout: Layout = self.schema.layout
        self.sample_rate: float = self.schema.sample_rate
        self.best_auc: float | None = self.schema.best_auc
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.shuffle, self.num_workers = shuffle, num_workers
        self.first_epoch = 0
        self.future: Future = future
        self.limit_rows, self.permute_labels, self.seed = limit_rows, permute_labels, seed

    @staticmethod
    def _folder(
        root: Path | None,
        schema: Path | None,
        cache: Path | None,
        rows: tuple[int, int, int],
        sample: int,
        length: int | None,
    ) -> tuple[Path, Schema]:
        if root is None:
            size = length or 16
            folder = prepared(
                "generated",
                [4, rows, sample, size],
                lambda path: write_generated(path, rows, length=size, seed=sample),
                cache,
            )
            return folder, read_schema(folder / "schema.yaml")
        if not root.is_dir():
            raise InputError(f"{root}: no such folder")
        file = schema or root / "schema.yaml"
        if not file.exists() and schema is None:
            root = prepare(root, cache, length)
            file = root / "schema.yaml"
        return root, read_schema(file)

    def describe(self) -> str:
        """One line on what the data are."""
        return self.schema.about or f"click log in {self.folder}"

    def pieces(self, split: str) -> tuple[list[Piece], tuple[int | None, int | None]]:
        """Row groups of ``train``, ``valid`` or ``test``, and the split's bounds in time.

        Raises:
            InputError: there are no shards, or no way to split them.
        """
        if (self.folder / split).is_dir():
            bounds: tuple[int | None, int | None] = (None, None)
            files = sorted((self.folder / split).glob("*.parquet"))
        else:
            valid, test = self.schema.valid_from, self.schema.test_from
            if valid is None or test is None or valid >= test:
                raise InputError(
                    f"{self.schema.path}: valid_from {valid} and test_from {test} must split the "
                    f"shards in time (or put them into {', '.join(SPLITS)})"
                )
            bounds = {"train": (None, valid), "valid": (valid, test), "test": (test, None)}[split]
            files = sorted(self.folder.glob("*.parquet"))
        if not files:
            raise InputError(f"{self.folder}: no *.parquet for {split}")
        return plan(files, self.schema, *bounds), bounds

    def rows(self, split: str) -> ClickRows:
        """The batches of a split for the processes that run now."""
        pieces, bounds = self.pieces(split)
        training = split == "train"
        if training and self.limit_rows is not None:
            pieces = _first(pieces, self.limit_rows)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return ClickRows(
            pieces,
            self.schema,
            batch_size=self.batch_size if training else self.eval_batch_size,
            shuffle=self.shuffle and training,
            first_epoch=self.first_epoch,
            seed=self.seed,
            world=torch.distributed.get_world_size() if distributed else 1,
            future=self.future,
            bounds=bounds,
            permute_labels=self.permute_labels and split != "test",
        )

    def train_dataloader(self) -> ResumableLoader:
        """Training batches in an order that is a function of seed and epoch."""
        rows = self.rows("train")
        return ResumableLoader(
            rows,
            batch_size=1,
            sampler=BatchOrder(rows),
            collate_fn=_only,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _evaluation(self, split: str) -> DataLoader[Batch]:
        rows = self.rows(split)
        return DataLoader(
            rows, batch_size=None, sampler=BatchOrder(rows), num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, in order."""
        return self._evaluation("valid")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test batches again."""
        return self._evaluation("test")


def _only(batches: list[Batch]) -> Batch:
    """The one batch that the data set gives: it is a batch already."""
    return batches[0]


def _first(pieces: list[Piece], rows: int) -> list[Piece]:
    """The pieces that hold the first ``rows`` rows; the last one is cut."""
    kept = []
    for piece in pieces:
        if rows <= 0:
            break
        kept.append(replace(piece, kept=min(piece.kept, rows)))
        rows -= piece.kept
    return kept
