"""SYNTHETIC click log with known click probabilities, so the best reachable AUC is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tqdm import tqdm

from cohobate.ctr.metrics import auc

CATEGORIES, ITEMS, IMPRESSIONS, APART = 8, 64, 8, 4
DAY = 86_400
START = 1_600_000_000
USERS_A_PART = 2_048
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class World:
    """The fixed tables behind the clicks.

    Args:
        profile: (6, 4, 8) taste of age and gender for a category.
        hour: (4, 8) taste of a quarter of the day for a category.
        affinity: (8, 8) what past behaviours of a category say about another.
        quality: (64,) of an item.
    """

    profile: np.ndarray
    hour: np.ndarray
    affinity: np.ndarray
    quality: np.ndarray

    @classmethod
    def make(cls, seed: int = 0) -> World:
        """Draw a world."""
        rng = np.random.default_rng([seed, 0])
        return cls(
            rng.normal(size=(6, 4, CATEGORIES)),
            0.5 * rng.normal(size=(4, CATEGORIES)),
            rng.normal(size=(CATEGORIES, CATEGORIES)),
            0.5 * rng.normal(size=ITEMS),
        )


def _behaviours(
    world: World, users: int, steps: int, taste: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Items and times (users, steps): a category lasts while behaviours follow each other soon."""
    gaps = np.exp(rng.normal(8, 2.2, (users, steps)))
    odds = np.exp(1.2 * taste)
    edges = (odds / odds.sum(1, keepdims=True)).cumsum(1)
    fresh = (rng.random((users, steps, 1)) > edges[:, None]).sum(-1).clip(max=CATEGORIES - 1)
    keep = rng.random((users, steps)) < np.where(gaps < 3600, 0.85, 0.35)
    keep[:, 0] = False
    # the category of a step is the one freshly drawn at the last step that did not keep
    source = np.maximum.accumulate(np.where(keep, 0, np.arange(steps)), axis=1)
    category = np.take_along_axis(fresh, source, 1)
    item = category + CATEGORIES * rng.integers(0, ITEMS // CATEGORIES, (users, steps))
    begin = START + rng.integers(0, 30 * DAY, (users, 1))
    return item, begin + gaps.cumsum(1).astype(np.int64)


def generate(world: World, users: int, length: int, rng: np.random.Generator) -> dict[str, Any]:
    """Draw the impressions of some users.

    Args:
        world: the fixed tables.
        users: number of users, with eight impressions each.
        length: most behaviours of a history (L).
        rng: the random numbers.

    Returns:
        Columns by name; histories as ``(n, L)`` arrays with a count of the real ones on the right.
    """
    age, gender = rng.integers(0, 6, users), rng.integers(0, 4, users)
    city = rng.integers(0, 30, users)
    taste = world.profile[age, gender]
    steps = length + APART * (IMPRESSIONS - 1)
    item, time = _behaviours(world, users, steps, taste, rng)
    window = np.arange(length) + APART * np.arange(IMPRESSIONS)[:, None]
    item, time = item[:, window].reshape(-1, length), time[:, window].reshape(-1, length)
    n = len(item)
    count = rng.integers(-(-length // 3), length + 1, n)
    recent = item[np.arange(n), length - 1 - rng.integers(0, min(4, length), n)]
    candidate = np.where(rng.random(n) < 0.4, recent, rng.integers(0, ITEMS, n))
    shown = time[:, -1] + np.exp(rng.normal(7, 2, n)).astype(np.int64) + 1

    category = candidate % CATEGORIES
    real = np.arange(length) >= length - count[:, None]
    weight = real * (np.exp(-(shown[:, None] - time) / (2 * DAY)) + 0.03)
    total = weight.sum(1) + 0.3
    past = item % CATEGORIES
    same = (weight * (past == category[:, None])).sum(1) / total
    related = (weight * world.affinity[past, category[:, None]]).sum(1) / total
    user = np.repeat(np.arange(users), IMPRESSIONS)
    quarter = shown // 3600 % 24 // 6
    seen = (real & (item == candidate[:, None])).any(1)
    logit = (
        -1.6
        + 2.2 * same
        + 2.0 * related
        + 0.6 * taste[user, category]
        + world.hour[quarter, category]
        + world.quality[candidate]
        - seen
    )
    probability = 1 / (1 + np.exp(-logit))
    return {
        "label": (rng.random(n) < probability).astype(np.int8),
        "probability": probability.astype(np.float32),
        "user_id": user,
        "timestamp": shown,
        "age": age[user],
        "gender": gender[user],
        "city": city[user],
        "item": candidate,
        "category": category,
        "quarter": quarter,
        "history": item,
        "history_time": time,
        "count": count,
    }


def as_table(columns: dict[str, Any], first_user: int) -> pa.Table:
    """Turn generated columns to a table ordered by time, histories as lists."""
    order = np.argsort(columns["timestamp"], kind="stable")
    count, item = columns["count"][order], columns["history"][order]
    length = item.shape[1]
    real = np.arange(length) >= length - count[:, None]
    offsets = pa.array(np.concatenate([[0], count.cumsum()]), pa.int32())

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values[real], kind))

    time = columns["history_time"][order]
    small = {
        k: pa.array(columns[k][order], pa.int8())
        for k in ("label", "age", "gender", "city", "item", "category", "quarter")
    }
    return pa.table(
        {
            **small,
            "click_probability": pa.array(columns["probability"][order]),
            "user_id": pa.array(columns["user_id"][order] + first_user),
            "timestamp": pa.array(columns["timestamp"][order]),
            "hist_item": lists(item, pa.int8()),
            "hist_category": lists(item % CATEGORIES, pa.int8()),
            "hist_quarter": lists(time // 3600 % 24 // 6, pa.int8()),
            "hist_timestamp": lists(time, pa.int64()),
        }
    )


SCHEMA: dict[str, Any] = {
    "label": "label",
    "user": "user_id",
    "time": "timestamp",
    "profile": ["age", "gender", "city"],
    "candidate": ["item", "category", "quarter"],
    "history": {"hist_item": "item", "hist_category": "category", "hist_quarter": "quarter"},
    "history_time": "hist_timestamp",
    "fields": {
        name: {"encoding": "identity", "size": size}
        for name, size in {
            "age": 6, "gender": 4, "city": 30, "item": ITEMS, "category": CATEGORIES, "quarter": 4
        }.items()
    },
}  # fmt: skip


def _parts(rows: int, length: int, seed: int, split: int, world: World) -> Iterator[pa.Table]:
    left, number = rows, 0
    while left > 0:
        users = min(USERS_A_PART, -(-left // IMPRESSIONS))
        rng = np.random.default_rng([seed, 1 + split, number])
        table = as_table(generate(world, users, length, rng), number * USERS_A_PART)
        yield table.slice(0, left)
        left, number = left - table.num_rows, number + 1


def write_generated(
    folder: Path,
    rows: tuple[int, int, int] = (20_000, 5_000, 10_000),
    *,
    length: int = 16,
    seed: int = 0,
    world_seed: int = 0,
) -> None:
    """Write train, valid and test shards and their schema; memory does not grow with ``rows``.

    Train, validation and test users differ; the tables of the world are the same.

    Args:
        folder: an empty folder.
        rows: rows of train, valid and test.
        length: most behaviours of a history (L).
        seed: of users and clicks.
        world_seed: of the fixed tables.
    """
    world = World.make(world_seed)
    best = float("nan")
    for split, (name, count) in enumerate(zip(SPLITS, rows, strict=True)):
        (folder / name).mkdir(parents=True)
        writer, kept = None, []
        parts = _parts(count, length, seed, split, world)
        for table in tqdm(parts, name, -(-count // (USERS_A_PART * IMPRESSIONS)), leave=False):
            if writer is None:
                path = folder / name / "part-0.parquet"
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            if name == "test":
                kept.append(table.select(["label", "click_probability"]))
        if writer is not None:
            writer.close()
        if kept:
            truth = pa.concat_tables(kept)
            p, y = (torch.tensor(truth[c].to_numpy()) for c in ("click_probability", "label"))
            best = float(auc(p, y))
    about = f"SYNTHETIC clicks, best reachable test AUC {best:.4f}"
    content = {**SCHEMA, "length": length, "about": about, "best_auc": best}
    (folder / "schema.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
