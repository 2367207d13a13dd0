"""Joint augmentation of a cloud and its images; only the pairing ties the two."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from cohobate.lidar.data.projection import Pairing


@dataclass(frozen=True)
class Augment:
    """What is done to clouds and images in training; 0 or false leaves a part out.

    Args:
        rotate: Turn the cloud about z by any angle.
        mirror: Mirror x and y of the cloud, each with probability a half.
        cuboid: Largest edge of the cuboid whose points are dropped, as a share of the cloud.
        cuboid_pairs: Pairs that every image keeps, or else nothing is dropped.
        scale: Least and largest share of the image that is cropped; 0 takes a window of ``crop``'s
            size as it is, without resizing.
        ratio: Least and largest width / height of the crop.
        crop_pairs: Pairs that a crop shall keep,
        crop_share: or this share of the image's; it is drawn again otherwise,
        crop_draws: at most so often.
        flip: Mirror each image with probability a half.
    """

    rotate: bool = True
    mirror: bool = True
    cuboid: float = 0.2
    cuboid_pairs: int = 1024
    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (14 / 9, 17 / 9)
    crop_pairs: int = 1024
    crop_share: float = 0.75
    crop_draws: int = 10
    flip: bool = True


@dataclass(frozen=True)
class Scene:
    """A cloud with its images, as the augmentation passes it on.

    Attributes:
        points: x, y, z and more (N, ≥ 3).
        images: In [0, 1] (I, 3, H, W).
        superpixels: (I, H, W), int32.
        pairing: Pairs of both.
    """

    points: np.ndarray
    images: Tensor
    superpixels: Tensor
    pairing: Pairing


def augment(scene: Scene, how: Augment, size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """All parts in the paper's order.

    Args:
        scene: The scene.
        how: Which parts.
        size: Height and width of the crops.
        rng: Where all draws come from.

    References:
        Sautier et al., arXiv:2203.16258, section 4.1.
    """
    scene = replace(scene, points=turn(scene.points, how, rng))
    if how.cuboid and len(scene.points):
        share, centre = how.cuboid * rng.random(), int(rng.integers(len(scene.points)))
        scene = drop_cuboid(scene, share, centre, how.cuboid_pairs)
    boxes = _crops(scene, how, size, rng)
    scene = crop(scene, boxes, size)
    return flip(scene, rng.random(len(scene.images)) < 0.5) if how.flip else scene


def turn(points: np.ndarray, how: Augment, rng: np.random.Generator) -> np.ndarray:
    """Turn a cloud about z and mirror x and y.

    Args:
        points: (N, ≥ 3); further columns are left as they are.
        how: Which parts.
        rng: Where the draws come from.
    """
    points = points.copy()
    if how.rotate:
        angle = rng.uniform(0, 2 * math.pi)
        c, s = math.cos(angle), math.sin(angle)
        rotation = np.array([[c, -s], [s, c]])
        points[:, :2] = (points[:, :2] @ rotation.T).astype(points.dtype)
    if how.mirror:
        points[:, :2] *= np.where(rng.random(2) < 0.5, -1, 1).astype(points.dtype)
    return points


def drop_cuboid(scene: Scene, share: float, centre: int, min_pairs: int = 1024) -> Scene:
    """Drop the points strictly inside a cuboid around one of them.

    Args:
        scene: The scene.
        share: Edges of the cuboid as a share of the cloud's extent.
        centre: Index of the point in the middle.
        min_pairs: Nothing is dropped where an image would keep fewer pairs.
    """
    xyz = scene.points[:, :3]
    half = (xyz.max(0) - xyz.min(0)) * xyz.dtype.type(share) / 2
    low, high = xyz[centre] - half, xyz[centre] + half
    keep = ~((low < xyz) & (xyz < high)).all(1)
    kept = keep[scene.pairing.points]
    images = scene.pairing.pixels[kept, 0]
    if np.bincount(images, minlength=len(scene.images)).min(initial=min_pairs) < min_pairs:
        return scene
    place = keep.cumsum() - 1
    pairing = Pairing(place[scene.pairing.points[kept]], scene.pairing.pixels[kept])
    return replace(scene, points=scene.points[keep], pairing=pairing)


def crop(scene: Scene, boxes: np.ndarray, size: tuple[int, int]) -> Scene:
    """Cut a box out of every image and resize it; pairs that leave their image are dropped.

    Args:
        scene: The scene.
        boxes: Top, left, height, width of each image (I, 4).
        size: Height and width afterwards.
    """
    images, superpixels = [], []
    for image, regions, (top, left, height, width) in zip(
        scene.images, scene.superpixels, boxes.tolist(), strict=True
    ):
        window = (slice(top, top + height), slice(left, left + width))
        images.append(resize(image[:, *window], size))
        superpixels.append(_nearest(regions[window], size))
    pairing, inside = _moved(scene.pairing, boxes, size)
    pairing = Pairing(pairing.points[inside], pairing.pixels[inside])
    return replace(
        scene, images=torch.stack(images), superpixels=torch.stack(superpixels), pairing=pairing
    )


def fit_size(scene: Scene, size: tuple[int, int]) -> Scene:
    """Resize whole images; pairs at the border stay inside. What validation does.

    Args:
        scene: The scene.
        size: Height and width afterwards.
    """
    count, _, height, width = scene.images.shape
    boxes = np.tile([0, 0, height, width], (count, 1))
    pairing, _ = _moved(scene.pairing, boxes, size)
    pixels = pairing.pixels.copy()
    pixels[:, 1:] = pixels[:, 1:].clip(0, np.array(size) - 1)
    return replace(
        scene,
        images=resize(scene.images, size),
        superpixels=_nearest(scene.superpixels, size),
        pairing=Pairing(pairing.points, pixels),
    )


def flip(scene: Scene, which: np.ndarray) -> Scene:
    """Mirror some images with their pairs.

    Args:
        scene: The scene.
        which: Whether to, for each image (I,).
    """
    mask = torch.from_numpy(np.asarray(which))
    images = torch.where(mask[:, None, None, None], scene.images.flip(-1), scene.images)
    regions = torch.where(mask[:, None, None], scene.superpixels.flip(-1), scene.superpixels)
    pixels = scene.pairing.pixels.copy()
    turned = np.asarray(which)[pixels[:, 0]]
    pixels[turned, 2] = images.shape[-1] - 1 - pixels[turned, 2]
    pairing = Pairing(scene.pairing.points, pixels)
    return replace(scene, images=images, superpixels=regions, pairing=pairing)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, (..., 3, H, W)."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return T.resize(images, list(size), antialias=True)


def _nearest(regions: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = regions.shape[-2:]
    rows = torch.arange(size[0]) * height // size[0]
    columns = torch.arange(size[1]) * width // size[1]
    return regions[..., rows[:, None], columns]


def _moved(
    pairing: Pairing, boxes: np.ndarray, size: tuple[int, int]
) -> tuple[Pairing, np.ndarray]:
    """Pairs in the resized boxes, and which of them lie inside."""
    own = boxes[pairing.pixels[:, 0]]
    scale = np.array(size) / own[:, 2:]
    places = np.rint((pairing.pixels[:, 1:] - own[:, :2]) * scale).astype(np.int64)
    inside = ((places >= 0) & (places < np.array(size))).all(1)
    return Pairing(pairing.points, np.concatenate([pairing.pixels[:, :1], places], 1)), inside


def _crops(
    scene: Scene, how: Augment, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """A box for every image that keeps enough pairs, or the last of ``crop_draws``."""
    count, _, height, width = scene.images.shape
    total = np.bincount(scene.pairing.pixels[:, 0], minlength=count)
    boxes = np.zeros((count, 4), np.int64)
    open_ = np.ones(count, bool)
    for _ in range(how.crop_draws):
        drawn = np.array([_box((height, width), how, size, rng) for _ in range(count)])
        boxes[open_] = drawn[open_]
        pairing, inside = _moved(scene.pairing, boxes, size)
        kept = np.bincount(pairing.pixels[inside, 0], minlength=count)
        open_ &= (kept <= how.crop_pairs) & (kept <= how.crop_share * total)
        if not open_.any():
            break
    return boxes


def _box(
    image: tuple[int, int], how: Augment, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height, width of one crop."""
    if not how.scale[1]:
        height, width = min(size[0], image[0]), min(size[1], image[1])
        return _placed(image, height, width, rng)
    for _ in range(10):
        area = image[0] * image[1] * rng.uniform(*how.scale)
        ratio = math.exp(rng.uniform(*np.log(how.ratio)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image[1] and 0 < height <= image[0]:
            return _placed(image, height, width, rng)
    height, width = image
    if width / height < how.ratio[0]:
        height = round(width / how.ratio[0])
    elif width / height > how.ratio[1]:
        width = round(height * how.ratio[1])
    return (image[0] - height) // 2, (image[1] - width) // 2, height, width


def _placed(
    image: tuple[int, int], height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    top = int(rng.integers(image[0] - height + 1))
    left = int(rng.integers(image[1] - width + 1))
    return top, left, height, width
