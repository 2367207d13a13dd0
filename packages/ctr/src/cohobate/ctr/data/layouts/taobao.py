"""Taobao display advertising (Ali_Display_Ad_Click)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cohobate.core.errors import InputError
from cohobate.ctr.data import logs
from cohobate.ctr.data.logs import DAY, FLOAT, INT, STR, History, ShardWriter, hashed, read_columns

SIGN = "raw_sample.csv"
PARTS = 64

USER = [
    "cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level",
    "shopping_level", "occupation", "new_user_class_level",
]  # fmt: skip

SCHEMA: dict[str, Any] = {
    "label": "label",
    "user": "user_id",
    "time": "timestamp",
    "profile": ["user_id", *USER],
    "candidate": ["adgroup_id", "cate", "brand", "campaign_id", "customer"],
    "context": ["pid"],
    "dense": ["log_price"],
    "history": {"hist_cate": "cate", "hist_brand": "brand", "hist_action": "action"},
    "history_time": "hist_timestamp",
}
SIZES = {
    "user_id": 1_000_000, "adgroup_id": 1_000_000, "cate": 40_000, "brand": 500_000,
    "campaign_id": 500_000, "customer": 300_000, "pid": 8, "action": 16,
    **dict.fromkeys(USER, 256),
}  # fmt: skip


def convert(root: Path, out: Path, length: int) -> None:
    """Label ``clk``; behaviours are category, brand and action in the shop's own log.

    The last day is test, the one before validation. ``behavior_log.csv`` has 723 million rows; it
    is read as a stream and split by user.

    Args:
        root: the folder as downloaded.
        out: an empty folder.
        length: newest behaviours kept.
    """
    numbers = dict.fromkeys(("adgroup_id", "cate_id", "campaign_id", "customer"), INT)
    ads = read_columns(root / "ad_feature.csv", {**numbers, "brand": STR, "price": FLOAT})
    users = _profiles(root / "user_profile.csv")
    work = out / "events"
    work.mkdir()
    sample = {"user": INT, "time_stamp": INT, "adgroup_id": INT, "pid": STR, "clk": INT}
    behaviour = {"user": INT, "time_stamp": INT, "btag": STR, "cate": INT, "brand": INT}
    shown, did = (
        logs.split_by_user(logs.read_csv(root / file, kinds), "user", PARTS, work, name)
        for file, kinds, name in (
            (SIGN, sample, "shown"),
            ("behavior_log.csv", behaviour, "did"),
        )
    )
    last = max(int(logs.load_part(path)["time_stamp"].max(initial=0)) for path in shown)
    writer = ShardWriter(out, "timestamp", last - 2 * DAY, last - DAY)
    for shown_path, did_path in zip(shown, did, strict=True):
        events = logs.load_part(shown_path)
        if len(events["user"]):
            behaviours = logs.sort_events(logs.load_part(did_path), "user", "time_stamp")
            writer.add(_join(events, behaviours, ads, users, length))
    writer.close()
    shutil.rmtree(work)
    logs.write_schema(out, SCHEMA, hashed(**SIZES), length, "Taobao display ads, label clk")


def _join(
    e: logs.Columns, b: logs.Columns, ads: logs.Columns, users: logs.Columns, length: int
) -> pa.Table:
    """Rows of one part: impressions with what the user did in the shop before."""
    history = History(
        b["user"],
        b["time_stamp"],
        {"hist_cate": b["cate"], "hist_brand": b["brand"], "hist_action": b["btag"]},
    )
    ad = logs.lookup(e["adgroup_id"], ads, "adgroup_id")
    user = logs.lookup(e["user"], users, "userid")
    brand = pc.if_else(pc.equal(ad("brand"), "NULL"), pa.scalar(None, STR), ad("brand"))
    columns = {
        "label": e["clk"],
        "user_id": e["user"],
        "timestamp": e["time_stamp"],
        "adgroup_id": e["adgroup_id"],
        "cate": ad("cate_id"),
        "brand": pc.cast(brand, INT),
        "campaign_id": ad("campaign_id"),
        "customer": ad("customer"),
        "pid": e["pid"],
        "log_price": np.log1p(ad("price").fill_null(0.0).to_numpy()),
        **{name: user(name) for name in USER},
        **history.lists(*history.before(e["user"], e["time_stamp"]), length),
    }
    return pa.table(columns)


def _profiles(path: Path) -> logs.Columns:
    """The profile file; the published one has a trailing blank in a column name."""
    try:
        with path.open() as file:
            header = file.readline().rstrip("\r\n").split(",")
    except OSError:
        raise InputError(f"{path}: no such file") from None
    kinds = {name: INT if name.strip() == "userid" else STR for name in header}
    return {name.strip(): values for name, values in read_columns(path, kinds).items()}
