"""Public logs in their layout as downloaded: what the readers join, split and refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.ctr.data import ClickData
from cohobate.ctr.data.layouts import eleme, kuairand, taobao

DAY = 86_400


def csv(path: Path, header: Sequence[str] | None, rows: Iterable[Sequence[Any]]) -> None:
    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        return f'"{text}"' if "," in text else text

    lines = [",".join(map(cell, row)) for row in rows]
    path.write_text("\n".join([*([",".join(header)] if header else []), *lines]) + "\n")


def table(data: ClickData, split: str) -> dict[str, list[Any]]:
    files = sorted((data.folder / split).glob("*.parquet"))
    return {
        name: [x for f in files for x in pq.read_table(f)[name].to_pylist()]
        for name in pq.read_schema(files[0]).names
    }


def check_batches(data: ClickData) -> None:
    """Every split gives batches the networks can take."""
    for split in ("train", "valid", "test"):
        rows = data.rows(split)
        seen = 0
        for i in range(len(rows)):
            f = rows[i].features
            seen += len(f.time)
            assert int(f.history.max()) < data.layout.ids
            assert int(f.candidate.min()) > 0
            assert (f.history_time <= f.time[:, None]).all()
        assert seen == rows.rows > 0


def movielens(root: Path) -> None:
    root.mkdir()
    start = 1_000_000_000
    ratings = [
        (user, 10 * (j % 7 + 1), 0.5 * (1 + (user + j) % 10), start + user * DAY + 60 * (19 - j))
        for user in range(1, 6)
        for j in range(20)
    ]
    csv(root / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], ratings)
    movies = [(10 * i, f"Film, the {i}th ({1990 + i})", "Drama|War") for i in range(1, 7)]
    csv(root / "movies.csv", ["movieId", "title", "genres"], [*movies, (70, "No year", "Comedy")])


def test_movielens_splits_each_user_in_time(tmp_path: Path) -> None:
    movielens(tmp_path / "ml")
    data = ClickData(tmp_path / "ml", length=6, cache=tmp_path / "cache", batch_size=8)
    parts = {split: table(data, split) for split in ("train", "valid", "test")}
    for user in range(1, 6):
        times = [
            [t for t, u in zip(p["timestamp"], p["user_id"], strict=True) if u == user]
            for p in parts.values()
        ]
        assert [len(t) for t in times] == [14, 2, 4]
        assert times[0][-1] < times[1][0]
        assert times[1][-1] < times[2][0]
    train = parts["train"]
    assert train["timestamp"] == sorted(train["timestamp"])
    # the last training row of user 1: rating j = 6 (later ones have a smaller j), movie 70
    at = max(i for i, u in enumerate(train["user_id"]) if u == 1)
    assert (train["movie"][at], train["release"][at], train["label"][at]) == (70, 0, 1)
    assert train["hist_movie"][at] == [10 * (j % 7 + 1) for j in range(12, 6, -1)]
    assert train["hist_rating"][at] == [1 + (1 + j) % 10 for j in range(12, 6, -1)]
    assert all(0 <= g < 2 for g in train["genre"])
    check_batches(data)
    assert ClickData(tmp_path / "ml", length=6, cache=tmp_path / "cache").folder == data.folder


KUAI_LOG = [
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow",
    "is_comment", "is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms",
    "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab",
]  # fmt: skip
KUAI_USER = [
    "user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
    "follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range",
    "friend_user_num", "friend_user_num_range", "register_days", "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
]  # fmt: skip
KUAI_VIDEO = [
    "video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status",
    "video_duration", "server_width", "server_height", "music_id", "music_type", "tag",
]  # fmt: skip


def kuai(root: Path) -> None:
    """Three users over ten days, a video a day each; a click on every even day."""
    root.mkdir()
    start = 1_649_347_200_000

    def row(user: int, day: int) -> list[Any]:
        video, t = 100 + (user + day) % 5, start + 1000 * (day * DAY + user)
        click = int(day % 2 == 0)
        return [user, video, 20220408, 800, t, click, *[0] * 5, int(day % 4 == 0), 5000, 9000,
                0, 0, 0, 0, day % 3]  # fmt: skip

    days = [(user, day) for user in (3, 5, 8) for day in range(10)]
    for name, chosen in zip(kuairand.LOGS, (range(5), range(5, 10)), strict=True):
        csv(root / name, KUAI_LOG, [row(u, d) for u, d in days if d in chosen])
    users = [[u, "full_active", 0, 0, 1, 7, "(0,10]", 0, "0", 2, "[1,5)", 99, "61-90",
              *["" if i > 11 else i for i in range(18)]] for u in (3, 5)]  # fmt: skip
    csv(root / "user_features_pure.csv", KUAI_USER, users)  # user 8 has no profile
    videos = [[v, v + 900, "NORMAL", "2022-04-01", "LongImport", "public", "", 720, 1280, 1.0,
               9.0, "12,34" if v == 100 else ("" if v == 101 else 39)]
              for v in range(100, 104)]  # fmt: skip
    csv(root / "video_features_basic_pure.csv", KUAI_VIDEO, videos)  # video 104 is unknown


def test_kuairand_joins_earlier_clicks_and_features(tmp_path: Path) -> None:
    kuai(tmp_path / "kuai")
    data = ClickData(tmp_path / "kuai", length=3, cache=tmp_path / "cache", batch_size=4)
    train, valid, test = (table(data, s) for s in ("train", "valid", "test"))
    assert [len(t["label"]) for t in (train, valid, test)] == [3 * 5 + 2, 6, 7]
    assert train["timestamp"] == sorted(train["timestamp"])
    assert train["timestamp"][-1] < valid["timestamp"][0]
    start = 1_649_347_200
    at = next(i for i, (u, t) in enumerate(zip(test["user_id"], test["timestamp"], strict=True))
              if (u, t) == (5, start + 9 * DAY + 5))  # fmt: skip
    assert test["label"][at] == 0
    assert test["hist_timestamp"][at] == [start + d * DAY + 5 for d in (4, 6, 8)]
    assert test["hist_video"][at] == [100 + (5 + d) % 5 for d in (4, 6, 8)]
    assert test["hist_long_view"][at] == [1, 0, 1]
    assert test["video_id"][at] == 104
    assert test["author_id"][at] is None
    first = next(i for i, v in enumerate(train["video_id"]) if v == 100)
    assert (train["author_id"][first], train["tag"][first]) == (1000, "12")
    missing = [train["user_active_degree"][i] for i, u in enumerate(train["user_id"]) if u == 8]
    assert set(missing) == {None}
    assert train["hist_video"][0] == []
    check_batches(data)


def ali(root: Path) -> None:
    """Four users, four days of ads; user 4 did nothing in the shop."""
    root.mkdir()
    start = 1_494_000_000
    shown = [(u, start + d * DAY + 100 * u, 1 + (u + d) % 3, f"430548_100{u % 2}",
              int((u + d) % 2 != 0), int((u + d) % 2 == 0))
             for u in range(1, 5) for d in range(4)]  # fmt: skip
    csv(root / "raw_sample.csv",
        ["user", "time_stamp", "adgroup_id", "pid", "nonclk", "clk"], shown)  # fmt: skip
    csv(root / "ad_feature.csv",
        ["adgroup_id", "cate_id", "campaign_id", "customer", "brand", "price"],
        [(1, 61, 801, 1, 9501, 170.0), (2, 62, 802, 2, "NULL", 0.5)])  # fmt: skip
    csv(root / "user_profile.csv",
        ["userid", *taobao.USER[:-1], "new_user_class_level "],  # as published
        [(u, 0, 5, 2, 5, None, 3, 0, u) for u in (1, 2, 3)])  # fmt: skip
    did = [(u, start + h * 3600, ("pv", "cart", "fav", "buy")[h % 4], 60 + h, 9500 + h)
           for h in range(30, -30, -5) for u in (3, 1, 2)]  # fmt: skip
    csv(root / "behavior_log.csv", ["user", "time_stamp", "btag", "cate", "brand"], did)


def test_taobao_joins_what_users_did_before(tmp_path: Path) -> None:
    ali(tmp_path / "ali")
    data = ClickData(tmp_path / "ali", length=4, cache=tmp_path / "cache", batch_size=2)
    train, valid, test = (table(data, s) for s in ("train", "valid", "test"))
    # the last day counts back from the last impression, which is user 4's
    assert [len(t["label"]) for t in (train, valid, test)] == [7, 4, 5]
    start = 1_494_000_000
    at = next(i for i, (u, t) in enumerate(zip(train["user_id"], train["timestamp"], strict=True))
              if (u, t) == (2, start + 200))  # fmt: skip
    assert train["hist_timestamp"][at] == [start + h * 3600 for h in (-15, -10, -5, 0)]
    assert train["hist_cate"][at] == [45, 50, 55, 60]
    assert train["hist_action"][at] == ["cart", "fav", "buy", "pv"]
    assert (train["adgroup_id"][at], train["cate"][at]) == (3, None)  # an ad without features
    brand, cate, price = (
        dict(zip(train["adgroup_id"], train[name], strict=True))
        for name in ("brand", "cate", "log_price")
    )
    assert brand == {1: 9501, 2: None, 3: None}
    assert cate == {1: 61, 2: 62, 3: None}
    assert price[1] == pytest.approx(np.log(171))
    everyone = list(zip(train["user_id"], train["new_user_class_level"], strict=True))
    assert (2, "2") in everyone
    assert (4, None) in everyone
    assert all(h == [] for u, h in zip(test["user_id"], test["hist_cate"], strict=True) if u == 4)
    check_batches(data)


def ele(root: Path, *, header: bool) -> None:
    root.mkdir()

    def row(day: int, i: int) -> list[Any]:
        values: dict[str, Any] = {name: f"{name}{i % 3}" for name in eleme.COLUMNS}
        values |= {"label": i % 2, "avg_price": 10.5 + i, "total_amt_30": 3.0, "hours": 11 + i}
        newest_first = [f"{day}{j}" for j in range(i)]
        for name in eleme.COLUMNS:
            if name.endswith("_list"):
                values[name] = ";".join(newest_first)
        values["hours_list"] = ";".join(str(20 - j) for j in range(i))
        return [values[name] for name in eleme.COLUMNS]

    for name, day in (("D1_0", 1), ("D1_1", 1), ("D2_0", 2), ("D10_0", 10)):
        csv(root / f"{name}.csv", eleme.COLUMNS if header else None,
            [row(day, i) for i in range(5)])  # fmt: skip


@pytest.mark.parametrize("header", [True, False])
def test_eleme_takes_days_and_turns_histories_round(tmp_path: Path, header: bool) -> None:
    ele(tmp_path / "ele", header=header)
    data = ClickData(tmp_path / "ele", length=3, cache=tmp_path / "cache", batch_size=4)
    train, valid, test = (table(data, s) for s in ("train", "valid", "test"))
    assert [len(t["label"]) for t in (train, valid, test)] == [10, 5, 5]
    assert valid["hist_shop_id"][4] == ["22", "21", "20"]  # three newest of four, oldest first
    assert valid["hist_hour"][4] == [18, 19, 20]
    assert valid["hist_shop_id"][0] == []
    assert test["hist_item_id"][1] == ["100"]  # day 10 comes after day 2
    assert valid["avg_price"] == [10.5 + i for i in range(5)]
    assert data.schema.time_unit == "hour"
    f = data.rows("valid")[0].features
    assert f.time.tolist() == [3600 * (11 + i) for i in range(5)]
    assert f.dense.shape == (5, 2)
    ids = torch.cat([data.rows(s)[0].features.candidate for s in ("train", "test")])
    assert int(ids.min()) > 0
    assert int(ids.max()) < data.layout.ids


SPOIL: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "movielens without movies": (movielens, "movies.csv", "", "movies.csv"),
    "kuairand without users": (kuai, "user_features_pure.csv", "", "user_features_pure.csv"),
    "taobao without profiles": (ali, "user_profile.csv", "", "user_profile.csv"),
    "movielens, a column renamed": (movielens, "ratings.csv", "rating", "ratings.csv"),
    "kuairand, text for a time": (kuai, kuairand.LOGS[0], "1649347203000", kuairand.LOGS[0]),
    "taobao, text for a label": (ali, "raw_sample.csv", ",1,0", "raw_sample.csv"),
}


@pytest.mark.parametrize("name", SPOIL)
def test_a_wrong_file_is_named_and_nothing_is_kept(tmp_path: Path, name: str) -> None:
    make, file, old, named = SPOIL[name]
    root = tmp_path / "log"
    make(root)
    path = root / file
    if old:
        path.write_text(path.read_text().replace(old, old[0] + "x", 1))
    else:
        path.unlink()
    with pytest.raises(InputError) as error:
        ClickData(root, cache=tmp_path / "cache")
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "ctr").iterdir()) == []


def test_eleme_needs_three_days(tmp_path: Path) -> None:
    ele(tmp_path / "ele", header=True)
    (tmp_path / "ele" / "D2_0.csv").unlink()
    with pytest.raises(InputError, match=r"2 days of D<day>\.csv"):
        ClickData(tmp_path / "ele", cache=tmp_path / "cache")
