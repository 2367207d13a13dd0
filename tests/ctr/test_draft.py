from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cohobate.core.testing import assert_one_line, run_command
from cohobate.ctr.data import ClickData

Rows = Callable[..., dict[str, list[Any]]]


@pytest.fixture
def log(tmp_path: Path, make_rows: Rows) -> Path:
    rows = make_rows(40)
    rows["label"] = [int(x) for x in rows["label"]]
    rows["gender"] = [u % 2 for u in rows["user_id"]]
    rows["shop"] = [f"shop {i % 5}" for i in range(40)]
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "log" / "a.parquet", row_group_size=10)
    return tmp_path / "log"


def test_a_draft_finds_the_roles_and_trains_as_it_is(log: Path) -> None:
    done = run_command("schema", log / "a.parquet", domain="ctr")
    assert done.code == 0, done.err
    draft = yaml.safe_load(done.out)
    assert (draft["label"], draft["user"], draft["time"]) == ("label", "user_id", "timestamp")
    assert draft["time_unit"] == "s"
    assert draft["profile"] == ["user_id", "gender"]
    assert draft["candidate"] == ["item", "category", "hour", "shop"]
    assert draft["dense"] == ["price"]
    assert draft["history"] == {
        "hist_item": "item", "hist_category": "category", "hist_action": "action",
    }  # fmt: skip
    assert draft["history_time"] == "hist_timestamp"
    assert draft["length"] == 7
    assert draft["fields"]["category"] == {"encoding": "identity", "size": 8}
    assert draft["fields"]["shop"]["encoding"] == "hash"
    (log / "schema.yaml").write_text(done.out)
    data = ClickData(log, batch_size=8)
    assert [data.rows(s).rows for s in ("train", "valid", "test")] == [32, 4, 4]
    assert len(next(iter(data.train_dataloader())).label) == 8


def test_vocabularies_hold_what_was_seen_often_before_validation(log: Path) -> None:
    done = run_command("schema", log, "--out", log, "--min_count", "5", domain="ctr")
    assert done.code == 0, done.err
    schema = yaml.safe_load((log / "schema.yaml").read_text())
    assert schema["fields"]["shop"] == {"encoding": "list", "file": "vocabulary/shop.parquet"}
    shops = pq.read_table(log / "vocabulary" / "shop.parquet")["id"].to_pylist()
    # of 32 training rows shops 0 and 1 have seven, the others six
    assert shops == ["shop 0", "shop 1", "shop 2", "shop 3", "shop 4"]
    assert schema["fields"]["user_id"]["encoding"] == "identity"  # none is seen five times
    data = ClickData(log)
    assert data.rows("train").rows == 32
    assert_one_line(
        run_command("schema", log, "--out", log, domain="ctr"), "schema.yaml", "exists already"
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [("label", "no column for the label"), ("timestamp", "no column for the time")],
)
def test_what_cannot_be_found_is_named(
    tmp_path: Path, make_rows: Rows, column: str, message: str
) -> None:
    rows = make_rows()
    del rows[column]
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert_one_line(run_command("schema", tmp_path / "a.parquet", domain="ctr"), message)


def test_other_bad_input_is_named(tmp_path: Path) -> None:
    assert_one_line(run_command("schema", tmp_path / "no", domain="ctr"), "no such file")
    assert_one_line(run_command("schema", tmp_path, domain="ctr"), "no *.parquet")
    (tmp_path / "a.parquet").write_text("x")
    assert_one_line(run_command("schema", tmp_path / "a.parquet", domain="ctr"), "cannot be read")
    pq.write_table(pa.table({"label": [0], "ts": [1_600_000_000]}), tmp_path / "a.parquet")
    assert_one_line(run_command("schema", tmp_path / "a.parquet", domain="ctr"), "no list column")
