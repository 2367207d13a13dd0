from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.losses import info_nce
from cohobate.lidar.metrics import confusion, intersection_over_union
from cohobate.lidar.nets import UnitPixels
from cohobate.lidar.slidr.losses import (
    lovasz_softmax,
    pixel_contrast,
    pool,
    segmentation_loss,
    superpixel_contrast,
)

Recorded = Callable[[str], dict[str, Any]]


def close(one: Tensor, other: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    torch.testing.assert_close(
        one, other.to(one.dtype), rtol=1e-5, atol=1e-5 * float(other.abs().max()) + 1e-8
    )


def batch(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.stack([torch.randint(0, n, (90,), generator=rng) for n in (3, 8, 12)], 1)
    return {
        "student": F.normalize(torch.randn(40, 6, generator=rng), dim=1),
        "teacher": F.normalize(torch.randn(3, 6, 8, 12, generator=rng), dim=1),
        "pairing_points": torch.randint(0, 40, (90,), generator=rng),
        "pairing_pixels": pixels,
        "superpixels": torch.randint(0, 9, (3, 8, 12), generator=rng),
    }


@pytest.mark.parametrize("case", ["a", "b"])
def test_nce(case: str, recorded: Recorded) -> None:
    z = recorded(f"nce_{case}")
    k, q = z["k"].requires_grad_(), z["q"].requires_grad_()
    loss = info_nce(k, q, temperature=float(z["tau"]), normalize=False)
    loss.backward()
    close(loss, z["loss"])
    close(k.grad, z["grad_k"])
    close(q.grad, z["grad_q"])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_superpixel_contrast(case: str, recorded: Recorded) -> None:
    z = recorded(f"superpixel_loss_{case}")
    student, teacher = z["feat_points"].requires_grad_(), z["feat_images"].requires_grad_()
    rest = z["pairing_points"], z["pairing_images"], z["superpixels"]
    points, pixels = pool(student, teacher, *rest)
    close(points, z["pooled_points"])
    close(pixels, z["pooled_pixels"])
    loss = superpixel_contrast(student, teacher, *rest, temperature=float(z["tau"]))
    loss.backward()
    close(loss, z["loss"])
    close(student.grad, z["grad_points"])
    close(teacher.grad, z["grad_images"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_pixel_contrast(case: str, recorded: Recorded) -> None:
    z = recorded(f"ppkt_loss_{case}")
    student, teacher = z["feat_points"].requires_grad_(), z["feat_images"].requires_grad_()
    loss = pixel_contrast(
        student,
        teacher,
        z["pairing_points"],
        z["pairing_images"],
        temperature=float(z["tau"]),
        chosen=z["match_index"],
    )
    loss.backward()
    close(loss, z["loss"])
    close(student.grad, z["grad_points"])
    close(teacher.grad, z["grad_images"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_segmentation_loss(case: str, recorded: Recorded) -> None:
    z = recorded(f"segloss_{case}")
    logits = z["logits"].requires_grad_()
    found = segmentation_loss(logits, z["labels"], ignore=int(z["ignore_index"]))
    sum(found.values()).backward()  # type: ignore[union-attr]
    close(found["cross_entropy"], z["cross_entropy"])
    close(found["lovasz"], z["lovasz"])
    close(logits.grad, z["grad_logits"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_intersection_over_union(case: str, recorded: Recorded) -> None:
    z = recorded(f"iou_{case}")
    matrix = confusion(z["preds"], z["labels"], int(z["num_classes"]))
    assert torch.equal(matrix.float(), z["confusion"].float())
    found = intersection_over_union(matrix)
    assert found["miou"] == pytest.approx(float(z["miou"]), rel=1e-6)
    assert found["micro_iou"] == pytest.approx(float(z["fwiou"]), rel=1e-6)


def test_only_present_classes_count_where_asked() -> None:
    truth, guess = torch.tensor([1, 1, 2, 0]), torch.tensor([1, 2, 2, 3])
    found = intersection_over_union(confusion(guess, truth, 4), names=["-", "a", "b", "c"])
    assert found["iou_a"] == 0.5
    assert found["iou_b"] == 0.5
    assert "iou_c" not in found
    assert found["miou"] == pytest.approx(2 / 3)
    assert found["miou_present"] == 0.5


def test_gradients_equal_finite_differences() -> None:
    b = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
    rest = [b["pairing_points"], b["pairing_pixels"], b["superpixels"]]
    student, teacher = b["student"][:, :2].clone(), b["teacher"][:, :2].clone()
    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, t: superpixel_contrast(s, t, *rest, temperature=0.5), inputs, fast_mode=True
    )
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 1, 1, 0, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x: lovasz_softmax(x.double(), target).double(), logits, atol=1e-2, eps=1e-3
    )


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_loss_equals_a_loop_over_regions(temperature: float) -> None:
    b = batch()
    image, row, column = b["pairing_pixels"].unbind(1)
    regions = b["superpixels"][image, row, column]
    points, pixels = [], []
    for i in range(3):
        for label in range(9):
            here = (image == i) & (regions == label)
            if here.any():
                points.append(b["student"][b["pairing_points"][here]].double().mean(0))
                pixels.append(b["teacher"][i].double()[:, b["superpixels"][i] == label].mean(1))
    scores = torch.stack(points) @ torch.stack(pixels).T / temperature
    expected = F.cross_entropy(scores, torch.arange(len(points)))
    close(superpixel_contrast(**b, temperature=temperature).double(), expected)


def test_neither_names_of_superpixels_nor_the_order_of_cameras_matter() -> None:
    b = batch()
    loss = superpixel_contrast(**b)
    names = torch.stack([torch.randperm(40)[:9] for _ in range(3)])
    renamed = torch.stack([n[labels] for n, labels in zip(names, b["superpixels"], strict=True)])
    close(superpixel_contrast(**{**b, "superpixels": renamed}), loss)
    order = torch.tensor([2, 0, 1])
    pixels = b["pairing_pixels"].clone()
    pixels[:, 0] = order.argsort()[pixels[:, 0]]
    moved = {"teacher": b["teacher"][order], "superpixels": b["superpixels"][order]}
    close(superpixel_contrast(**{**b, **moved, "pairing_pixels": pixels}), loss)


def test_equal_features_give_the_logarithm_of_the_number_of_regions() -> None:
    b = batch()
    student = torch.full_like(b["student"], 6**-0.5)
    teacher = torch.full_like(b["teacher"], 6**-0.5)
    points, _ = pool(student, teacher, *list(b.values())[2:])
    loss = superpixel_contrast(**{**b, "student": student, "teacher": teacher})
    assert loss.item() == pytest.approx(math.log(len(points)), rel=1e-5)


@pytest.mark.parametrize("contrast", ["superpixel", "pixel"])
def test_an_upsampled_map_need_not_be_held(contrast: str) -> None:
    b = batch()
    regions = b.pop("superpixels")
    coarse = torch.randn(3, 6, 3, 5, requires_grad=True)
    found = []
    for form in (UnitPixels(coarse, (8, 12)), UnitPixels(coarse, (8, 12)).dense()):
        rest = {**b, "teacher": form}
        if contrast == "superpixel":
            loss = superpixel_contrast(**rest, superpixels=regions)
        else:
            loss = pixel_contrast(**rest, chosen=torch.arange(0, 90, 2))
        found.append((loss.detach(), *torch.autograd.grad(loss, coarse)))
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_an_image_without_pairs_takes_no_part() -> None:
    b = batch()
    seen = b["pairing_pixels"][:, 0] != 1
    some = {**b, "pairing_points": b["pairing_points"][seen]}
    some["pairing_pixels"] = b["pairing_pixels"][seen]
    loss = superpixel_contrast(**some)
    changed = b["teacher"].clone()
    changed[1] = -changed[1]
    assert torch.equal(superpixel_contrast(**{**some, "teacher": changed}), loss)
    pixels = some["pairing_pixels"].clone()
    pixels[:, 0] //= 2
    rest = {"teacher": b["teacher"][[0, 2]], "superpixels": b["superpixels"][[0, 2]]}
    close(superpixel_contrast(**{**some, **rest, "pairing_pixels": pixels}), loss)


def test_labels_past_150_stay_in_their_image() -> None:
    b = batch()
    loss = superpixel_contrast(**b)
    far = {**b, "superpixels": b["superpixels"] + 80}
    close(superpixel_contrast(**far), loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype: torch.dtype) -> None:
    b = batch()
    half = {**b, "student": b["student"].to(dtype), "teacher": b["teacher"].to(dtype)}
    loss = superpixel_contrast(**half)
    assert loss.dtype == dtype
    full = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    torch.testing.assert_close(loss.float(), superpixel_contrast(**full), rtol=2e-2, atol=1e-2)


def test_nothing_to_learn_from_is_zero_with_a_gradient_and_a_warning() -> None:
    b = batch()
    empty = {
        **b,
        "student": b["student"].requires_grad_(),
        "pairing_points": b["pairing_points"][:0],
        "pairing_pixels": b["pairing_pixels"][:0],
    }
    with pytest.warns(UserWarning, match="teaches nothing"):
        loss = superpixel_contrast(**empty)
    loss.backward()
    coarse = torch.randn(3, 6, 3, 5, requires_grad=True)
    with pytest.warns(UserWarning, match="teaches nothing"):
        superpixel_contrast(**{**empty, "teacher": UnitPixels(coarse, (8, 12))}).backward()
    assert coarse.grad is not None
    assert coarse.grad.abs().max() == 0
    assert loss.item() == 0
    assert empty["student"].grad.abs().max() == 0
    del empty["superpixels"]
    with pytest.warns(UserWarning, match="teaches nothing"):
        assert pixel_contrast(**empty).item() == 0
    nothing = segmentation_loss(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 0]))
    assert [value.item() for value in nothing.values()] == [0, 0]
    assert lovasz_softmax(torch.ones(0, 3), torch.ones(0).long()).item() == 0


def test_fewer_pairs_than_samples_are_all_taken() -> None:
    b = batch()
    del b["superpixels"]
    close(pixel_contrast(**b, samples=10**6), pixel_contrast(**b, chosen=torch.arange(90)))


def test_what_is_out_of_range_is_said_in_words() -> None:
    b = batch()
    outside = b["pairing_pixels"] + torch.tensor([0, 5, 0])
    for change, words in (
        ({"superpixels": b["superpixels"] - 1}, "label -1 is negative"),
        ({"superpixels": b["superpixels"] + 100}, "label 10"),
        ({"superpixels": b["superpixels"][:, :4]}, "superpixels"),
        ({"pairing_pixels": outside}, "rows from"),
        ({"pairing_points": b["pairing_points"] + 10}, "points from"),
        ({"pairing_pixels": b["pairing_pixels"][:3]}, "pairing"),
        ({"student": b["student"][:, :3]}, "expected"),
    ):
        with pytest.raises(InputError, match=words):
            superpixel_contrast(**{**b, **change})
    with pytest.raises(InputError, match="labels: from 1 to 3"):
        segmentation_loss(torch.zeros(2, 3), torch.tensor([1, 3]))
