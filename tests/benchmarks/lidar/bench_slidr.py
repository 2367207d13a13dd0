"""What SLidR costs: a pre-training step, reading a frame, pooling over superpixels.

    python tests/benchmarks/lidar/bench_slidr.py [--out docs/results/bench-slidr.json]

Scenes are the SYNTHETIC ones of the default recipe. Forms that are compared take turns in one
process; seconds are those the process got, so that other work on the machine counts little.
Medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.testing import build
from cohobate.core.testing.bench import in_turn, medians, write_rows
from cohobate.lidar.data import ImageCloudData
from cohobate.lidar.data.sets import read_scene
from cohobate.lidar.nets import UnitPixels
from cohobate.lidar.slidr import Pretrain
from cohobate.lidar.slidr.losses import EPS, pool

ROOT = Path(__file__).parents[3]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-slidr.json")
    parser.add_argument("--repeat", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    recipe = build("lidar/slidr/pretrain", "--data.simulator.train=8", "--data.simulator.val=1")
    model, data = recipe.model, recipe.datamodule
    assert isinstance(model, Pretrain)
    assert isinstance(data, ImageCloudData)
    data.prepare_data()
    data.setup("fit")
    rows = [
        step_row(model, data, asked.repeat),
        read_row(data, asked.repeat),
        *(
            pool_row(size, asked.repeat, whole=whole)
            for size in ((64, 112), (224, 416))
            for whole in (True, False)
        ),
    ]
    script = f"tests/benchmarks/lidar/bench_slidr.py --repeat {asked.repeat}"
    write_rows(asked.out, script, ("torch", "cohobate-lidar"), rows)
    print(*rows, sep="\n")


def step_row(model: Pretrain, data: ImageCloudData, repeat: int) -> dict[str, Any]:
    """Forward, loss, backward and optimiser step of the default recipe."""
    batch = next(iter(data.train_dataloader()))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)

    def run() -> None:
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()

    seconds = medians(in_turn({"step": run}, repeat, "step"))["step"]
    images, _, height, width = batch["images"].shape
    return {
        "what": f"pre-training step, U-Net 16-32-64, {data.batch_size} clouds, "
        f"{images} images of {height}×{width}",
        "seconds": f"{seconds:.3f}",
        "ratio": "",
        "note": f"{len(batch['inputs'][0]):,} voxels, {len(batch['pairing_points']):,} pairs",
    }


def read_row(data: ImageCloudData, repeat: int) -> dict[str, Any]:
    """Points, six images, superpixels and pairs of a frame."""
    assert data.superpixel_root is not None
    frames = data.read_frames("train", 1, cameras=True)
    read = partial(read_scene, source=data.superpixels, superpixel_root=data.superpixel_root)

    def run() -> None:
        for frame in frames:
            read(frame)

    seconds = medians(in_turn({"read": run}, repeat, "reading"))["read"] / len(frames)
    height, width = frames[0].cameras[0].size
    points, pairs = (len(x) for x in (read(frames[0]).points, read(frames[0]).pairing.points))
    return {
        "what": f"read and pair a frame, six images of {height}×{width}",
        "seconds": f"{seconds:.4f}",
        "ratio": "",
        "note": f"{points:,} points, {pairs:,} pairs",
    }


def pool_row(size: tuple[int, int], repeat: int, *, whole: bool) -> dict[str, Any]:
    """Superpoint and superpixel features with gradients, against products of sparse matrices.

    Args:
        size: Of the images.
        repeat: Turns.
        whole: From the image head's coarse answer, which the official form upsamples and scales to
            norm 1 first; else from the features of all pixels, in the memory order of that form.
    """
    points, coarse, *rest = regions(size)
    if whole:
        leaves = points, coarse
        forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "ours": lambda: pool(points, UnitPixels(coarse, size), *rest),
            "products": lambda: products(points, upsampled(coarse, size), *rest),
        }
        start = f"coarse features of {coarse.shape[2]}×{coarse.shape[3]}"
        megabytes = 4e-6 * coarse.shape[0] * coarse.shape[1] * size[0] * size[1]
        more = f"; the features of all pixels, {megabytes:.0f} MB, are not made"
    else:
        pixels = upsampled(coarse.detach(), size).requires_grad_()
        leaves = points, pixels
        forms = {
            "ours": lambda: pool(points, pixels, *rest),
            "products": lambda: products(points, pixels, *rest),
        }
        start, more = "features of all pixels", ""
    runs: dict[str, Callable[[], Any]] = {
        name: partial(gradients, form, leaves) for name, form in forms.items()
    }
    for one, other in zip(*(run() for run in runs.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # read what is given once, write the gradients once
    runs["floor"] = lambda: [(leaf.detach().sum(), torch.ones_like(leaf)) for leaf in leaves]
    seconds = medians(in_turn(runs, repeat, "pooling"))
    ratio = seconds["ours"] / seconds["products"]
    return {
        "what": f"superpixel pooling and gradients from {start}, {len(coarse)} images of "
        f"{size[0]}×{size[1]}, D = {coarse.shape[1]}",
        "seconds": f"ours {seconds['ours']:.3f}, sparse products {seconds['products']:.3f}, "
        f"reading and writing alone {seconds['floor']:.3f}",
        "ratio": round(ratio, 4),
        "note": f"{1 / ratio:.1f} times as fast, the same values and gradients{more}",
    }


def regions(
    size: tuple[int, int], images: int = 24, stride: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `pool`: unit features of points, coarse ones, pairs, squares for superpixels."""
    rng = torch.Generator().manual_seed(0)
    height, width = size
    points = F.normalize(torch.randn(30_000, 64, generator=rng), dim=1).requires_grad_()
    coarse = torch.randn(images, 64, height // stride, width // stride, generator=rng)
    pairs = 1500 * images
    row, column = torch.arange(height) * 10 // height, torch.arange(width) * 15 // width
    labels = (row[:, None] * 15 + column).expand(images, -1, -1)
    places = [torch.randint(n, (pairs,), generator=rng) for n in (images, height, width)]
    chosen = torch.randint(len(points), (pairs,), generator=rng)
    return points, coarse.requires_grad_(), chosen, torch.stack(places, 1), labels


def upsampled(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """Unit features of all pixels, as the official image network gives them."""
    fine = F.interpolate(coarse, size, mode="bilinear", align_corners=True)
    return F.normalize(fine, dim=1)


def products(
    points: Tensor, pixels: Tensor, chosen: Tensor, places: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """F and G as the paper writes them: one-hot matrices, made in each step, times features."""
    images = len(pixels)
    numbers = labels + torch.arange(images)[:, None, None] * (int(labels.max()) + 1)
    count = images * (int(labels.max()) + 1)
    of_pairs = one_hot(numbers[tuple(places.T)], count)
    of_pixels = one_hot(numbers.flatten(), count)
    pooled = of_pairs @ points[chosen] / (of_pairs.sum(1).to_dense()[:, None] + EPS)
    flat = pixels.permute(0, 2, 3, 1).flatten(0, 2)
    means = of_pixels @ flat / (of_pixels.sum(1).to_dense()[:, None] + EPS)
    held = of_pairs.sum(1).to_dense() > 0
    return pooled[held], means[held]


def one_hot(index: Tensor, count: int) -> Tensor:
    """A sparse matrix (count, N) with a one in each column."""
    places = torch.stack([index, torch.arange(len(index))])
    size = count, len(index)
    return torch.sparse_coo_tensor(places, torch.ones(size[1]), size, check_invariants=False)


def gradients(
    form: Callable[[], tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of the sum of their squares."""
    outputs = form()
    total = sum((x.square().sum() for x in outputs), torch.zeros(()))
    return (*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves))


if __name__ == "__main__":
    main()
