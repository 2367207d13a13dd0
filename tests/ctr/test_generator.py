from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cohobate.core.testing import assert_one_line, run_command
from cohobate.ctr.data import ClickData, read_schema
from cohobate.ctr.data.generator import World, generate, write_generated
from cohobate.ctr.metrics import auc


def test_probabilities_are_the_formula() -> None:
    """One row after the other, from the description of the world."""
    world, rng = World.make(), np.random.default_rng(0)
    d = generate(world, 3, 6, rng)
    for i in range(len(d["label"])):
        count, now = d["count"][i], d["timestamp"][i]
        items, times = d["history"][i][-count:], d["history_time"][i][-count:]
        assert (np.diff(times) >= 0).all()
        assert times[-1] < now
        weight = np.exp(-(now - times) / (2 * 86_400)) + 0.03
        category, total = d["item"][i] % 8, weight.sum() + 0.3
        same = weight[items % 8 == category].sum() / total
        related = (weight * world.affinity[items % 8, category]).sum() / total
        age, gender = d["age"][i], d["gender"][i]
        logit = (
            -1.6
            + 2.2 * same
            + 2.0 * related
            + 0.6 * world.profile[age, gender, category]
            + world.hour[now // 3600 % 24 // 6, category]
            + world.quality[d["item"][i]]
            - (d["item"][i] in items)
        )
        assert d["probability"][i] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-5)


def test_labels_follow_the_probabilities(tmp_path: Path) -> None:
    write_generated(tmp_path, (20_000, 100, 20_000))
    table = pq.read_table(tmp_path / "train" / "part-0.parquet")
    label, p = table["label"].to_numpy(), table["click_probability"].to_numpy()
    assert label.mean() == pytest.approx(p.mean(), abs=0.01)
    lengths = np.diff(table["hist_item"].combine_chunks().offsets.to_numpy())
    assert (lengths.min(), lengths.max()) == (6, 16)
    assert lengths.mean() == pytest.approx(11, abs=0.1)
    test = pq.read_table(tmp_path / "test" / "part-0.parquet")
    best = auc(
        torch.tensor(test["click_probability"].to_numpy()), torch.tensor(test["label"].to_numpy())
    )
    schema = read_schema(tmp_path / "schema.yaml")
    assert schema.best_auc == pytest.approx(float(best), abs=1e-9)
    assert 0.84 < float(best) < 0.87
    assert schema.about.startswith("SYNTHETIC")


def test_the_same_seed_gives_the_same_clicks_and_users_differ(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_generated(tmp_path / name, (300, 100, 300), seed=seed)
    a, b, c = (pq.read_table(tmp_path / n / "train" / "part-0.parquet") for n in "abc")
    assert a.equals(b)
    assert not a.equals(c)
    test = pq.read_table(tmp_path / "a" / "test" / "part-0.parquet")
    assert not a["hist_timestamp"].slice(0, 50).equals(test["hist_timestamp"].slice(0, 50))


def test_generated_data_have_the_rows_asked_for() -> None:
    data = ClickData(rows=(1000, 333, 77), length=9)
    assert [data.rows(s).rows for s in ("train", "valid", "test")] == [1000, 333, 77]
    assert data.layout.length == 9
    again = ClickData(rows=(1000, 333, 77), length=9)
    assert again.folder == data.folder  # made once


def test_generate_writes_a_folder_that_trains(tmp_path: Path) -> None:
    out = tmp_path / "clicks"
    done = run_command("generate", out, "--rows", "[64,32,32]", "--length", "4", domain="ctr")
    assert done.code == 0, done.err
    assert ClickData(out).rows("train").rows == 64
    assert_one_line(run_command("generate", out, domain="ctr"), out, "exists already")
