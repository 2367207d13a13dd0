"""KuaiRand-Pure: short videos shown in feeds, with clicks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cohobate.ctr.data import logs
from cohobate.ctr.data.logs import DAY, INT, STR, History, ShardWriter, hashed, read_columns

LOGS = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")
PARTS = 8

USER = [
    "user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range",
    "fans_user_num_range", "friend_user_num_range", "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
]  # fmt: skip

SCHEMA: dict[str, Any] = {
    "label": "label",
    "user": "user_id",
    "time": "timestamp",
    "profile": ["user_id", *USER],
    "candidate": ["video_id", "author_id", "video_type", "upload_type", "tag"],
    "context": ["tab"],
    "history": {
        "hist_video": "video_id",
        "hist_author": "author_id",
        "hist_long_view": "long_view",
    },
    "history_time": "hist_timestamp",
}


def convert(root: Path, out: Path, length: int) -> None:
    """Label ``is_click``; behaviours are earlier clicks.

    The last two days are test, the two before validation.

    Args:
        root: the folder as downloaded.
        out: an empty folder.
        length: newest behaviours kept.
    """
    kinds = dict.fromkeys(("user_id", "video_id", "time_ms", "is_click", "long_view", "tab"), INT)
    users = read_columns(
        root / "user_features_pure.csv", {"user_id": INT, **dict.fromkeys(USER, STR)}
    )
    videos = read_columns(
        root / "video_features_basic_pure.csv",
        {"video_id": INT, "author_id": INT, "video_type": STR, "upload_type": STR, "tag": STR},
    )
    videos["tag"] = np.array([str(tags).split(",")[0] for tags in videos["tag"]], dtype=object)
    work = out / "events"
    work.mkdir()
    batches = (batch for name in LOGS for batch in logs.read_csv(root / name, kinds))
    paths = logs.split_by_user(batches, "user_id", PARTS, work, "log")
    last = max(int(logs.load_part(path)["time_ms"].max(initial=0)) for path in paths) // 1000
    writer = ShardWriter(out, "timestamp", last - 4 * DAY, last - 2 * DAY)
    for path in paths:
        events = logs.sort_events(logs.load_part(path), "user_id", "time_ms")
        if len(events["user_id"]):
            writer.add(_join(events, users, videos, length))
    writer.close()
    shutil.rmtree(work)
    fields = hashed(
        user_id=3 * len(users["user_id"]),
        video_id=3 * len(videos["video_id"]),
        author_id=3 * len(np.unique(videos["author_id"])),
        video_type=16,
        upload_type=64,
        tag=512,
        tab=64,
        long_view=4,
        **{name: 4096 if name.startswith("onehot") else 64 for name in USER},
    )
    logs.write_schema(out, SCHEMA, fields, length, "KuaiRand-Pure, label is_click")


def _join(e: logs.Columns, users: logs.Columns, videos: logs.Columns, length: int) -> pa.Table:
    """Rows of one part: impressions with the clicks of the same user before them."""
    time, clicked = e["time_ms"] // 1000, e["is_click"] == 1
    user, video = (
        logs.lookup(e["user_id"], users, "user_id"),
        logs.lookup(e["video_id"], videos, "video_id"),
    )
    author = video("author_id")
    history = History(
        e["user_id"][clicked],
        time[clicked],
        {
            "hist_video": e["video_id"][clicked],
            "hist_author": author.fill_null(0).to_numpy()[clicked],
            "hist_long_view": e["long_view"][clicked],
        },
    )
    columns = {
        "label": e["is_click"],
        "user_id": e["user_id"],
        "timestamp": time,
        "video_id": e["video_id"],
        "author_id": author,
        **{name: video(name) for name in ("video_type", "upload_type", "tag")},
        "tab": e["tab"],
        **{name: user(name) for name in USER},
        **history.lists(*history.before(e["user_id"], time), length),
    }
    return pa.table(columns)
