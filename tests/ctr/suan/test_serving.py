"""What a user does with a trained run: predict, export, latency, scaling; through the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from packaging.version import Version

from cohobate.core.export import export, load_student, to_onnx
from cohobate.core.runs import load_run
from cohobate.core.testing import assert_one_line, run_command
from cohobate.ctr.data import ClickData
from cohobate.ctr.nets import Common, Features, Layout, MeanMLP
from cohobate.ctr.suan import SUAN, DistilSUAN, LightSUAN
from cohobate.ctr.suan.scaling import fit_power_law

Fit = Callable[..., Path]
NETWORKS = {
    "suan": lambda la, c: SUAN(la, c, blocks=1),
    "lightsuan": lambda la, c: LightSUAN(la, c, blocks=1, window=3, dilation=4),
    "mlp": MeanMLP,
}


def cut(f: Features, batch: int, length: int) -> Features:
    f = Features(*(x[:batch] for x in f))
    return f._replace(history=f.history[:, -length:], history_time=f.history_time[:, -length:])


ONNX = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.15"), reason="older exporters fail on these networks"
)


@ONNX
@pytest.mark.parametrize(
    ("name", "bare"), [("suan", False), ("lightsuan", False), ("lightsuan", True), ("mlp", True)]
)
def test_exports_take_any_batch_and_length(
    name: str, bare: bool, layout: Layout, common: Common, tmp_path: Path, settle: Callable
) -> None:
    if bare:
        layout = replace(layout, context=0, dense=0)
    model = DistilSUAN(layout, NETWORKS[name], MeanMLP, common=common, distill=False)
    network = model.student
    settle(network, layout.example(5))
    path = tmp_path / "student.onnx"
    to_onnx(network, model.example_input(), path, open_axes=model.open_axes())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in ((1, 40), (5, 1), (3, 17)):
        f = cut(layout.example(5), batch, length)
        with torch.no_grad():
            expected = network(*f).numpy()
        got = session.run(None, {k: v.numpy() for k, v in f._asdict().items()})[0]
        np.testing.assert_allclose(got, expected, atol=1e-4)


@ONNX
def test_the_exported_student_is_the_trained_one(trained: Path, tmp_path: Path) -> None:
    model = load_run(trained)
    features = model.layout.example(4)
    with torch.no_grad():
        expected = model.student(*features)
        export(trained, "hub", tmp_path / "hub")
        torch.testing.assert_close(load_student(tmp_path / "hub")(*features), expected)
    done = run_command(
        "export", "ctr/suan", "--checkpoint", trained, "--format", "onnx", "--out", tmp_path
    )
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    got = session.run(None, {k: v.numpy() for k, v in features._asdict().items()})[0]
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def generated(rows: str = "[512,256,256]") -> ClickData:
    return ClickData(length=8, rows=tuple(json.loads(rows)))


def test_predict_adds_the_probability_of_every_row(trained: Path, tmp_path: Path) -> None:
    data = generated()
    done = run_command(
        "predict", "ctr/suan", data.folder / "test", "--checkpoint", trained,
        "--out", tmp_path / "out", "--batch_size", "100",
    )  # fmt: skip
    assert done.code == 0, done.err
    source = pq.read_table(data.folder / "test" / "part-0.parquet")
    table = pq.read_table(tmp_path / "out" / "part-0.parquet")
    assert table.num_rows == source.num_rows
    model = load_run(trained)
    with torch.no_grad():
        expected = torch.cat(
            [torch.sigmoid(model.student(*b.features)) for b in data.test_dataloader()]
        )
    predicted = table["probability"].to_numpy()
    np.testing.assert_allclose(predicted, expected.numpy(), atol=1e-5)


def test_predict_needs_no_label_and_names_what_is_wrong(trained: Path, tmp_path: Path) -> None:
    data = generated()
    table = pq.read_table(data.folder / "test" / "part-0.parquet").drop_columns(["label"])
    root = tmp_path / "new"
    root.mkdir()
    pq.write_table(table, root / "today.parquet")
    (root / "schema.yaml").write_text((data.folder / "schema.yaml").read_text())
    out = tmp_path / "out"
    words = ("predict", "ctr/suan", root / "today.parquet", "--checkpoint", trained, "--out", out)
    assert run_command(*words).code == 0
    assert pq.read_table(out / "today.parquet").column_names[-1] == "probability"
    pq.write_table(table.drop_columns(["item"]), root / "today.parquet")
    assert_one_line(run_command(*words), "today.parquet", "column 'item' is missing")
    schema = yaml.safe_load((root / "schema.yaml").read_text())
    schema["fields"]["item"]["size"] = 65
    (root / "schema.yaml").write_text(yaml.safe_dump(schema))
    assert_one_line(run_command(*words), "schema.yaml", "not the schema that the model")
    (root / "schema.yaml").unlink()
    assert_one_line(run_command(*words), "today.parquet", "no schema.yaml")


def test_predictions_undo_the_sampling(tmp_path: Path, trained: Path) -> None:
    model = load_run(trained)
    batch = next(iter(generated().test_dataloader()))
    with torch.no_grad():
        whole = model.predict_step(batch, 0)
        model.sample_rate = 0.1
        corrected = model.predict_step(batch, 0)
    torch.testing.assert_close(corrected, whole / (whole + (1 - whole) / 0.1))


def test_bad_data_end_with_one_line(tmp_path: Path) -> None:
    words = ("fit", "suan", "--out", tmp_path / "r")
    done = run_command(*words, "--data.root", tmp_path, domain="ctr")
    assert_one_line(done, tmp_path, "no known layout")
    done = run_command(*words, "--data.batch_size", "1", domain="ctr")
    assert_one_line(done, "batch_size 1")


def test_latency_prints_every_way_and_writes_json(tmp_path: Path) -> None:
    done = run_command(
        "latency", "--candidates", "5", "--length", "12", "--repeats", "3", "--head", "[8]",
        "--blocks", "1", "--json", tmp_path / "l.json", domain="ctr",
    )  # fmt: skip
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "l.json").read_text())
    assert set(content["milliseconds"]) == {
        "SUAN, one by one", "SUAN, user repeated in a batch", "LightSUAN, one by one",
        "LightSUAN, user repeated in a batch", "LightSUAN, parallel",
    }  # fmt: skip
    assert all(0 < t["p50"] <= t["p99"] for t in content["milliseconds"].values())
    assert content["largest_gap"] < 1e-5


@pytest.mark.parametrize("best", [0.85, None])
def test_the_fit_recovers_a_power_law(best: float | None) -> None:
    x = np.geomspace(1e3, 1e6, 6)
    law = fit_power_law(x, 0.85 - 0.7 * x**-0.25, best)
    assert law.a == pytest.approx(0.85, abs=1e-4)
    assert law.b == pytest.approx(0.7, rel=1e-2)
    assert law.e == pytest.approx(0.25, rel=1e-2)
    assert law.r2 == pytest.approx(1, abs=1e-6)
    assert law.last_error == pytest.approx(0, abs=1e-4)


def test_the_last_point_is_predicted_from_the_others() -> None:
    x = np.geomspace(1e3, 1e6, 5)
    y = 0.85 - 0.7 * x**-0.25
    bent = y.copy()
    bent[-1] -= 0.02
    law = fit_power_law(x, bent, 0.85)
    assert law.last_predicted == pytest.approx(y[-1], abs=1e-4)
    assert law.last_error == pytest.approx(0.02, abs=1e-4)
    with pytest.raises(ValueError, match="2 points"):
        fit_power_law(x[:2], y[:2])


def test_scaling_trains_fits_draws_and_goes_on(tmp_path: Path) -> None:
    words = (
        "scaling", tmp_path / "s", "--grades", '["1x4x4","2x8x4"]', "--rows", "[128,256,512]",
        "--epochs", "1", "--json", tmp_path / "copy.json",
    )  # fmt: skip
    done = run_command(*words, domain="ctr")
    assert done.code == 0, done.err
    content = json.loads((tmp_path / "copy.json").read_text())
    assert content["data"].startswith("SYNTHETIC")
    assert {len(v) for v in content["auc"].values()} == {3}
    sizes = list(content["dense_parameters"].values())
    assert sizes[0] < sizes[1]
    assert set(content["by_rows"]) == {"1x4x4", "2x8x4"}
    assert all(law["a"] == content["best_auc"] for law in content["by_rows"].values())
    assert (tmp_path / "s" / "scaling.png").stat().st_size > 1000
    stamp = (tmp_path / "s" / "suan-1x4x4-128-0" / "last.ckpt").stat().st_mtime_ns
    assert run_command(*words, domain="ctr").code == 0  # finished runs are not repeated
    assert (tmp_path / "s" / "suan-1x4x4-128-0" / "last.ckpt").stat().st_mtime_ns == stamp
    assert_one_line(
        run_command("scaling", tmp_path / "t", "--grades", '["tall"]', domain="ctr"), "grade 'tall'"
    )
