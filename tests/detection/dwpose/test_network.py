from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.detection.dwpose import SimCC, decode, encode, flip_back
from cohobate.detection.dwpose.network import RTMCCHead, RTMPose

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("case", range(2))
def test_labels_of_the_official_codec(cases, case):
    record = cases("simcc_codec")[case]
    size = record["input_wh"].tolist()
    labels, weight = encode(record["keypoints"], record["visible"], size, record["sigma"].tolist())
    torch.testing.assert_close(labels.x, record["x_labels"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(labels.y, record["y_labels"], rtol=1e-5, atol=1e-6)
    assert torch.equal(weight, record["weights"])
    assert torch.equal(encode(record["keypoints"], record["visible"], size)[0].x, labels.x)
    points, scores = decode(labels)
    assert torch.equal(points, record["roundtrip"])
    torch.testing.assert_close(scores, record["roundtrip_scores"])


@pytest.mark.parametrize("case", range(2))
def test_key_points_of_the_official_codec(cases, case):
    record = cases("simcc_codec")[case]
    points, scores = decode(SimCC(record["simcc_x"], record["simcc_y"]))
    assert torch.equal(points, record["decoded"])
    assert torch.equal(scores, record["scores"])
    assert torch.equal(points[0, 0], torch.tensor([-0.5, -0.5]))


def test_rounding_is_half_to_even_and_far_points_have_no_weight():
    points = torch.tensor([[[1.25, 1.75], [math.nan, 3.0], [1e30, 3.0], [-1e30, 3.0], [5.0, 5.0]]])
    visible = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    labels, weight = encode(points, visible, (32, 32))
    assert labels.x[0, 0].argmax() == 2
    assert labels.y[0, 0].argmax() == 4
    assert weight.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert all(axis.isfinite().all() and (axis[0, 1:] == 0).all() for axis in labels)


@pytest.mark.parametrize("case", range(2))
def test_head_of_the_official_code(cases, fill, case):
    record = cases("rtmcc_head")[case]
    channels, points, w, h, fw, fh, kernel, hidden, s = record["cfg"].tolist()
    head = RTMCCHead(channels, points, (w, h), fw * fh, kernel=kernel, hidden=hidden, attention=s)
    own = {k: ",".join(map(str, v.shape)) for k, v in head.state_dict().items()}
    assert own == dict(zip(record["keys"].tolist(), record["shapes"].tolist(), strict=True))
    fill(head)
    found = head(record["feat"])
    torch.testing.assert_close(found.x, record["pred_x"], **EXACT)
    torch.testing.assert_close(found.y, record["pred_y"], **EXACT)
    back = flip_back(found, record["flip_indices"].tolist())
    torch.testing.assert_close(back.x, record["flipped_x"], **EXACT)
    torch.testing.assert_close(back.y, record["flipped_y"], **EXACT)


def test_network_t_of_the_official_code(recorded, fill):
    record = recorded("full_t_256x192")
    network = fill(RTMPose("t", 133, (192, 256))).double().eval()
    own = {k: ",".join(map(str, v.shape)) for k, v in network.state_dict().items()}
    assert own == dict(zip(record["keys"].tolist(), record["shapes"].tolist(), strict=True))
    assert sum(p.numel() for p in network.parameters()) == int(record["num_params"])
    backbone = sum(p.numel() for p in network.backbone.parameters())
    assert backbone == int(record["num_backbone_params"])
    images = np.random.default_rng(int(record["seed"])).standard_normal((1, 3, 256, 192))
    with torch.no_grad():
        features = network.backbone(torch.from_numpy(images.astype(np.float32)).double())
        found = network.head(features)
    sample = features[0, :8].float()
    torch.testing.assert_close(sample, record["feat_sample"], **EXACT)
    torch.testing.assert_close(found.x.float(), record["pred_x"], **EXACT)
    torch.testing.assert_close(found.y.float(), record["pred_y"], **EXACT)


@pytest.mark.parametrize(
    ("variant", "backbone", "total"),
    [("s", 4.378, 8.384), ("m", 12.279, 17.953), ("l", 26.139, 33.481), ("x", 47.570, None)],
)
def test_parameters_of_the_paper(variant, backbone, total):
    with torch.device("meta"):
        network = RTMPose(variant, 133, (192, 256))
    millions = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (network.backbone, network)
    ]
    assert millions[0] == pytest.approx(backbone, abs=6e-4)
    assert total is None or millions[1] == pytest.approx(total, abs=6e-4)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="two multiples of 32, got 100 × 128"):
        RTMPose("micro", 5, (100, 128))


def test_an_empty_batch_and_an_image_without_content():
    network = RTMPose("micro", 5, (64, 64), hidden=32, attention=16).eval()
    assert network(torch.zeros(0, 3, 64, 64)).x.shape == (0, 5, 128)
    assert all(axis.isfinite().all() for axis in network(torch.zeros(1, 3, 64, 64)))
