"""nuScenes read from its own tables: key frames, poses, cameras, point labels."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cohobate.core.errors import InputError
from cohobate.lidar.data.projection import Camera, inverse, pinhole, transform

CHANNELS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT",
)  # fmt: skip
CLASSES = (
    "ignored", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle",
    "pedestrian", "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk",
    "terrain", "manmade", "vegetation",
)  # fmt: skip
TO_CLASS: dict[int, int] = {
    9: 1, 14: 2, 15: 3, 16: 3, 17: 4, 18: 5, 21: 6, 2: 7, 3: 7, 4: 7, 6: 7, 12: 8, 22: 9, 23: 10,
    24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 30: 16,
}  # fmt: skip
"""Raw label id → class; all others are 0, which is ignored."""
TO_RAW = (0, 9, 14, 16, 17, 18, 21, 2, 12, 22, 23, 24, 25, 26, 27, 28, 30)
"""Class → a raw label id of it."""

# Scenes by number: the published validation split, and 100 training scenes that SLidR holds out to
# choose hyper-parameters on.
_VAL = (
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 "
    "632-638 770-771 775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 "
    "1059-1073"
)
_VERIFY = (
    "8-9 19 29 32 42 45 49 52 54 56 66-67 73 131 152 166 168 183 190 194 208 210-211 241 243 "
    "248 259-261 287 292 297 305-306 350 352 358 361 365 368 377 388 391 395 413 427-428 438 "
    "444 452-453 459 463-464 475 513 533 544 575 587 589 642 652 658 669 678 687 701 703 706 "
    "710 715 726 735 740 758 786 790 804 806 847 856 868 882 897 899 976 996 1012 1015-1016 "
    "1018 1020 1024 1044 1058 1094 1098 1107"
)
_MINI_VAL = "103 916"


@dataclass(frozen=True)
class Frame:
    """A sweep with its images.

    Attributes:
        token: Its name in the data set.
        scene: Name of the scene.
        sweep: File of the points.
        labels: File of the point labels, where there is one.
        cameras: The images, none where only points are asked for.
    """

    token: str
    scene: str
    sweep: Path
    labels: Path | None = None
    cameras: tuple[Camera, ...] = ()


@dataclass(frozen=True)
class NuScenes:
    """A folder in the layout of nuScenes. Tables are read when they are needed, row by row.

    Args:
        root: With ``samples/`` and a folder of tables.
        version: Name of that folder; default the only ``v1.0-*`` there is.
        channels: Cameras, in the order of their indices.

    Raises:
        InputError: A table is missing or damaged; the file is named.
    """

    root: Path
    version: str | None = None
    channels: tuple[str, ...] = CHANNELS
    _tables: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = sorted(p.name for p in self.root.glob("v1.0-*") if p.is_dir())
        version = self.version or (found[0] if len(found) == 1 else None)
        if version is None:
            what = (
                f"several versions, name one of {', '.join(found)}" if found else "no folder v1.0-*"
            )
            raise InputError(f"{self.root}: {what}")
        if version not in found:
            raise InputError(f"{self.root / version}: no such folder of tables")
        object.__setattr__(self, "version", version)
        object.__setattr__(self, "_tables", self.root / version)

    def scenes(self, split: str, every: int = 1) -> list[str]:
        """Names of a split's scenes in the order of the tables.

        Args:
            split: ``train``, ``val``, ``mini_train``, ``mini_val``, ``parametrize`` (train without
                ``verify``), ``verify``, ``all``, or one in the optional ``splits.json`` beside the
                tables.
            every: Keep the scenes whose count from 1 is a multiple of this: label fractions.

        Raises:
            InputError: No such split, or nothing left of it.
        """
        names = [row["name"] for row in self._rows("scene")]
        own = self._tables / "splits.json"
        chosen: Any = json.loads(own.read_text()) if own.exists() else {}
        if split in chosen:
            kept = [name for name in names if name in set(chosen[split])]
        else:
            kept = [name for name in names if _in_split(name, split, own, chosen)]
        kept = kept[every - 1 :: every]
        if not kept:
            raise InputError(f"{self._tables}: no scene of the split '{split}' (every {every})")
        return kept

    def frames(self, scenes: list[str], *, cameras: bool = True) -> list[Frame]:
        """Key frames of scenes, in order of scene and time.

        Args:
            scenes: Their names.
            cameras: Whether images are wanted too.

        Raises:
            InputError: A table or a row is missing.
        """
        order = {name: place for place, name in enumerate(scenes)}
        owner = {r["token"]: r["name"] for r in self._rows("scene") if r["name"] in order}
        samples = sorted(
            (order[owner[r["scene_token"]]], r["timestamp"], r["token"])
            for r in self._rows("sample")
            if r["scene_token"] in owner
        )
        data = self._sample_data
        labels = self._lidarseg
        found = []
        for place, _, token in samples:
            sensors = data.get(token, {})
            if "LIDAR_TOP" not in sensors:
                raise InputError(
                    f"{self._tables / 'sample_data.json'}: no LIDAR_TOP key frame of sample {token}"
                )
            lidar = sensors["LIDAR_TOP"]
            found.append(
                Frame(
                    token=lidar["token"],
                    scene=scenes[place],
                    sweep=self.root / lidar["filename"],
                    labels=labels.get(lidar["token"]),
                    cameras=self._cameras(sensors, token) if cameras else (),
                )
            )
        return found

    def _cameras(self, sensors: dict[str, dict[str, Any]], token: str) -> tuple[Camera, ...]:
        """The full chain: lidar → car then → world → car at the image's time → camera."""
        lidar = sensors["LIDAR_TOP"]
        to_world = self._pose("ego_pose", lidar) @ self._pose("calibrated_sensor", lidar)
        found = []
        for channel in self.channels:
            if channel not in sensors:
                raise InputError(
                    f"{self._tables / 'sample_data.json'}: no {channel} key frame of sample {token}"
                )
            row = sensors[channel]
            to_car = inverse(self._pose("ego_pose", row))
            to_camera = inverse(self._pose("calibrated_sensor", row))
            intrinsic = self._row("calibrated_sensor", row["calibrated_sensor_token"])
            found.append(
                Camera(
                    name=channel,
                    token=row["token"],
                    file=self.root / row["filename"],
                    from_lidar=to_camera @ to_car @ to_world,
                    projection=pinhole(intrinsic["camera_intrinsic"]),
                    size=(row["height"], row["width"]),
                )
            )
        return tuple(found)

    def _pose(self, table: str, row: dict[str, Any]) -> np.ndarray:
        found = self._row(table, row[f"{table}_token"])
        return transform(found["rotation"], found["translation"])

    def _row(self, table: str, token: str) -> dict[str, Any]:
        rows = self._calibrated if table == "calibrated_sensor" else self._ego_poses
        if token not in rows:
            raise InputError(f"{self._tables / table}.json: no row {token}")
        return rows[token]

    @cached_property
    def _calibrated(self) -> dict[str, dict[str, Any]]:
        return {row["token"]: row for row in self._rows("calibrated_sensor")}

    @cached_property
    def _ego_poses(self) -> dict[str, dict[str, Any]]:
        wanted = {r["ego_pose_token"] for s in self._sample_data.values() for r in s.values()}
        return {row["token"]: row for row in self._rows("ego_pose") if row["token"] in wanted}

    @cached_property
    def _sample_data(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Key frames by sample and channel; the other sweeps, most of the table, are not kept."""
        sensors = {row["token"]: row["channel"] for row in self._rows("sensor")}
        channel = {
            token: sensors.get(row["sensor_token"], "") for token, row in self._calibrated.items()
        }
        wanted = {"LIDAR_TOP", *self.channels}
        found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in self._rows("sample_data"):
            name = channel.get(row["calibrated_sensor_token"], "")
            if row["is_key_frame"] and name in wanted:
                found[row["sample_token"]][name] = row
        return found

    @cached_property
    def _lidarseg(self) -> dict[str, Path]:
        """Label files by token of the sweep; empty where the data set has none."""
        if not (self._tables / "lidarseg.json").exists():
            return {}
        rows = self._rows("lidarseg")
        return {row["sample_data_token"]: self.root / row["filename"] for row in rows}

    def _rows(self, table: str) -> Iterator[dict[str, Any]]:
        return read_rows(self._tables / f"{table}.json")


def read_rows(path: Path, block: int = 1 << 22) -> Iterator[dict[str, Any]]:
    """The records of a table one by one; a table of a gigabyte is never held as a whole.

    Args:
        path: A JSON list of objects.
        block: Characters read at a time.

    Raises:
        InputError: The file is missing, cut off, or no list of objects.
    """
    decoder, text, opened = json.JSONDecoder(), "", False
    try:
        file = path.open(encoding="utf-8")
    except OSError:
        raise InputError(f"{path}: no such table") from None
    with file:
        while True:
            more = file.read(block)
            text, position = text + more, 0
            while True:
                start = _skip(text, position, "[, \n\r\t" if opened else " \n\r\t")
                if not opened and start < len(text):
                    if text[start] != "[":
                        raise InputError(f"{path}: not a JSON list")
                    opened, position = True, start + 1
                    continue
                if start < len(text) and text[start] == "]":
                    return
                try:
                    row, position = decoder.raw_decode(text, start)
                except ValueError:
                    break
                if not isinstance(row, dict):
                    raise InputError(f"{path}: a record is no object")
                yield row
            text = text[position:]
            if not more:
                raise InputError(f"{path}: cut off or damaged")


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _in_split(name: str, split: str, own: Path, chosen: dict[str, Any]) -> bool:
    if split == "all":
        return True
    digits = name.rpartition("-")[2]
    number = int(digits) if digits.isdigit() else -1
    val, verify = number in _numbers(_VAL), number in _numbers(_VERIFY)
    rules = {
        "train": not val,
        "val": val,
        "verify": verify,
        "parametrize": not val and not verify,
        "mini_val": number in _numbers(_MINI_VAL),
        "mini_train": number not in _numbers(_MINI_VAL),
    }
    if split not in rules:
        names = ", ".join([*rules, "all", *chosen])
        raise InputError(f"{own}: unknown split '{split}'; there is {names}")
    return rules[split]


def _numbers(ranges: str) -> set[int]:
    found: set[int] = set()
    for part in ranges.split():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
