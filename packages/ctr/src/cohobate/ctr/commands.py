"""Commands of ``cohobate-ctr`` beside those of every package."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic


def _write_json(path: Path, content: Any) -> None:
    with save_atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def schema(file: Path, out: Path | None = None, min_count: int = 0) -> None:
    """Draft the schema of a click log.

    Args:
        file: Parquet file, or a folder of shards.
        out: Folder for schema.yaml; printed when not given.
        min_count: Make vocabularies of the ids seen so often before validation; 0 hashes ids.
    """
    from cohobate.ctr.data.draft import draft_schema

    if not file.exists():
        raise InputError(f"{file}: no such file or folder")
    content = draft_schema(file, min_count=min_count, out=out)
    text = yaml.safe_dump(content, sort_keys=False)
    if out is None:
        print(text, end="")
        return
    target = out / "schema.yaml"
    if target.exists():
        raise InputError(f"{target}: exists already")
    with save_atomic(target) as temporary:
        temporary.write_text("# A draft: check the roles, the split and the sizes.\n" + text)
    print(target)


def generate(
    out: Path,
    rows: tuple[int, int, int] = (20_000, 5_000, 10_000),
    length: int = 16,
    seed: int = 0,
) -> None:
    """Write generated clicks (SYNTHETIC) as parquet shards with a schema.

    Args:
        out: Folder; must not exist.
        rows: Rows of train, validation and test.
        length: Most behaviours of a history.
        seed: Of the users.
    """
    from cohobate.ctr.data.generator import write_generated

    if out.exists():
        raise InputError(f"{out}: exists already")
    write_generated(out, rows, length=length, seed=seed)
    print(out)


def latency(
    candidates: int = 100,
    length: int = 200,
    blocks: int = 2,
    dim: int = 8,
    head: tuple[int, ...] = (1024, 512, 256),
    window: int = 16,
    dilation: int = 4,
    repeats: int = 50,
    threads: int = 1,
    json: Path | None = None,
) -> None:
    """Time one user with many candidates: SUAN and LightSUAN, one by one and at once.

    Args:
        candidates: Candidates of a request (m).
        length: Behaviours of the user (L).
        blocks: Blocks of both networks.
        dim: Embedding width.
        head: Hidden widths of the head.
        window: Newest keys a token of LightSUAN sees.
        dilation: And every so many earlier ones.
        repeats: Timed requests.
        threads: Threads of PyTorch.
        json: File for the numbers.
    """
    from cohobate.ctr.nets.inputs import Common, Layout
    from cohobate.ctr.suan import serving
    from cohobate.ctr.suan.network import SUAN, LightSUAN

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layout = Layout(100_000, 6, 14, 5, tuple(range(5)), length=length)
    common = Common(dim=dim, length=length, head=head)
    suan = SUAN(layout, common, blocks=blocks).eval()
    light = LightSUAN(layout, common, blocks=blocks, window=window, dilation=dilation).eval()
    user, ids = serving.one_user(layout, candidates)
    few = max(3, repeats // 10)
    ways: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
        "SUAN, one by one": (lambda: serving.score_one_by_one(suan, user, ids), few),
        "SUAN, user repeated in a batch": (lambda: serving.score_repeated(suan, user, ids), few),
        "LightSUAN, one by one": (lambda: serving.score_one_by_one(light, user, ids), few),
        "LightSUAN, user repeated in a batch": (
            lambda: serving.score_repeated(light, user, ids),
            few,
        ),
        "LightSUAN, parallel": (lambda: serving.score_parallel(light, user, ids), repeats),
    }
    gap = float((ways["LightSUAN, one by one"][0]() - ways["LightSUAN, parallel"][0]()).abs().max())
    results = {name: asdict(serving.measure(f, n, warmup=2)) for name, (f, n) in ways.items()}
    torch.set_num_threads(before)
    print(f"1 user, {candidates} candidates, L {length}, {blocks} blocks, {threads} thread(s)")
    for name, times in results.items():
        print(f"{name:<38} p50 {times['p50']:9.2f} ms   p99 {times['p99']:9.2f} ms")
    print(f"largest difference of parallel and one by one: {gap:.1e}")
    if json is not None:
        settings = {"candidates": candidates, "length": length, "blocks": blocks, "dim": dim,
                    "window": window, "dilation": dilation, "threads": threads}  # fmt: skip
        _write_json(json, {"settings": settings, "milliseconds": results, "largest_gap": gap})


def scaling(
    out: Path,
    root: Path | None = None,
    grades: tuple[str, ...] = ("1x8x4", "2x16x8", "4x32x8"),
    rows: tuple[int, ...] = (10_000, 20_000, 40_000, 80_000),
    seeds: int = 1,
    first_seed: int = 0,
    epochs: int = 2,
    student: Literal["suan", "lightsuan"] = "suan",
    json: Path | None = None,
) -> None:
    """Train grades on growing data: table, power-law fit with its error, and plot.

    Args:
        out: Folder of the runs; finished ones are not repeated.
        root: Data; default generated (SYNTHETIC), with its known best AUC as the limit.
        grades: BLOCKSxLENGTHxWIDTH each, or g1 … g5; rising.
        rows: Training rows, rising.
        seeds: Seeds to average over.
        first_seed: Seeds count from here.
        epochs: Passes over the data.
        student: The network that grows.
        json: Copy of the result, with the plot beside it.
    """
    from cohobate.ctr.suan.scaling_run import run_scaling

    result = run_scaling(
        out, root, grades, rows, range(first_seed, first_seed + seeds), epochs, student
    )
    print(result["data"])
    print("| grade | dense parameters | " + " | ".join(f"{n} rows" for n in rows) + " |")
    print("| --- | --- |" + " --- |" * len(rows))
    for grade in grades:
        cells = " | ".join(f"{v:.4f}" for v in result["auc"][grade])
        print(f"| {grade} | {result['dense_parameters'][grade]} | {cells} |")
    for name, law in {**result["by_rows"], **result["by_parameters"]}.items():
        last = law["last_error"]
        error = "" if last is None else f", last point predicted with error {last:+.4f}"
        print(
            f"{name}: a {law['a']:.4f} b {law['b']:.4g} e {law['e']:.3f} R2 {law['r2']:.3f}{error}"
        )
    command = f"cohobate-ctr scaling OUT --grades [{','.join(grades)}] --rows {list(rows)} "
    command += f"--seeds {seeds} --first_seed {first_seed} --epochs {epochs} --student {student}"
    result = {"command": command, **result}
    _write_json(out / "scaling.json", result)
    if json is not None:
        _write_json(json, result)
        with save_atomic(json.with_suffix(".png")) as temporary:
            temporary.write_bytes((out / "scaling.png").read_bytes())
    print(out / "scaling.png")


COMMANDS: tuple[Callable[..., None], ...] = (schema, generate, latency, scaling)
