"""SYNTHETIC people: drawn figures with exact points, as no dependency ships annotated people."""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from cohobate.detection.dwpose.keypoints import WHOLEBODY
from cohobate.detection.dwpose.people import People, Photo

TRAIN, VAL, TEST = 256, 32, 96
WIDTH, HEIGHT = 104, 136
_TIPS = (4, 8, 12, 16, 20)  # of the 21 points of a hand
KINDS = WHOLEBODY.subset([*range(23), *(91 + t for t in _TIPS), *(112 + t for t in _TIPS)])
DESCRIPTION = (
    f"SYNTHETIC drawn figures with {len(KINDS.names)} of the whole-body points (body, feet, finger "
    f"tips): {TRAIN} train, {VAL} val, {TEST} test people, pictures of {WIDTH} × {HEIGHT} pixels"
)
_FINE = 2  # drawn larger, then shrunk
_SUIT = {"shirt": 0.15, "arms": 0.33, "legs": 0.6, "shoes": 0.9}


@lru_cache(maxsize=4)
def figures(count: int, seed: int) -> People:
    """Draw people, one a picture.

    Args:
        count: Number of people.
        seed: They are a function of it.

    Example:
        >>> made = figures(2, seed=0)
        >>> made.points.shape, made.photos[0].read().shape
        ((2, 33, 3), (136, 104, 3))
    """
    rng = np.random.default_rng(seed)
    drawn = [_figure(rng) for _ in range(count)]
    points = np.stack([p for _, p in drawn])
    low, high = points[..., :2].min(1), points[..., :2].max(1)
    low, high = (np.clip(v, 0, (WIDTH, HEIGHT)) for v in (low - 4, high + 4))
    boxes = np.concatenate([low, high - low], 1)
    return People(
        [Photo(n, f"{n:04d}.png", WIDTH, HEIGHT, pixels=p) for n, (p, _) in enumerate(drawn)],
        np.arange(count), boxes, points, 0.5 * boxes[:, 2] * boxes[:, 3], np.zeros(count, bool),
        np.ones(count),
    )  # fmt: skip


def _figure(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    joints = _pose(rng)
    canvas = _ground(rng)
    hidden = _paint(canvas, joints, rng)
    pixels = np.asarray(canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX)).astype(np.int16)
    pixels = (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
    inside = ((joints >= 0) & (joints < (WIDTH, HEIGHT))).all(1)
    # hands are often not annotated, and single points may be missing
    known = inside & (rng.random(len(joints)) > 0.03)
    for hand in ("lefthand", "righthand"):
        if rng.random() < 0.15:
            known[KINDS.parts[hand]] = False
    visible = np.where(known, np.where(hidden, 1, 2), 0)
    return pixels, np.concatenate([joints, visible[:, None]], 1)


def _turn(direction: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ direction


def _pose(rng: np.random.Generator) -> np.ndarray:
    """Places ``(33, 2)`` of a person who looks at us: its left is at our right."""
    size = rng.uniform(78, 108)
    up = _turn(np.array([0.0, -1.0]), rng.uniform(-18, 18)) * size
    right = np.array([-up[1], up[0]])
    hip = np.array([WIDTH / 2, HEIGHT * 0.55]) + rng.uniform(-8, 8, 2)
    chest = hip + 0.30 * up
    look = rng.uniform(-0.02, 0.02)
    head = chest + 0.13 * up + look * right
    face = [head, *(head + 0.03 * up + s * 0.025 * right for s in (1, -1)),
            *(head + 0.015 * up + (s * 0.055 - look) * right for s in (1, -1))]  # fmt: skip
    chains: dict[str, list[np.ndarray]] = {}
    for side, s in (("left", 1.0), ("right", -1.0)):
        down = -up
        arm = _turn(down, -s * rng.uniform(-15, 145))
        fore = _turn(arm, -s * rng.uniform(-100, 20))
        shoulder = chest + s * 0.11 * right
        elbow = shoulder + 0.16 * arm
        wrist = elbow + 0.14 * fore
        spread = rng.uniform(12, 28)
        tips = [wrist + length * _turn(fore, s * spread * (2 - n))
                for n, length in enumerate((0.05, 0.075, 0.08, 0.075, 0.06))]  # fmt: skip
        thigh = _turn(down, -s * rng.uniform(-8, 45))
        shin = _turn(thigh, s * rng.uniform(-10, 50))
        leg = hip + s * 0.07 * right
        knee = leg + 0.22 * thigh
        ankle = knee + 0.21 * shin
        toe = _turn(shin, -s * rng.uniform(35, 80))
        feet = [ankle + 0.085 * toe, ankle + 0.08 * _turn(toe, s * 25), ankle + 0.035 * shin]
        chains[side] = [shoulder, elbow, wrist, leg, knee, ankle, *feet, *tips]
    body = [chains[side][n] for n in range(6) for side in ("left", "right")]
    rest = [
        chains[side][n] for group in (range(6, 9), range(9, 14)) for side in chains for n in group
    ]
    return np.array([*face, *body, *rest])


def _ground(rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    wave = np.sin(x * rng.uniform(0.02, 0.2) + y * rng.uniform(0.02, 0.2))
    ground = rng.uniform(70, 170) + rng.uniform(-15, 15, 3) + 30 * wave[..., None]
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    image = image.resize((WIDTH * _FINE, HEIGHT * _FINE))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 7)):  # sticks that look like limbs
        ends = (rng.random(4) * np.tile(image.size, 2)).tolist()
        grey = (int(rng.integers(30, 230)),) * 3
        draw.line(ends, fill=grey, width=int(rng.integers(2, 7)) * _FINE)
    return image


def _colours(rng: np.random.Generator) -> dict[str, tuple[int, int, int]]:
    """A suit whose parts have each their hue, so that little training teaches something."""
    found = {}
    for name, hue in _SUIT.items():
        wheel = (hue + rng.uniform(-0.025, 0.025)) % 1.0
        rgb = colorsys.hsv_to_rgb(wheel, rng.uniform(0.6, 1.0), rng.uniform(0.7, 1.0))
        found[name] = (round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255))
    return found


def _paint(image: Image.Image, joints: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the person; which points are hidden behind something."""
    draw, p = ImageDraw.Draw(image), [tuple(v) for v in (joints * _FINE).tolist()]
    suit = _colours(rng)
    skin = tuple(int(c * rng.uniform(0.7, 1.0)) for c in (250, 205, 175))

    def limb(points: list[int], colour: tuple[int, ...], width: float) -> None:
        wide = round(width * _FINE)
        draw.line([p[n] for n in points], fill=colour, width=wide, joint="curve")
        for n in points:
            x, y = p[n]
            draw.ellipse([x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2], fill=colour)

    for s in (0, 1):
        limb([11 + s, 13 + s, 15 + s], suit["legs"], 7)
        limb([19 + 3 * s, 15 + s, 17 + 3 * s], suit["shoes"], 4)
        limb([18 + 3 * s, 15 + s], suit["shoes"], 3)
    draw.polygon([p[5], p[6], p[12], p[11]], fill=suit["shirt"])
    limb([5, 6, 12, 11, 5], suit["shirt"], 6)
    x, y = p[0]
    wide = float(np.linalg.norm(joints[3] - joints[4])) * _FINE / 2
    draw.ellipse([x - wide, y - 1.3 * wide, x + wide, y + 1.2 * wide], fill=skin)
    for n in (1, 2):
        ex, ey = p[n]
        draw.ellipse([ex - _FINE, ey - _FINE, ex + _FINE, ey + _FINE], fill=(20, 20, 30))
    draw.ellipse([x - _FINE, y - _FINE, x + _FINE, y + _FINE], fill=(150, 60, 50))
    for s in (0, 1):
        limb([5 + s, 7 + s, 9 + s], suit["arms"], 6)
        for tip in range(5):
            limb([9 + s, 23 + 5 * s + tip], skin, 1.6)
    hidden = np.zeros(len(joints), bool)
    if rng.random() < 0.3:  # something in front
        low = rng.random(2) * (WIDTH, HEIGHT) * 0.8
        high = low + rng.uniform(12, 34, 2)
        draw.rectangle([*(low * _FINE).tolist(), *(high * _FINE).tolist()], fill=(90, 90, 90))
        hidden = np.asarray(((joints > low) & (joints < high)).all(1))
    return hidden
