"""Click probabilities for parquet files, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
from cohobate.ctr.nets.inputs import ClickNetwork, Features


def predict_parquet(
    network: ClickNetwork,
    sample_rate: float,
    inputs: list[Path],
    out: Path,
    schema: Path | None,
    batch_size: int,
) -> list[Path]:
    """Copy files with a column ``probability`` added, corrected for the sampling rate.

    Args:
        network: a trained network, in evaluation.
        sample_rate: share of the negatives it was trained with.
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
        if roles.layout.ids != network.layout.ids or roles.layout.pairs != network.layout.pairs:
            raise InputError(f"{roles.path}: not the schema that the model was trained with")
        target = out / path.name
        if target.resolve() == path.resolve():
            raise InputError(f"{path}: --out would overwrite the input")
        with save_atomic(target) as temporary:
            _write(network, sample_rate, path, temporary, roles, batch_size)
        written.append(target)
    return written


def _schema_beside(path: Path) -> Path:
    for folder in (path.parent, path.parent.parent):
        if (folder / "schema.yaml").exists():
            return folder / "schema.yaml"
    raise InputError(f"{path}: no schema.yaml beside it or one folder up; give --schema")


def _write(
    network: ClickNetwork, sample_rate: float, path: Path, target: Path, schema: Schema, rows: int
) -> None:
    with open_parquet(path) as file:
        check_columns(schema, file.schema_arrow, path, labelled=False)
        if "probability" in file.schema_arrow.names:
            raise InputError(f"{path}: column 'probability' is there already")
        columns = file.schema_arrow.append(pa.field("probability", pa.float32()))
        with pq.ParquetWriter(target, columns, compression="zstd") as writer:
            for batch, logit in _logits(network, file, path, schema, rows):
                probability = calibrate(torch.sigmoid(logit), sample_rate)
                arrays = [*batch.columns, pa.array(probability.cpu().numpy())]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=columns))


def _logits(
    network: ClickNetwork, file: pq.ParquetFile, path: Path, schema: Schema, rows: int
) -> Iterator[tuple[pa.RecordBatch, torch.Tensor]]:
    decode, first = Decoder(schema, labelled=False), 0
    device = next(network.parameters()).device
    for batch in file.iter_batches(rows):
        found = gather(decode(batch, path, first), np.arange(batch.num_rows), schema.length)
        features = Features(*(x.to(device) for x in found.features))
        yield batch, network(*features)
        first += batch.num_rows
