from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.medseg.data.nifti import Volume
from cohobate.medseg.data.preprocess import Preprocess, voxel_size

TILTED = np.array([[0, -1.2, 0, 5], [1.0, 0, 0, 3], [0, 0, 2.0, 4], [0, 0, 0, 1]])


def ball(size=(34, 30, 20), affine=TILTED):
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)
    inside = np.linalg.norm((grid - np.array(size) / 2) * [1, 1.2, 2], axis=-1) < 10
    return Volume(inside[None].astype(np.float32) * 50 + 10, affine), Volume(inside[None], affine)


def test_orientation_is_ras_and_undone():
    image, label = ball()
    preprocess = Preprocess(intensity="none")
    processed, ids = preprocess.image(image), preprocess.label(label)
    assert nib.aff2axcodes(processed.affine.numpy()) == ("R", "A", "S")
    assert processed.shape == ids.shape == (1, 30, 34, 20)
    scores = torch.stack([ids[0] == 0, ids[0] == 1]).float()
    np.testing.assert_array_equal(preprocess.restore(scores, processed, image), label.array[0])


def test_resampling_gives_the_asked_spacing_and_comes_back():
    image, label = ball()
    preprocess = Preprocess(spacing=(1.5, 1.5, 2.0))
    processed, ids = preprocess.image(image), preprocess.label(label)
    assert voxel_size(processed.affine.numpy()) == pytest.approx((1.5, 1.5, 2.0))
    assert set(ids.unique().tolist()) == {0, 1}
    scores = torch.stack([ids[0] == 0, ids[0] == 1]).float()
    back = preprocess.restore(scores, processed, image)
    truth = label.array[0]
    assert back.shape == truth.shape
    assert 2 * (back * truth).sum() / (back.sum() + truth.sum()) > 0.95


def test_resampling_does_not_shift():
    """A voxel's value is its own place in mm; it must still be so on the new grid."""

    def places(affine, size):
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij")).reshape(3, -1)
        return (affine[:3, :3] @ grid + affine[:3, 3:]).reshape(3, *size)

    volume = Volume(places(TILTED, (34, 30, 20)).astype(np.float32), TILTED)
    out = Preprocess(spacing=(1.5, 1.5, 2.0), intensity="none").image(volume)
    expected = places(out.affine.numpy(), out.shape[1:])
    inner = (slice(None), *(slice(2, -2),) * 3)
    np.testing.assert_allclose(out.numpy()[inner], expected[inner], atol=1e-4)


def test_zscore_takes_the_voxels_that_are_not_zero():
    array = np.random.default_rng(0).normal(5, 3, (2, 6, 6, 6)).astype(np.float32)
    array[:, 0] = 0
    out = Preprocess(orientation=None).image(Volume(array, np.eye(4))).numpy()
    for channel, raw in zip(out, array, strict=True):
        kept = raw[raw != 0]
        np.testing.assert_allclose(
            channel[raw != 0], (kept - kept.mean()) / kept.std(), rtol=1e-4, atol=1e-5
        )
        assert (channel[raw == 0] == 0).all()


def test_minmax_and_clip():
    array = np.linspace(-300, 300, 27, dtype=np.float32).reshape(1, 3, 3, 3)
    volume = Volume(array, np.eye(4))
    out = Preprocess(intensity="minmax").image(volume).numpy()
    np.testing.assert_allclose(out, (array + 300) / 600, atol=1e-6)
    clipped = Preprocess(clip=(-175, 250), intensity="none").image(volume).numpy()
    np.testing.assert_allclose(clipped, (array.clip(-175, 250) + 175) / 425, atol=1e-6)


@pytest.mark.parametrize(
    ("fault", "values"),
    [
        ("spacing", {"spacing": (1.0, 0.0, 1.0)}),
        ("clip", {"clip": (3.0, 3.0)}),
        ("orientation RAX", {"orientation": "RAX"}),
        ("orientation RL", {"orientation": "RLS"}),
    ],
)
def test_impossible_values_are_named(fault, values):
    with pytest.raises(InputError, match=f"preprocess.{fault}"):
        Preprocess(**values)
