"""Cost of the SUAN package, and MovieLens against another library's DIN on the same rows.

    python tests/benchmarks/ctr/bench_suan.py OUT.json
    python tests/benchmarks/ctr/bench_suan.py OUT.json --movielens DIR --peer PYTHON --seeds 3
    python tests/benchmarks/ctr/bench_suan.py OUT.json --permuted --seeds 3

``--peer`` is a Python with torch-rechub installed; it gets the same training and test rows as
arrays. ``--permuted`` trains the default recipe on permuted labels. What is trained is kept beside
OUT.json until all is done, so that a call that was stopped goes on. Times are CPU seconds of the
process at one thread, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTH, BATCH, DIM, HEAD, LR = 24, 512, 8, (128, 64), 3e-3


def best_of(function: Any, repeats: int = 5) -> float:
    """Least CPU seconds of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def sparse_attention() -> dict[str, Any]:
    """Gathered against masked sparse attention of a whole LightSUAN at N = 1024."""
    from cohobate.ctr.nets import Common, Layout
    from cohobate.ctr.suan import LightSUAN

    torch.manual_seed(0)
    layout = Layout(1000, 3, 5, 0, tuple(range(5)), length=1023)
    features = layout.example(2)
    common = Common(head=(16,), length=1023, embedding_std=0.3)
    network = LightSUAN(layout, common, blocks=2, window=16, dilation=16)
    seconds, outputs = {}, {}
    for name, gathered in (("masked", False), ("gathered", True)):
        network.gathered = gathered
        network.train()
        seconds[f"{name}, training step"] = best_of(lambda: network(*features).sum().backward())
        network.eval()
        with torch.no_grad():
            seconds[f"{name}, inference"] = best_of(lambda: network(*features))
            outputs[name] = network(*features)
    return {
        "setting": "N 1024, window 16, dilation 16, 2 blocks, D 40, batch 2",
        "cpu_seconds": seconds,
        "largest_difference": float((outputs["masked"] - outputs["gathered"]).abs().max()),
    }


def parallel_scoring() -> dict[str, Any]:
    """100 candidates of one user with 200 behaviours: at once and one by one."""
    from cohobate.ctr.nets import Common, Layout
    from cohobate.ctr.suan import SUAN, LightSUAN, serving

    torch.manual_seed(0)
    layout = Layout(100_000, 6, 14, 5, tuple(range(5)), length=200)
    common = Common(length=200, head=(1024, 512, 256))
    light = LightSUAN(layout, common, blocks=2).eval()
    suan = SUAN(layout, common, blocks=2).eval()
    user, ids = serving.one_user(layout, 100)
    ways = {
        "SUAN, one by one": lambda: serving.score_one_by_one(suan, user, ids),
        "SUAN, user repeated in a batch": lambda: serving.score_repeated(suan, user, ids),
        "LightSUAN, one by one": lambda: serving.score_one_by_one(light, user, ids),
        "LightSUAN, user repeated in a batch": lambda: serving.score_repeated(light, user, ids),
        "LightSUAN, parallel": lambda: serving.score_parallel(light, user, ids),
    }
    seconds = {name: best_of(way, 3) for name, way in ways.items()}
    gap = (ways["LightSUAN, one by one"]() - ways["LightSUAN, parallel"]()).abs().max()
    return {
        "setting": "100 candidates, L 200, 2 blocks, D 40, head 1024-512-256",
        "cpu_seconds": seconds,
        "largest_difference": float(gap),
    }


def kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """The value of ``key`` in a JSON file; made and written when it is not there."""
    content = json.loads(path.read_text()) if path.exists() else {}
    if key not in content:
        content[key] = make()
        path.write_text(json.dumps(content))
        print(key, content[key], flush=True)
    return content[key]


def movielens(root: Path, seeds: int, peer: str | None, partial: Path) -> dict[str, Any]:
    """Test AUC after one epoch and training rows a second, every network on the same split."""
    from cohobate.ctr.data import ClickData

    def data(seed: int) -> Any:
        return ClickData(root, length=LENGTH, batch_size=BATCH, shuffle=True, seed=seed)

    results: dict[str, Any] = {}
    for name in ("MLP", "DIN", "LightSUAN, 1 block", "SUAN, 1 block", "distilled LightSUAN"):
        results[name] = [
            kept(partial, f"{name} {s}", lambda n=name, s=s: _train(n, data(s), s))
            for s in range(seeds)
        ]
    if peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            arrays = Path(folder) / "rows.npz"
            _write_arrays(data(0), arrays)
            for s in range(seeds):
                found = kept(partial, f"peer {s}", lambda s=s: _ask_peer(peer, arrays, s))
                for name, run in found.items():
                    results.setdefault(name, []).append(run)
    summary = {
        name: {k: float(np.mean([run[k] for run in found])) for k in ("auc", "rows_per_second")}
        for name, found in results.items()
    }
    return {
        "setting": f"L {LENGTH}, batch {BATCH}, d {DIM}, head {HEAD}, Adam {LR}, one epoch of the "
        "network (the teacher of the distilled one: one more before), one thread",
        "data": data(0).describe(),
        "mean": summary,
        "runs": results,
    }


def _ask_peer(peer: str, arrays: Path, seed: int) -> dict[str, Any]:
    command = [peer, __file__, "--run-peer", str(arrays), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _train(name: str, data: Any, seed: int) -> dict[str, float]:
    """Train through Lightning; returns test AUC and rows a CPU second of the training loop."""
    import lightning.pytorch as pl

    from cohobate.ctr.nets import DIN, Common, MeanMLP
    from cohobate.ctr.suan import SUAN, DistilSUAN, LightSUAN

    def light(layout: Any, common: Any) -> Any:
        return LightSUAN(layout, common, blocks=1, window=8, dilation=4)

    students = {
        "MLP": MeanMLP,
        "DIN": lambda la, c: DIN(la, c, attention=(36,)),
        "SUAN, 1 block": SUAN,
    }
    pl.seed_everything(seed, verbose=False)
    model = DistilSUAN(
        data.layout,
        students.get(name, light),
        lambda la, c: SUAN(la, c, blocks=2),
        common=Common(dim=DIM, length=LENGTH, head=HEAD),
        lr=LR,
        distill=name.startswith("distilled"),
    )
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    seconds = time.process_time() - start
    rows = data.rows("train").rows * trainer.current_epoch
    auc = trainer.test(model, datamodule=data, verbose=False)[0]["test/auc"]
    return {"auc": float(auc), "rows_per_second": rows / seconds}


def _write_arrays(data: Any, path: Path) -> None:
    """Training (in order) and test rows as arrays; ids from 1 in each field, 0 is padding."""
    arrays: dict[str, np.ndarray] = {}
    fields = data.schema.fields
    for split in ("train", "test"):
        rows = data.rows(split)
        batches = [rows[i] for i in range(len(rows))]
        history = torch.zeros(rows.rows, LENGTH, len(data.schema.history), dtype=torch.long)
        start = 0
        for b in batches:
            h = b.features.history
            history[start : start + len(h), LENGTH - h.shape[1] :] = h
            start += len(h)
        for i, name in enumerate(data.schema.history.values()):
            own = history[..., i]
            arrays[f"{split}/hist_{name}"] = torch.where(own > 0, own - fields[name].start + 1, 0)
        for part, names in (("profile", data.schema.profile), ("candidate", data.schema.candidate)):
            ids = torch.cat([getattr(b.features, part) for b in batches])
            for i, name in enumerate(names):
                arrays[f"{split}/{name}"] = ids[:, i] - fields[name].start + 1
        arrays[f"{split}/label"] = torch.cat([b.label for b in batches])
    arrays |= {f"size/{name}": np.array(v.size + 2) for name, v in fields.items()}
    np.savez(path, **{k: np.asarray(v) for k, v in arrays.items()})


def run_peer(path: str, seed: int) -> None:
    """In the peer's Python: torch-rechub's DIN with its own loader, and with ready batches."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import DIN
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    torch.set_num_threads(1)
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files}
    size = {k[5:]: int(v) for k, v in arrays.items() if k.startswith("size/")}
    columns = ("user_id", "movie", "genre", "release", "hist_movie", "hist_genre", "hist_release",
               "hist_rating")  # fmt: skip
    x, y = (
        ({k: arrays[f"{s}/{k}"] for k in columns} for s in ("train", "test")),
        {s: arrays[f"{s}/label"] for s in ("train", "test")},
    )
    train, test = x
    results = {}
    for kind in ("own loader", "ready batches"):
        torch.manual_seed(seed)
        target = [SparseFeature(n, size[n], DIM) for n in ("movie", "genre", "release")]
        history = [
            SequenceFeature(f"hist_{f.name}", f.vocab_size, DIM, pooling="concat",
                            shared_with=f.name, padding_idx=0)
            for f in target
        ]  # fmt: skip
        others = [
            SparseFeature("user_id", size["user_id"], DIM),
            SequenceFeature("hist_rating", size["rating"], DIM, pooling="mean", padding_idx=0),
        ]
        model = DIN(others, history, target, {"dims": list(HEAD)}, {"dims": [36]})
        folder = tempfile.mkdtemp()
        trainer = CTRTrainer(model, optimizer_params={"lr": LR}, n_epoch=1, model_path=folder)
        if kind == "own loader":
            loader, _, _ = DataGenerator(train, y["train"]).generate_dataloader(
                batch_size=BATCH, split_ratio=[1.0, 0.0]
            )
        else:
            order = np.random.default_rng(seed).permutation(len(y["train"]))
            tensors = {k: torch.tensor(v[order]) for k, v in train.items()}
            labels = torch.tensor(y["train"][order])
            loader = [
                ({k: v[i : i + BATCH] for k, v in tensors.items()}, labels[i : i + BATCH])
                for i in range(0, len(order), BATCH)
            ]
        start = time.process_time()
        trainer.train_one_epoch(loader)
        seconds = time.process_time() - start
        batches = [
            ({k: torch.tensor(v[i : i + 4096]) for k, v in test.items()},
             torch.tensor(y["test"][i : i + 4096]))
            for i in range(0, len(y["test"]), 4096)
        ]  # fmt: skip
        auc = float(trainer.evaluate(model, batches))
        results[f"torch-rechub DIN, {kind}"] = {
            "auc": auc, "rows_per_second": len(y["train"]) / seconds,
        }  # fmt: skip
    print(json.dumps(results))


def permuted(seeds: int, partial: Path) -> dict[str, Any]:
    """Test AUC of student and teacher of the default recipe when labels are permuted."""
    from cohobate.core import catalog, runs

    options = ["--data.permute_labels=true", "--trainer.enable_progress_bar=false"]

    def run(seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            words = [*options, f"--seed_everything={seed}"]
            info = runs.fit(catalog.find("ctr/suan"), words, out=Path(folder) / "run")[0].info
        return {
            "seed": seed,
            "distilled LightSUAN, test AUC": round(info["test"]["test/auc"], 4),
            "teacher, test AUC": round(info["test"]["test/teacher_auc"], 4),
            "data": f"{info['data']}, labels of training and validation permuted",
        }

    return {"rows": [kept(partial, f"seed {s}", lambda s=s: run(s)) for s in range(seeds)]}


def rows_of_parts(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each timed way: its CPU seconds, and how many times quicker than the first."""
    rows = []
    for part in parts:
        first = next(iter(part["cpu_seconds"].values()))
        rows += [
            {
                "setting": part["setting"],
                "way": way,
                "CPU seconds": round(seconds, 4),
                "times quicker than the first": round(first / seconds, 2),
                "largest difference": f"{part['largest_difference']:.1e}",
            }
            for way, seconds in part["cpu_seconds"].items()
        ]
    return rows


def main() -> None:
    """Run what was asked for and write it in the form that the documentation reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--movielens", type=Path)
    parser.add_argument("--peer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--permuted", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    command = "python tests/benchmarks/ctr/bench_suan.py " + asked.out.name
    details: dict[str, Any] = {}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    partial = asked.out.with_suffix(".partial")
    if asked.permuted:
        command += f" --permuted --seeds {asked.seeds}"
        details = permuted(asked.seeds, partial)
    elif asked.movielens is not None:
        command += f" --movielens {asked.movielens.name} --peer PYTHON --seeds {asked.seeds}"
        details = movielens(asked.movielens, asked.seeds, asked.peer, partial)
        details["rows"] = [
            {"network": name, "test AUC": round(found["auc"], 4),
             "lowest": round(min(run["auc"] for run in details["runs"][name]), 4),
             "highest": round(max(run["auc"] for run in details["runs"][name]), 4),
             "training rows per CPU second": round(found["rows_per_second"])}
            for name, found in details["mean"].items()
        ]  # fmt: skip
    else:
        details["rows"] = rows_of_parts(sparse_attention(), parallel_scoring())
    content = {
        "command": command,
        "machine": f"{platform.machine()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **details,
    }
    asked.out.write_text(json.dumps(content, indent=2) + "\n")
    partial.unlink(missing_ok=True)
    print(json.dumps(details["rows"], indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-peer"]:
        run_peer(sys.argv[2], int(sys.argv[3]))
    else:
        main()
