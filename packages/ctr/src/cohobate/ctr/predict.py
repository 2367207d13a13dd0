"""Click probabilities for parquet files, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.ctr.data.columns import Decoder, check_columns
from cohobate.ctr.data.schema import Schema, read_schema
from cohobate.ctr.data.stream import gather, open_parquet
from cohobate.ctr.metrics import calibrate
from cohobate.ctr.nets.inputs import Features

if TYPE_CHECKING:
    from cohobate.ctr.suan.method import DistilSUAN


def predict_parquet(
    model: DistilSUAN, inputs: list[Path], out: Path, schema: Path | None, batch_size: int
) -> list[Path]:
    """Copy files with a column ``probability`` added, corrected for the sampling rate.

    Args:
        model: a trained run.
        inputs: parquet files, or folders of them.
        out: folder for files of the same names.
        schema: roles of the columns; default ``schema.yaml`` beside a file or one folder up.
        batch_size: rows at once.

    Returns:
        The files written.

    Raises:
        InputError: a file or its schema is wrong, or does not fit the model.
    """
    files = [
        file
        for path in inputs
        for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])
    ]
    if not files:
        raise InputError(f"{inputs[0]}: no *.parquet in this folder")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in tqdm(files, "predict", disable=len(files) < 2):
        roles = read_schema(schema or _schema_beside(path))
        if roles.layout.ids != model.layout.ids or roles.layout.pairs != model.layout.pairs:
            raise InputError(f"{roles.path}: not the schema that the model was trained with")
        target = out / path.name
        if target.resolve() == path.resolve():
            raise InputError(f"{path}: --out would overwrite the input")
        with save_atomic(target) as temporary:
            _write(model, path, temporary, roles, batch_size)
        written.append(target)
    return written


def _schema_beside(path: Path) -> Path:
    for folder in (path.parent, path.parent.parent):
        if (folder / "schema.yaml").exists():
            return folder / "schema.yaml"
    raise InputError(f"{path}: no schema.yaml beside it or one folder up; give --schema")


def _write(model: DistilSUAN, path: Path, target: Path, schema: Schema, rows: int) -> None:
    with open_parquet(path) as file:
        check_columns(schema, file.schema_arrow, path, labelled=False)
        if "probability" in file.schema_arrow.names:
            raise InputError(f"{path}: column 'probability' is there already")
        columns = file.schema_arrow.append(pa.field("probability", pa.float32()))
        with pq.ParquetWriter(target, columns, compression="zstd") as writer:
            for batch, probability in _scores(model, file, path, schema, rows):
                arrays = [*batch.columns, pa.array(probability)]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=columns))


def _scores(
    model: DistilSUAN, file: pq.ParquetFile, path: Path, schema: Schema, rows: int
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    decode, first = Decoder(schema, labelled=False), 0
    for batch in file.iter_batches(rows):
        found = gather(decode(batch, path, first), np.arange(batch.num_rows), schema.length)
        features = Features(*(x.to(model.device) for x in found.features))
        p = calibrate(torch.sigmoid(model.network(*features)), model.sample_rate)
        yield batch, p.cpu().numpy()
        first += batch.num_rows
