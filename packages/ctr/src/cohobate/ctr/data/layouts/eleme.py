"""Ele.me search log (the public set of the Tianchi platform)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cohobate.core.errors import InputError
from cohobate.ctr.data import logs
from cohobate.ctr.data.logs import FLOAT, INT, STR, hashed, read_csv

USER = ["user_id", "gender", "visit_city", "is_supervip", "ctr_30", "ord_30"]
ITEM = [
    "shop_id", "item_id", "city_id", "district_id", "shop_aoi_id", "shop_geohash_6",
    "shop_geohash_12", "brand_id", "category_1_id", "merge_standard_food_id", "rank_7", "rank_30",
    "rank_90", "hours",
]  # fmt: skip
CONTEXT = ["times", "time_type", "weekdays", "geohash12"]
HISTORY = ["shop_id", "item_id", "category_1_id", "shop_aoi_id", "hours"]
COLUMNS = [
    "label", "user_id", "gender", "visit_city", "avg_price", "is_supervip", "ctr_30", "ord_30",
    "total_amt_30", *ITEM[:13], "shop_id_list", "item_id_list", "category_1_id_list",
    "merge_standard_food_id_list", "brand_id_list", "price_list", "shop_aoi_id_list",
    "shop_geohash6_list", "timediff_list", "hours_list", "time_type_list", "weekdays_list",
    "times", "hours", "time_type", "weekdays", "geohash12",
]  # fmt: skip
FILE = re.compile(r"D(\d+)(_\d+)?\.csv")


SIGN = "D*.csv"


def convert(root: Path, out: Path, length: int) -> None:
    """Ele.me: files ``D<day>[_<part>].csv``; the last day is test, the one before validation.

    Behaviours come as strings joined by ``;``, newest first, with an hour of the day for a time.
    """
    files = sorted((int(m[1]), p) for p in root.glob("D*.csv") if (m := FILE.fullmatch(p.name)))
    days = sorted({day for day, _ in files})
    if len(days) < 3:
        raise InputError(f"{root}: {len(days)} days of D<day>.csv; three are needed for a split")
    for day, path in files:
        split = "test" if day == days[-1] else "valid" if day == days[-2] else "train"
        (out / split).mkdir(exist_ok=True)
        with pq.ParquetWriter(
            out / split / f"{day:03d}-{path.stem}.parquet", ARROW, compression="zstd"
        ) as writer:
            for table in _rows(path, length):
                writer.write_table(table.cast(ARROW), logs.GROUP_ROWS)
    logs.write_schema(out, SCHEMA, FIELDS, length, "Ele.me search log, label click")


SCHEMA: dict[str, Any] = {
    "label": "label",
    "user": "user_id",
    "time": "hour",
    "time_unit": "hour",
    "profile": USER,
    "candidate": ITEM,
    "context": CONTEXT,
    "dense": ["avg_price", "total_amt_30"],
    "history": {f"hist_{name}": name for name in HISTORY},
    "history_time": "hist_hour",
}
FIELDS = hashed(**dict.fromkeys([*USER, *ITEM, *CONTEXT], 64)) | hashed(
    user_id=5_000_000, shop_id=2_000_000, item_id=5_000_000, district_id=10_000,
    shop_aoi_id=500_000, shop_geohash_6=200_000, shop_geohash_12=2_000_000, brand_id=500_000,
    merge_standard_food_id=200_000, visit_city=1_000, city_id=1_000, geohash12=5_000_000,
    category_1_id=1_000,
)  # fmt: skip
ARROW = pa.schema(
    {
        "label": pa.int8(),
        **dict.fromkeys([*USER, *ITEM, *CONTEXT], STR),
        "avg_price": FLOAT,
        "total_amt_30": FLOAT,
        "hour": INT,
        **{f"hist_{name}": pa.list_(STR) for name in HISTORY},
        "hist_hour": pa.list_(INT),
    }
)


def _rows(path: Path, length: int) -> Iterator[pa.Table]:
    """Rows of one file with behaviours as lists, oldest first."""
    with path.open() as file:
        header = file.readline().startswith("label")
    kinds: dict[str, pa.DataType] = dict.fromkeys(COLUMNS, STR)
    kinds |= {"label": pa.int8(), "avg_price": FLOAT, "total_amt_30": FLOAT}
    for batch in read_csv(path, kinds, None if header else COLUMNS):
        table = pa.Table.from_batches([batch])
        lists = {name: _newest_last(table[f"{name}_list"], length) for name in HISTORY}
        hours = lists["hours"]
        hour = pa.ListArray.from_arrays(hours.offsets, pc.cast(hours.values, INT))
        columns = {
            **{name: table[name] for name in ARROW.names if name in table.column_names},
            "hour": pc.cast(table["hours"], INT),
            **{f"hist_{name}": lists[name] for name in HISTORY},
            "hist_hour": hour,
        }
        yield pa.table({name: columns[name] for name in ARROW.names})


def _newest_last(column: pa.ChunkedArray, length: int) -> pa.ListArray:
    """Split ``a;b;c`` (newest first) to lists of at most ``length``, oldest first."""
    text = column.combine_chunks()
    parts = pc.split_pattern(text.fill_null(""), ";")
    parts = pa.ListArray.from_arrays(parts.offsets, parts.values)
    count = np.where(pc.equal(text.fill_null(""), "").to_numpy(zero_copy_only=False), 0,
                     np.diff(parts.offsets.to_numpy()))  # fmt: skip
    kept = np.minimum(count, length)
    begin = parts.offsets.to_numpy()[:-1]
    offsets = np.concatenate([[0], kept.cumsum()])
    # slot j of a list of n takes value n - 1 - j: the newest stands first in the file
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], kept)
    index = np.repeat(begin + kept - 1, kept) - place
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), parts.values.take(pa.array(index))
    )
