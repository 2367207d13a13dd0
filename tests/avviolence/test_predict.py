from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cohobate.avviolence.data import Features, write_features
from cohobate.avviolence.predict import Rule, intervals
from cohobate.core.errors import InputError
from cohobate.core.testing import assert_one_line, run_command

Video = Callable[..., Path]
RECIPE = "avviolence/macil-sd"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_network: Path) -> Path:
    """A run on features of the tiny video network and of log-mel statistics."""
    from cohobate.avviolence.features.extract import Choice

    extraction = Choice(str(tiny_network), "logmel").load()
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    rows = ["video,violent,split,intervals"]
    for number in range(12):
        arrays = [rng.standard_normal(s).astype(np.float32) for s in ((1, 9, 16), (9, 128))]
        made = (extraction.visual.id, extraction.audio.id)
        write_features(Features("x", *arrays, *made), root / f"v{number}.safetensors")
        split = ("train", "val", "test")[number % 3]
        rows.append(f"v{number},{number % 2},{split},{'1-3' if number % 2 else ''}")
    (root / "labels.csv").write_text("\n".join(rows))
    done = run_command(
        "fit", f"{RECIPE}/own", "--out", root / "run", "--data.root", root, "--model.hidden", "8",
        "--model.heads", "2", "--trainer.max_steps", "2", "--data.batch_size", "4",
        "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    return root / "run"


@pytest.fixture
def predict(run: Path, tmp_path: Path, tiny_network: Path) -> Callable[..., Any]:
    def call(*words: object, network: Path = tiny_network) -> Any:
        options = ["--checkpoint", run, "--out", tmp_path / "out", "--visual", network]
        return run_command("predict", RECIPE, *map(str, words), *map(str, options))

    return call


def test_scores_become_intervals_by_threshold_gap_and_length() -> None:
    scores = np.array([0.9, 0.1, 0.6, 0.6, 0.1, 0.1, 0.7])
    third = 2 / 3
    spans = [(0, 1), (2, 4), (6, 7)]
    assert intervals(scores, Rule()) == [
        (pytest.approx(a * third, abs=1e-3), pytest.approx(b * third, abs=1e-3)) for a, b in spans
    ]
    assert intervals(scores, Rule(max_gap=0.7)) == [(0.0, 2.667), (4.0, 4.667)]
    assert intervals(scores, Rule(min_length=1.0)) == [(1.333, 2.667)]
    assert intervals(scores, Rule(max_gap=2.0, min_length=1.0)) == [(0.0, 4.667)]
    assert intervals(scores, Rule(threshold=0.95)) == []
    with pytest.raises(InputError, match="threshold must lie"):
        Rule(threshold=2)


def test_a_clip_with_sound_gets_scores_intervals_and_a_picture(
    predict: Callable[..., Any], clips: Path, tmp_path: Path
) -> None:
    done = predict(clips / "bigbuckbunny.mp4", "--threshold", "0.01")
    assert done.code == 0, done.err
    with (tmp_path / "out" / "bigbuckbunny.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((tmp_path / "out" / "bigbuckbunny.json").read_text())
    assert len(rows) == len(content["snippets"]) == 7
    assert rows[1]["start"] == "0.667"
    assert float(rows[6]["end"]) == pytest.approx(7 * 2 / 3, abs=1e-3)
    assert all(0 <= float(row["score"]) <= 1 for row in rows)
    assert content["intervals"] == [{"start": 0.0, "end": 4.667}]
    assert content["has_sound"] is True
    assert 0 <= content["score"] <= 1
    with (tmp_path / "out" / "files.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["intervals"] == "0.0-4.667"
    assert (tmp_path / "out" / "bigbuckbunny.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:.*has no sound")
def test_silent_short_and_odd_clips_are_scored(
    predict: Callable[..., Any], video: Video, clips: Path, tmp_path: Path
) -> None:
    varying = [n / 30 for n in range(30)] + [1 + n / 6 for n in range(7)]
    (tmp_path / "in").mkdir()
    video(tmp_path / "in" / "short.mp4", times=[0.0, 0.04, 0.08], sound=0.1)
    video(tmp_path / "in" / "ntsc.mp4", times=[n * 1001 / 30000 for n in range(50)], sound=1.6)
    video(tmp_path / "in" / "varying.mkv", times=varying)
    done = predict(tmp_path / "in", clips / "carphone_pristine.mp4")
    assert done.code == 0, done.err
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    lengths = {name: len(content["snippets"]) for name, content in found.items()}
    assert lengths == {"short": 1, "ntsc": 2, "varying": 3, "carphone_pristine": 6}
    assert found["varying"]["has_sound"] is False


def test_bad_files_are_skipped_and_the_exit_code_says_so(
    predict: Callable[..., Any], video: Video, clips: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    video(tmp_path / "in" / "good.mp4", times=[n / 24 for n in range(20)], sound=1.0)
    (tmp_path / "in" / "text.mp4").write_text("no video")
    whole = (clips / "bikes.mp4").read_bytes()
    (tmp_path / "in" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    done = predict(tmp_path / "in")
    assert_one_line(done, "2 of 3 files skipped", "text.mp4: not a video", "cut.mp4: ")
    assert (tmp_path / "out" / "good.json").exists()
    assert not list((tmp_path / "out").glob("text*"))


def test_features_of_other_extractors_are_refused_unless_forced(
    predict: Callable[..., Any], tmp_path: Path
) -> None:
    arrays = np.ones((1, 3, 16), np.float32), np.ones((3, 128), np.float32)
    write_features(Features("x", *arrays, "s3d@1", "logmel"), tmp_path / "x.safetensors")
    assert_one_line(predict(tmp_path / "x.safetensors"), "x.safetensors", "s3d@1", "--force")
    assert predict(tmp_path / "x.safetensors", "--force", "true").code == 0
    assert len(json.loads((tmp_path / "out" / "x.json").read_text())["snippets"]) == 3


def test_features_of_another_width_are_refused(predict: Callable[..., Any], tmp_path: Path) -> None:
    arrays = np.ones((1, 3, 5), np.float32), np.ones((3, 128), np.float32)
    write_features(Features("x", *arrays, "s3d@1", "logmel"), tmp_path / "x.safetensors")
    done = predict(tmp_path / "x.safetensors", "--force", "true")
    assert_one_line(done, "x.safetensors", "width")


def test_the_run_remembers_its_extractors(run: Path) -> None:
    options = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert options["visual_extractor"].startswith("tiny-videomae@")
    assert options["audio_extractor"] == "logmel"
