"""Reading parquet: what a batch holds, its order, resume, and every bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from cohobate.core.errors import InputError
from cohobate.ctr.data import ClickData, ClickRows, read_schema, stream
from cohobate.ctr.data.stream import plan
from cohobate.ctr.nets import Batch

Write = Callable[..., Path]
Rows = Callable[..., dict[str, list[Any]]]
START = 1_600_000_000


def prices(batch: Batch) -> list[int]:
    """The row numbers of a batch: the price of a row is a tenth of its number."""
    return (batch.features.dense[:, 0] * 10).round().int().tolist()


def training(root: Path, **options: Any) -> ClickData:
    return ClickData(root, **{"batch_size": 4, **options})


def everything(data: ClickData) -> list[list[int]]:
    return [prices(b) for b in data.train_dataloader()]


def test_a_batch_holds_what_the_file_says(tmp_path: Path, write_log: Write) -> None:
    data = training(write_log(tmp_path / "log"))
    fields, batch = data.schema.fields, next(iter(data.train_dataloader()))
    f = batch.features
    assert batch.label.tolist() == [1, 0, 0, 1]
    assert batch.user.tolist() == [0, 0, 0, 0]
    assert f.time.tolist() == [START + 100 * i for i in range(4)]
    assert (f.candidate[:, 1] - fields["category"].start - 1).tolist() == [0, 1, 2, 3]
    assert (f.context[:, 0] - fields["hour"].start - 1).tolist() == [0, 1, 2, 3]
    # rows have 0, 1, 2, 3 behaviours: padded on the left, cut to the longest
    actions = f.history[..., 2] - fields["action"].start - 1
    assert f.history.shape == (4, 3, 3)
    assert (f.history[..., 0] != 0).int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert actions[3].tolist() == [0, 1, 2]
    assert f.history_time[3].tolist() == [START + 300 - 10 * k for k in (3, 2, 1)]
    assert (f.history_time[0] == 0).all()


def test_long_histories_keep_the_newest(tmp_path: Path, write_log: Write, make_rows: Rows) -> None:
    data = training(write_log(tmp_path / "log"), batch_size=12)
    f = next(iter(data.train_dataloader())).features
    assert f.history.shape[1] == 5  # the schema's length; row 7 has seven behaviours
    start = data.schema.fields["action"].start + 1
    assert (f.history[7, :, 2] - start).tolist() == [2, 3, 0, 1, 2]


def test_missing_ids_are_unknown_not_padding(
    tmp_path: Path, write_log: Write, make_rows: Rows
) -> None:
    rows = make_rows()
    rows["category"][0] = None
    rows["hist_category"][3][1] = None
    data = training(write_log(tmp_path / "log", train=rows))
    f = next(iter(data.train_dataloader())).features
    unknown = data.schema.fields["category"].start
    assert int(f.candidate[0, 1]) == unknown
    assert f.history[3, :, 1].tolist()[1] == unknown


def test_a_null_history_is_an_empty_one(tmp_path: Path, write_log: Write, make_rows: Rows) -> None:
    rows = make_rows()
    for name in ("hist_item", "hist_category", "hist_action", "hist_timestamp"):
        rows[name][3] = None
    f = next(iter(training(write_log(tmp_path / "log", train=rows)).train_dataloader())).features
    assert (f.history[3] == 0).all()
    assert int((f.history[2, :, 0] != 0).sum()) == 2


def test_without_shuffling_rows_come_in_file_order(tmp_path: Path, write_log: Write) -> None:
    data = training(write_log(tmp_path / "log"))
    assert everything(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_shuffling_gives_each_row_once_and_anew_each_epoch(
    tmp_path: Path, write_log: Write
) -> None:
    data = training(write_log(tmp_path / "log"), shuffle=True)
    loader = data.train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.batch_sampler.sampler.set_epoch(epoch)
        orders.append([i for b in loader for i in prices(b)])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1]
    shifted = training(write_log(tmp_path / "again"), shuffle=True)
    shifted.first_epoch = 1
    loader = shifted.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(0)
    assert [i for b in loader for i in prices(b)] == orders[1]
    other = training(write_log(tmp_path / "other"), shuffle=True, seed=1)
    assert [i for b in everything(other) for i in b] != orders[0]


def test_the_order_does_not_depend_on_the_workers(tmp_path: Path, write_log: Write) -> None:
    root = write_log(tmp_path / "log")
    alone = everything(training(root, shuffle=True))
    assert everything(training(root, shuffle=True, num_workers=2)) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, write_log: Write, workers: int
) -> None:
    root = write_log(tmp_path / "log")
    whole = everything(training(root, shuffle=True, batch_size=2))
    first = training(root, shuffle=True, batch_size=2, num_workers=workers).train_dataloader()
    seen = []
    for batch in first:
        seen.append(prices(batch))
        if len(seen) == 3:
            state = first.state_dict()
            break
    second = training(root, shuffle=True, batch_size=2, num_workers=workers).train_dataloader()
    second.load_state_dict(state)
    assert seen + [prices(b) for b in second] == whole


@pytest.mark.parametrize(("rows", "world"), [(12, 2), (12, 5), (11, 3), (9, 2)])
def test_processes_share_the_rows(
    tmp_path: Path, write_log: Write, make_rows: Rows, rows: int, world: int
) -> None:
    root = write_log(tmp_path / "log", train=make_rows(rows))
    data = training(root)
    pieces, _ = data.pieces("train")
    click = ClickRows(pieces, data.schema, batch_size=2, world=world)
    parts = [[prices(click[i]) for i in range(rank, len(click), world)] for rank in range(world)]
    assert len({len(part) for part in parts}) == 1  # every process has as many batches
    assert sorted(i for part in parts for b in part for i in b) == list(range(rows))


def test_no_batch_has_a_single_row(tmp_path: Path, write_log: Write, make_rows: Rows) -> None:
    root = write_log(tmp_path / "log", train=make_rows(9))
    assert [len(b) for b in everything(training(root))] == [4, 5]


def test_large_row_groups_are_read_piece_by_piece(
    tmp_path: Path, write_log: Write, make_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SLICE_ROWS", 3)
    root = write_log(tmp_path / "log", train=make_rows(20), group=20)
    data = training(root)
    pieces, _ = data.pieces("train")
    assert [p.rows for p in pieces] == [3] * 6 + [2]
    assert [i for b in everything(data) for i in b] == list(range(20))
    late = data.rows("train")
    assert prices(late[3]) == [12, 13, 14, 15]  # straight to the middle of the row group


def test_flat_shards_are_split_by_time(
    tmp_path: Path, make_rows: Rows, schema_dict: dict[str, Any]
) -> None:
    root = tmp_path / "flat"
    root.mkdir()
    schema_dict |= {"valid_from": START + 1450, "test_from": START + 1700}
    (root / "schema.yaml").write_text(yaml.safe_dump(schema_dict))
    for i in range(2):
        table = pa.table(make_rows(10, 10 * i))
        pq.write_table(table, root / f"{i}.parquet", row_group_size=4)
    data = training(root)
    found = {s: [i for b in iter_split(data, s) for i in b] for s in ("train", "valid", "test")}
    assert found == {
        "train": list(range(15)),
        "valid": [15, 16],
        "test": [17, 18, 19],
    }


def iter_split(data: ClickData, split: str) -> list[list[int]]:
    rows = data.rows(split)
    return [prices(rows[i]) for i in range(len(rows))]


def test_limit_rows_takes_the_first(tmp_path: Path, write_log: Write) -> None:
    data = training(write_log(tmp_path / "log"), limit_rows=7)
    assert [i for b in everything(data) for i in b] == list(range(7))


def test_permuted_labels_keep_their_number_and_the_rows(tmp_path: Path, write_log: Write) -> None:
    root = write_log(tmp_path / "log")
    plain, mixed = (
        list(training(root, permute_labels=p).train_dataloader()) for p in (False, True)
    )
    labels = [torch.cat([b.label for b in batches]) for batches in (plain, mixed)]
    assert labels[0].sum() == labels[1].sum()
    assert not torch.equal(*labels)
    assert [prices(b) for b in plain] == [prices(b) for b in mixed]
    valid, test = (
        [
            torch.cat(
                [b.label for b in getattr(training(root, permute_labels=p), f"{part}_dataloader")()]
            )
            for p in (False, True)
        ]
        for part in ("val", "test")
    )
    assert not torch.equal(*valid)
    assert torch.equal(*test)


def spoil(column: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def edit(rows: dict[str, list[Any]]) -> None:
        rows[column][row] = value

    return edit


def retype(column: str, kind: pa.DataType) -> Callable[[dict[str, Any]], None]:
    def edit(rows: dict[str, Any]) -> None:
        rows[column] = pa.array(rows[column]).cast(kind)

    return edit


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing column": (lambda r: r.pop("hour"), "column 'hour' is missing"),
    "misspelt column": (
        lambda r: r.update(category0=r.pop("category")),
        "column 'category' is missing, did you mean 'category0'",
    ),
    "text for an identity": (
        retype("category", pa.string()),
        "column 'category': type string, expected integer",
    ),
    "floats for ids": (retype("item", pa.float64()), "column 'item': type double"),
    "no list": (
        lambda r: r.update(hist_item=r["item"]),
        "column 'hist_item': type int64, expected a list",
    ),
    "text for a time": (retype("timestamp", pa.string()), "column 'timestamp': type string"),
    "text for a number": (retype("price", pa.string()), "column 'price': type string"),
    "negative id": (spoil("item", 7, -4), "column 'item', row 7: negative id -4"),
    "negative behaviour": (
        spoil("hist_item", 9, [-1]),
        "column 'hist_item', row 9: negative id -1",
    ),
    "missing label": (spoil("label", 6, None), "column 'label', row 6: label nan"),
    "label nan": (
        lambda r: r.update(label=[float("nan") if i == 8 else 1.0 for i in range(12)]),
        "column 'label', row 8: label nan",
    ),
    "label two": (
        lambda r: r.update(label=[2 if i == 11 else 1 for i in range(12)]),
        "column 'label', row 11: label 2",
    ),
    "infinite feature": (spoil("price", 10, float("inf")), "column 'price', row 10: not a finite"),
    "no time": (spoil("timestamp", 8, None), "column 'timestamp', row 8: no time"),
    "milliseconds": (
        spoil("timestamp", 9, START * 1000),
        "column 'timestamp', row 9: time 1600000000000 is no date in 's' (mixed time units?)",
    ),
    "history in milliseconds": (
        spoil("hist_timestamp", 6, [START * 1000 + j for j in range(6)]),
        "column 'hist_timestamp', row 6: time 1600000000000 is no date",
    ),
    "future behaviour": (
        spoil("hist_timestamp", 6, [START + 600 + 100 * j for j in range(6)]),
        "column 'hist_timestamp', row 6: behaviour at 1600000700 is later than the impression",
    ),
    "newest first": (
        spoil("hist_timestamp", 6, [START + 500 - 10 * j for j in range(6)]),
        "column 'hist_timestamp', row 6: behaviours not oldest first",
    ),
    "lists of two lengths": (
        spoil("hist_action", 7, [0, 1]),
        "column 'hist_action', row 7: 2 behaviours, 'hist_item' has 7",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_by_file_column_and_row(
    tmp_path: Path, write_log: Write, make_rows: Rows, name: str
) -> None:
    edit, message = BAD[name]
    rows = make_rows()
    rows["label"] = [int(x) for x in rows["label"]]
    edit(rows)
    root = write_log(tmp_path / "log", train=rows)
    with pytest.raises(InputError) as error:
        everything(training(root))
    text = str(error.value)
    assert text.startswith(str(root / "train" / "a.parquet"))
    assert message in text
    assert "\n" not in text


def test_the_row_is_that_of_the_file_also_behind_a_time_filter(
    tmp_path: Path, make_rows: Rows, schema_dict: dict[str, Any]
) -> None:
    (tmp_path / "schema.yaml").write_text(
        yaml.safe_dump(schema_dict | {"valid_from": START + 400, "test_from": START + 1000})
    )
    rows = make_rows()
    rows["item"][7] = -1
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: column 'item', row 7: negative"):
        iter_split(training(tmp_path), "valid")


def test_future_behaviours_can_be_dropped_and_are_counted(
    tmp_path: Path, write_log: Write, make_rows: Rows
) -> None:
    rows = make_rows()
    rows["hist_timestamp"][6] = [START + 570 + 10 * j for j in range(6)]  # the last two too late
    data = training(write_log(tmp_path / "log", train=rows), future="drop", batch_size=12)
    click = data.rows("train")
    f = click[0].features
    assert int((f.history[6, :, 0] != 0).sum()) == 4
    assert click.dropped == 2
    assert f.history_time[6].tolist()[-4:] == [START + 570 + 10 * j for j in range(4)]


def test_times_in_other_units_are_seconds_in_the_batch(
    tmp_path: Path, write_log: Write, make_rows: Rows, schema_dict: dict[str, Any]
) -> None:
    rows = make_rows()
    rows["timestamp"] = [t * 1000 + 5 for t in rows["timestamp"]]
    rows["hist_timestamp"] = [[t * 1000 for t in ts] for ts in rows["hist_timestamp"]]
    root = write_log(tmp_path / "log", {**schema_dict, "time_unit": "ms"}, train=rows)
    f = next(iter(training(root).train_dataloader())).features
    assert f.time.tolist() == [START + 100 * i for i in range(4)]


def test_hours_of_the_day_are_times_without_a_date(
    tmp_path: Path, write_log: Write, make_rows: Rows, schema_dict: dict[str, Any]
) -> None:
    rows = make_rows()
    rows["timestamp"] = [i % 24 for i in range(12)]
    rows["hist_timestamp"] = [[23 - j for j in range(len(ts))] for ts in rows["hist_timestamp"]]
    root = write_log(tmp_path / "log", {**schema_dict, "time_unit": "hour"}, train=rows)
    f = next(iter(training(root).train_dataloader())).features
    assert f.time.tolist() == [0, 3600, 7200, 10800]


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such folder": (lambda root: None, "no such folder"),
    "nothing known": (lambda root: root.mkdir(), "no schema.yaml and no known layout"),
    "no shards": (
        lambda root: (
            (root / "train").mkdir(parents=True)
            or (root / "schema.yaml").write_text(yaml.safe_dump(MINIMAL))
        ),
        "no *.parquet for train",
    ),
    "no split": (
        lambda root: root.mkdir() or (root / "schema.yaml").write_text(yaml.safe_dump(MINIMAL)),
        "valid_from None and test_from None must split",
    ),
    "no parquet": (
        lambda root: (
            (root / "train").mkdir(parents=True)
            or (
                (root / "schema.yaml").write_text(yaml.safe_dump(MINIMAL))
                and (root / "train" / "a.parquet").write_text("label,item")
            )
        ),
        "a.parquet: cannot be read",
    ),
}
MINIMAL = {
    "label": "y", "time": "t", "candidate": ["i"], "history": {"h": "i"},
    "fields": {"i": {"encoding": "hash", "size": 3}},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wrong_folder_is_named(tmp_path: Path, name: str) -> None:
    make, message = FOLDERS[name]
    make(tmp_path / "log")
    with pytest.raises(InputError) as error:
        training(tmp_path / "log").train_dataloader()
    assert str(tmp_path / "log") in str(error.value)
    assert message in str(error.value)


def test_a_truncated_file_is_named(tmp_path: Path, write_log: Write) -> None:
    root = write_log(tmp_path / "log")
    path = root / "train" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        everything(training(root))


def test_row_group_statistics_spare_reading(
    tmp_path: Path, write_log: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_log(tmp_path / "log")
    schema = read_schema(root / "schema.yaml")
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **k: read.append(group) or original(self, group, **k),
    )
    pieces = plan([root / "train" / "a.parquet"], schema, START + 500, START + 700)
    assert [(p.group, p.kept) for p in pieces] == [(1, 2)]
    assert read == [1]  # of three row groups only the one on the border


MEMORY = """
import sys, psutil, pathlib
from cohobate.ctr.data import ClickData
data = ClickData(pathlib.Path(sys.argv[1]), batch_size=1024, shuffle=True)
process, rows = psutil.Process(), data.rows("train")
for i in range(40):
    rows[i]
early = process.memory_info().rss
for i in range(40, len(rows)):
    rows[i]
print(len(rows), process.memory_info().rss - early)
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    from cohobate.ctr.data.generator import write_generated

    write_generated(tmp_path / "log", (160_000, 100, 100), length=16)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "log")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    batches, grown = map(int, done.stdout.split())
    assert batches == 157
    # decoded, the rest of the rows would take 100 MB
    assert grown < 30e6
