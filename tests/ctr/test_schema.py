from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cohobate.core.errors import InputError
from cohobate.ctr.data.ids import hash_ids, hash_strings, id_values
from cohobate.ctr.data.schema import parse_schema, read_schema

Edit = Callable[[dict[str, Any]], Any]


def test_every_field_owns_its_rows_and_none_is_padding(schema_dict: dict[str, Any]) -> None:
    schema = parse_schema(schema_dict, Path("schema.yaml"))
    ids = np.array([-1, 0, 1, 7, 8, 39, 40, 10**12])
    taken: set[int] = set()
    for vocabulary in schema.fields.values():
        rows = set(vocabulary.rows(ids).tolist())
        assert not rows & taken
        assert min(rows) == vocabulary.start > 0
        assert max(rows) <= vocabulary.start + vocabulary.size < schema.layout.ids
        taken |= rows


def test_unknown_ids_share_a_row_and_hashing_knows_none(schema_dict: dict[str, Any]) -> None:
    schema = parse_schema(schema_dict, Path("schema.yaml"))
    category, item = schema.fields["category"], schema.fields["item"]
    assert category.rows(np.array([8, 1000, -1])).tolist() == [category.start] * 3
    assert category.rows(np.arange(8)).tolist() == list(
        range(category.start + 1, category.start + 9)
    )
    rows = item.rows(np.arange(100_000))
    assert (rows > item.start).all()
    counts = np.bincount(rows - item.start - 1, minlength=40)
    assert counts.min() > 2200  # of 2500 each: even over the buckets
    assert counts.max() < 2800


def test_a_listed_vocabulary_has_known_and_unknown_ids(
    tmp_path: Path, schema_dict: dict[str, Any]
) -> None:
    pq.write_table(pa.table({"id": ["b", "a", "é"]}), tmp_path / "item.parquet")
    schema_dict["fields"]["item"] = {"encoding": "list", "file": "item.parquet"}
    item = parse_schema(schema_dict, tmp_path / "schema.yaml").fields["item"]
    ids = id_values(pa.array(["a", "b", "é", "c", None]), Path("x"), "item")
    assert item.size == 3
    assert (item.rows(ids) - item.start).tolist() == [2, 1, 3, 0, 0]


def test_strings_hash_by_their_bytes_wherever_they_stand() -> None:
    words = ["", "a", "b", "ab", "ba", "aa", "ab", "çé", "a" * 300, "a" * 301]
    data = [w.encode() for w in words]
    offsets = np.cumsum([0, *map(len, data)])
    joined = hash_strings(np.frombuffer(b"".join(data), np.uint8), offsets)
    alone = [hash_strings(np.frombuffer(d, np.uint8), np.array([0, len(d)]))[0] for d in data]
    assert joined.tolist() == alone
    assert (joined >= 0).all()
    assert len(set(joined.tolist())) == len(words) - 1  # "ab" stands twice


def test_hashes_of_adjacent_ids_spread() -> None:
    buckets = hash_ids(np.arange(10_000)) % np.uint64(10)
    assert np.bincount(buckets.astype(int)).min() > 900


FAULTS: list[tuple[Edit, str]] = [
    (lambda s: s.pop("label"), "'label' is missing"),
    (lambda s: s.update(histry0={}), "unknown key 'histry0', did you mean 'history'"),
    (lambda s: s["fields"].pop("item"), "fields.item: missing"),
    (lambda s: s["fields"]["item"].pop("size"), "fields.item: size None"),
    (lambda s: s["fields"]["item"].update(size=0), "fields.item: size 0"),
    (lambda s: s["fields"]["item"].update(encoding="md5"), "fields.item: needs encoding"),
    (lambda s: s["fields"]["item"].update(colour=1), "fields.item: unknown key 'colour'"),
    (lambda s: s["fields"].update(item={"encoding": "list"}), "needs a file"),
    (lambda s: s["fields"].update(item={"encoding": "list", "file": "no"}), "cannot be read"),
    (lambda s: s.update(time_unit="minutes"), "time_unit: 'minutes'"),
    (lambda s: s.update(sample_rate=0), "sample_rate: 0"),
    (lambda s: s.update(length="long"), "length: 'long'"),
    (lambda s: s.update(profile="user_id"), "profile: needs a list"),
    (lambda s: s.update(history={}), "'history' is missing"),
]


@pytest.mark.parametrize(("edit", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_a_wrong_schema_is_named(
    tmp_path: Path, schema_dict: dict[str, Any], edit: Edit, message: str
) -> None:
    edit(schema_dict)
    path = tmp_path / "schema.yaml"
    path.write_text(yaml.safe_dump(schema_dict))
    with pytest.raises(InputError) as error:
        read_schema(path)
    assert str(tmp_path) in str(error.value)
    assert message in str(error.value)


def test_what_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"schema.yaml: not YAML"):
        read_schema(tmp_path / "schema.yaml")
    with pytest.raises(InputError, match="no such schema"):
        read_schema(tmp_path / "other.yaml")
