from __future__ import annotations

import json

import av
import numpy as np
import onnxruntime
import pytest
import torch

from cohobate.core.io import load_checkpoint
from cohobate.core.runs import load_run
from cohobate.core.testing import assert_one_line, run_command
from cohobate.detection.dwpose import WHOLEBODY, DWPose, RTMPose, encode
from cohobate.detection.dwpose.plots import draw_people
from cohobate.detection.dwpose.predict import Poser
from cohobate.detection.dwpose.synthetic import KINDS, figures
from cohobate.detection.dwpose.transforms import crop_of, moved
from cohobate.detection.plots import write_picture

SIZE = (64, 64)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as released weights come, and its network."""
    torch.manual_seed(0)
    network = RTMPose("micro", 133, (192, 256))
    with torch.no_grad():  # so that points have scores that are drawn
        network.head.cls_x.weight.add_(0.5)
    file = tmp_path_factory.mktemp("released") / "dw.pth"
    torch.save({"state_dict": network.state_dict(), "meta": {}}, file)
    return file


@pytest.fixture(scope="module")
def run(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    done = run_command("take-pose", released, "micro", folder, domain="detection")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def photos(tmp_path):
    people = figures(2, 9)
    for photo in people.photos:
        write_picture(tmp_path / "photos" / photo.name, photo.read())
    return tmp_path / "photos"


def test_a_perfect_network_finds_the_points_again():
    people = figures(1, 2)
    crop = crop_of(people.boxes[0], SIZE)
    points = moved(people.points[0, :, :2], crop.matrix(SIZE, people.photos[0].width))
    labels, _ = encode(torch.from_numpy(points)[None], torch.ones(1, len(KINDS.names)), SIZE)
    poser = Poser(lambda images: labels, SIZE, KINDS)
    found = poser.find(people.photos[0].read(), people.boxes, torch.device("cpu"))
    # half a bin of a quarter of a pixel in the crop
    np.testing.assert_allclose(
        found[0, :, :2], people.points[0, :, :2], atol=0.3 * crop.extent[0] / SIZE[0]
    )


def test_predict_on_pictures(run, photos, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({
        "0000.png": [[10, 10, 60, 100], [5, 5, 0, 10]], "0001.png": [],
    }))  # fmt: skip
    done = run_command(
        "predict", "detection/dwpose", photos, "--checkpoint", run, "--out", tmp_path / "out",
        "--boxes", boxes,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "poses.json").read_text())
    assert found["names"] == WHOLEBODY.names
    first, second = found["people"].values()
    assert [len(p["keypoints"]) for p in first] == [133]
    assert second == []
    assert len(list((tmp_path / "out").glob("*_pose.png"))) == 2


def test_predict_on_a_clip_and_a_damaged_file(run, make_clip, tmp_path):
    clip, bad = make_clip(tmp_path / "clip.mp4", 3), tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    done = run_command(
        "predict", "detection/dwpose", clip, bad, "--checkpoint", run, "--out", tmp_path / "out",
        "--batch=2", "--black=true",
    )  # fmt: skip
    assert_one_line(done, bad, "not a picture", "the other 1 are in")
    frames = json.loads((tmp_path / "out" / "clip.json").read_text())["frames"]
    assert [len(people) for people in frames] == [1, 1, 1]
    with av.open(str(tmp_path / "out" / "clip_pose.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_a_detector_in_front(run, photos, tmp_path):
    from cohobate.detection.commands import take
    from cohobate.detection.d_fine.checkpoint import save_official
    from cohobate.detection.d_fine.network import DFineNet
    from cohobate.detection.d_fine.sizes import config_of

    file = save_official(DFineNet(config_of("tiny", 80)), tmp_path / "dfine.pth")
    assert take(file, "tiny", tmp_path / "detector") is None
    done = run_command(
        "predict", "detection/dwpose", photos, "--checkpoint", run, "--out", tmp_path / "out",
        "--detector", tmp_path / "detector", "--sure=0.9", "--picture=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "poses.json").read_text())["people"]
    assert list(found.values()) == [[], []]  # an untrained detector is sure of nobody


def test_wrong_options_end_in_one_line(run, photos, tmp_path):
    words = ["predict", "detection/dwpose", photos, "--checkpoint", run, "--out", tmp_path / "out"]
    boxes = tmp_path / "boxes.json"
    assert_one_line(run_command(*words, "--boxes", boxes), boxes, "cannot be read")
    boxes.write_text(json.dumps({"0000.png": [[1, 2, 3]]}))
    assert_one_line(run_command(*words, "--boxes", boxes), boxes, "0000.png: not a list")
    boxes.write_text(json.dumps({"0000.png": [[1, 2, 3, 4]]}))
    done = run_command(*words, "--boxes", boxes)
    assert_one_line(done, "no boxes of 0001.png", "the other 1 are in")
    assert_one_line(run_command(*words, "--boxes", boxes, "--detector", run), "give one of them")
    assert_one_line(run_command(*words, "--detector", run), "not a run of a detector")


def test_released_weights_come_back(run, released, tmp_path):
    from cohobate.detection.dwpose.commands import give_pose

    assert give_pose(run, tmp_path / "again.pth") is None
    one, other = (load_checkpoint(f)["state_dict"] for f in (released, tmp_path / "again.pth"))
    assert all(torch.equal(one[k], other[k]) for k in {**one, **other})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    from cohobate.detection.dwpose.commands import give_pose

    file = tmp_path_factory.mktemp("onnx") / "pose.onnx"
    assert give_pose(run, file) is None
    return file


def test_onnx_has_names_and_shapes_of_the_released_models(run, exported):
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    assert [(x.name, x.shape) for x in inputs] == [("input", [1, 3, 256, 192])]
    wanted = [("simcc_x", [1, 133, 384]), ("simcc_y", [1, 133, 512])]
    assert [(x.name, x.shape) for x in outputs] == wanted
    images = torch.randn(1, 3, 256, 192, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = load_run(run).network(images)
    for one, other in zip(expected, session.run(None, {"input": images.numpy()}), strict=True):
        np.testing.assert_allclose(other, one.numpy(), atol=1e-4, rtol=1e-4)


def test_an_onnx_model_gives_the_points_of_its_network(run, exported, photos, tmp_path):
    file = exported
    done = run_command("pose", file, photos / "0000.png", tmp_path / "out", domain="detection")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "poses.json").read_text())["people"]
    model = load_run(run)
    assert isinstance(model, DWPose)
    model.flip_test = False
    people = figures(2, 9)
    pixels = people.photos[0].read()
    whole = np.array([[0.0, 0, pixels.shape[1], pixels.shape[0]]])
    wanted = model.poser().find(pixels, whole, torch.device("cpu"))[0]
    np.testing.assert_allclose(next(iter(found.values()))[0]["keypoints"], wanted, atol=1e-2)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    done = run_command("pose", broken, photos, tmp_path / "out", domain="detection")
    assert_one_line(done, broken, "not an ONNX model")


def test_people_are_drawn_where_their_points_are():
    people = figures(1, 4)
    black = np.zeros_like(people.photos[0].read())
    points = people.points.copy()
    points[..., 2] = 1.0
    drawn = draw_people(black, points, KINDS)
    elbow, wrist = points[0, 7, :2], points[0, 9, :2]
    middle = ((elbow + wrist) / 2).round().astype(int)
    assert drawn[middle[1], middle[0]].any()
    assert not black.any()
    points[..., 2] = 0.1
    assert not draw_people(black, points, KINDS).any()
