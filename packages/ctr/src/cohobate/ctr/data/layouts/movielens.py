"""MovieLens with ``ratings.csv`` and ``movies.csv`` (ml-latest-small, ml-25m, ml-32m)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cohobate.ctr.data import logs
from cohobate.ctr.data.logs import DAY, FLOAT, INT, STR, History, ShardWriter, hashed, read_columns

SIGN = "ratings.csv"

SCHEMA: dict[str, Any] = {
    "label": "label",
    "user": "user_id",
    "time": "timestamp",
    "profile": ["user_id"],
    "candidate": ["movie", "genre", "release"],
    "history": {
        "hist_movie": "movie",
        "hist_genre": "genre",
        "hist_release": "release",
        "hist_rating": "rating",
    },
    "history_time": "hist_timestamp",
}


def convert(root: Path, out: Path, length: int) -> None:
    """Split 70 / 10 / 20 % of each user's ratings in order of time; label: rating at least 4.

    Behaviours are the user's earlier ratings: movie, first genre, five-year span of the release,
    rating. The candidate has the same without the rating. There are no impressions in this set: it
    checks pipelines and ranks models.

    Args:
        root: the folder as downloaded.
        out: an empty folder.
        length: newest behaviours kept.
    """
    kinds = {"userId": INT, "movieId": INT, "rating": FLOAT, "timestamp": INT}
    e = logs.sort_events(read_columns(root / SIGN, kinds), "userId", "timestamp", "movieId")
    movies = read_columns(root / "movies.csv", {"movieId": INT, "title": STR, "genres": STR})
    years = [re.search(r"\((\d{4})\)\s*$", title) for title in movies["title"]]
    movies["release"] = np.array([(int(y[1]) if y else 0) // 5 for y in years])
    genre = [genres.split("|")[0] for genres in movies["genres"]]
    movies["genre"] = np.unique(genre, return_inverse=True)[1]
    movie = logs.lookup(e["movieId"], movies, "movieId")
    candidate = {
        "movie": e["movieId"],
        "genre": movie("genre").fill_null(0).to_numpy(),
        "release": movie("release").fill_null(0).to_numpy(),
    }
    user, rating = e["userId"], (2 * e["rating"]).astype(np.int64)
    history = History(
        user, e["timestamp"], {f"hist_{k}": v for k, v in {**candidate, "rating": rating}.items()}
    )
    begin, row = np.searchsorted(user, user), np.arange(len(user))
    count = np.searchsorted(user, user, "right") - begin
    place = row - begin
    split = (place >= 7 * count // 10).astype(int) + (place >= 8 * count // 10)
    table = {
        "label": pa.array((e["rating"] >= 4).astype(np.int8)),
        "user_id": user,
        "timestamp": e["timestamp"],
        **candidate,
        "split": split,
        **history.lists(begin, row, length),
    }
    writer = ShardWriter(out, "timestamp", None, None, bucket=365 * DAY)
    writer.add(pa.table(table))
    writer.close()
    users = len(np.unique(user))
    fields = {
        **hashed(user_id=3 * users, movie=3 * len(movies["movieId"])),
        "genre": {"encoding": "identity", "size": int(movies["genre"].max()) + 1},
        "release": {"encoding": "identity", "size": 500},
        "rating": {"encoding": "identity", "size": 11},
    }
    about = f"MovieLens, label rating >= 4, {len(user)} rows of {users} users"
    logs.write_schema(out, SCHEMA, fields, length, about)
