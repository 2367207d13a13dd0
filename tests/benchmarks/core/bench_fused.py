"""Time and memory of a linear layer with a divergence: ours, plain PyTorch, and other libraries.

    python tests/benchmarks/core/bench_fused.py [--out docs/results/bench-fused.json]

Every variant runs in a process of its own, in turn with the four bare matrix products that no
implementation can do without, and time is given as a multiple of theirs. Seconds are those the
process got, so that other work on the machine counts little; the best of the repetitions is taken.
Memory is the high-water mark during one call and its backward pass, beyond the operands.
Liger-Kernel and TRL are measured where they are installed; without a GPU only the CPU's rows are.
What does not run says why in its row. ``--only PATTERN`` measures some variants anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cohobate.core.fused import linear_divergence
from cohobate.core.testing.bench import write_rows

ROOT = Path(__file__).parents[3]
SIZES = {  # tokens, width, classes, type
    "cpu": [(1024, 512, 32000, "float32")],
    "cuda": [(8192, 4096, 128256, "bfloat16"), (1024, 4096, 128256, "bfloat16")],
}
CHUNK = {"cpu": 256, "cuda": 512}  # tokens, for the matrix products alone
SIZE = "tokens x width x classes"
Operands = tuple[Tensor, Tensor, Tensor, Tensor]
Size = tuple[int, int, int, str]
Row = dict[str, Any]


def operands(tokens: int, width: int, classes: int, dtype: str, device: str) -> Operands:
    """Hidden states and heads of student and teacher."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, scale: float) -> Tensor:
        numbers = torch.randn(rows, width, generator=generator) * scale
        return numbers.to(device, getattr(torch, dtype))

    x, w, x_t, w_t = (draw(*shape) for shape in ((tokens, 1), (classes, 0.05)) * 2)
    return x.requires_grad_(), w.requires_grad_(), x_t, w_t


def products(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor) -> None:
    """The four matrix products, chunk by chunk, with no work on the logits."""
    chunk = CHUNK[x.device.type]
    with torch.no_grad():
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        z, z_t = (x.new_empty(chunk, len(w)) for _ in range(2))
        for i in range(0, len(x), chunk):
            rows = x[i : i + chunk]
            torch.mm(rows, w.t(), out=z[: len(rows)])
            torch.mm(x_t[i : i + chunk], w_t.t(), out=z_t[: len(rows)])
            torch.mm(z[: len(rows)], w, out=dx[i : i + chunk])
            dw.addmm_(z[: len(rows)].t(), rows, beta=0 if i == 0 else 1)


def naive(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor) -> Tensor:
    """All logits of both models, with nothing that a temperature of one leaves out."""
    log_q, log_p = (x @ w.t()).log_softmax(-1), (x_t @ w_t.t()).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def tempered(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor, tau: float = 1.0) -> Tensor:
    """What everyone writes first: both logits over a temperature, and the teacher's softmax."""
    log_q, p = (x @ w.t() / tau).log_softmax(-1), (x_t @ w_t.t() / tau).softmax(-1)
    return F.kl_div(log_q, p, reduction="batchmean") * tau**2


def torch_linear_cross_entropy(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor) -> Tensor:
    """PyTorch's own chunks, with the teacher's probabilities of all tokens as the target."""
    p = (x_t @ w_t.t()).softmax(-1)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, p, options=options)


def liger(compiled: bool, chunk: int) -> Callable[..., Tensor]:
    """Liger-Kernel's chunked loss; its β = 0 is the forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=chunk
    )

    def call(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return loss(x, w, x_t, w_t, labels)

    return call


def trl(beta: float, tokens: int | None = None) -> Callable[..., Tensor]:
    """TRL's streaming function, with its own tile or with fewer tokens in it."""
    from trl.kernels import chunked_divergence

    if tokens is not None:
        chunked_divergence.TOKEN_CHUNK_SIZE = tokens

    def call(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor) -> Tensor:
        losses, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
            x, w, None, x_t, w_t, None, beta
        )
        return losses.mean()

    return call


def ours(**options: Any) -> Callable[..., Tensor]:
    """This library's."""

    def call(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor) -> Tensor:
        changed = {name: value(x) if callable(value) else value for name, value in options.items()}
        return linear_divergence(x, w, x_t, w_t, **changed).mean()

    return call


def half(x: Tensor) -> Tensor:
    """Every second token."""
    return torch.arange(len(x), device=x.device) % 2 == 0


def classes_of(x: Tensor) -> Tensor:
    """A label for each token."""
    return torch.arange(len(x), device=x.device)


VARIANTS: dict[str, tuple[str, Callable[[], Callable[..., Any]]]] = {
    "four matrix products alone": ("none", lambda: products),
    "naive": ("forward KL", lambda: naive),
    "naive, with a temperature": ("forward KL", lambda: tempered),
    "naive, torch.compile": ("forward KL", lambda: torch.compile(naive)),
    "torch linear_cross_entropy": ("forward KL", lambda: torch_linear_cross_entropy),
    "Liger-Kernel, chunks of 1024 (its default)": ("forward KL", lambda: liger(False, 1024)),
    "Liger-Kernel, chunks of 1024, compiled": ("forward KL", lambda: liger(True, 1024)),
    "Liger-Kernel, chunks of 128": ("forward KL", lambda: liger(False, 128)),
    "TRL, its default tile": ("forward KL", lambda: trl(0.0)),
    "TRL, 128 tokens in a tile": ("forward KL", lambda: trl(0.0, 128)),
    "TRL, its default tile, JSD": ("JSD", lambda: trl(0.5)),
    "linear_divergence": ("forward KL", ours),
    "linear_divergence, JSD": ("JSD", lambda: ours(kind="jensen_shannon")),
    "linear_divergence, reverse KL": ("reverse KL", lambda: ours(kind="reverse_kl")),
    "linear_divergence, with cross-entropy": ("KL + CE", lambda: ours(labels=classes_of)),
    "linear_divergence, half the tokens": ("forward KL", lambda: ours(weight=half)),
    "linear_divergence, loss of each token": ("forward KL", lambda: ours(reduction="none")),
    "linear_divergence, 2 MiB of logits": ("forward KL", lambda: ours(budget=2 << 20)),
}


def seconds(device: str) -> float:
    """Seconds this process got; on a GPU, seconds since it was idle."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Peak:
    """The high-water mark of memory since it was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self.status("VmRSS")

    def mib(self) -> float:
        """MiB beyond what there was before."""
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else self.status("VmHWM")
        return (now - self.before) / 2**20

    @staticmethod
    def status(field: str) -> int:
        """A field of this process's status, in bytes."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise KeyError(field)


def measure(name: str, size: Size, device: str, repeat: int) -> Row:
    """One variant beside the bare products, in this process."""
    torch.set_num_threads(1)
    call = VARIANTS[name][1]()
    tensors = operands(*size, device)
    _, width, _, dtype = size

    def step(x: Tensor, w: Tensor, *teacher: Tensor) -> float | None:
        x.grad = w.grad = None
        loss = call(x, w, *teacher)
        if loss is None:
            return None
        loss.backward()
        return float(loss.detach())

    if "compile" in name:  # for the sizes that are measured
        step(*tensors)
    else:  # what libraries load and allocate once
        step(*operands(128, width, 256, dtype, device))
    peak = Peak(device)
    loss = step(*tensors)
    mib = peak.mib()
    best = {"floor": float("inf"), "call": float("inf")}
    for _ in range(repeat):
        for part, function in (("floor", products), ("call", step)):
            began = seconds(device)
            function(*tensors)
            best[part] = min(best[part], seconds(device) - began)
    return {"loss": loss, "mib": mib} | best


def measured(device: str, size: Size, repeat: int, only: str) -> Iterator[Row]:
    """Rows of one size; of what cannot be run, why."""
    tokens, width, classes, dtype = size
    shown = f"{tokens} x {width} x {classes} {dtype}"
    names = [name for name in VARIANTS if re.search(only, name)]
    for name in tqdm(names, desc=f"{device} {shown}"):
        row: Row = {
            "implementation": name,
            "divergence": VARIANTS[name][0],
            SIZE: shown,
            "device": device,
        }
        yield row | _outcome(name, device, size, repeat)


def _outcome(name: str, device: str, size: Size, repeat: int) -> Row:
    """What a process of its own measured, or why it did not."""
    for part, library in (("Liger", "liger-kernel"), ("TRL", "trl")):
        if part in name and not installed(library):
            return {"note": f"{library} is not installed"}
    child = subprocess.run(
        [sys.executable, __file__, "--child", name, device, json.dumps(size), str(repeat)],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        return {"note": f"does not run: {child.stderr.strip().splitlines()[-1][:200]}"}
    found = json.loads(child.stdout.splitlines()[-1])
    return {
        "seconds": round(found["call"], 3),
        "time / matrix products": round(found["call"] / found["floor"], 3),
        "peak MiB": round(found["mib"], 1),
        "loss": "" if found["loss"] is None else round(found["loss"], 5),
    }


def ratios(rows: list[Row]) -> None:
    """Memory against the naive version, and time against our forward KL, at the same size."""
    for row in rows:
        beside = {
            other["implementation"]: other
            for other in rows
            if all(other[key] == row[key] for key in ("device", SIZE))
        }
        naive, own = beside.get("naive", {}), beside.get("linear_divergence", {})
        if "peak MiB" in row and "peak MiB" in naive:
            row["peak / naive"] = round(row["peak MiB"] / naive["peak MiB"], 3)
        if "seconds" in row and "seconds" in own:
            ours = "time / matrix products"
            row["time / linear_divergence"] = round(row[ours] / own[ours], 3)


def installed(name: str) -> bool:
    """Whether a distribution is there."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def merged(rows: list[Row], new: Row) -> list[Row]:
    """Rows with one measured anew in the place of the old, in the order of the variants."""
    keys = ("device", SIZE, "implementation")
    kept = [row for row in rows if any(row[key] != new[key] for key in keys)]
    order = list(VARIANTS)
    return sorted([*kept, new], key=lambda row: (row[SIZE], order.index(row["implementation"])))


def draw(rows: list[Row], path: Path) -> None:
    """Time against memory, one point for each implementation."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shown = [row for row in rows if row[SIZE] == rows[0][SIZE] and "seconds" in row]
    if not shown:
        return
    for row in shown:
        mine = row["implementation"].startswith("linear_divergence")
        point = (row["peak MiB"], row["time / matrix products"])
        axes.scatter(*point, color="C0" if mine else "C7", zorder=3)
        axes.annotate(row["implementation"], point, (4, 3), textcoords="offset points", size=7)
    axes.margins(x=0.2)
    axes.set(
        xscale="log",
        xlabel="peak memory beyond the operands, MiB",
        ylabel="time / four bare matrix products",
        title=f"{shown[0][SIZE]}, {shown[0]['device']}",
    )
    axes.axhline(1, color="k", linewidth=0.5)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every variant and write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-fused.json")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="measure anew what matches this pattern")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, device, size, repeat = asked.child
        print(json.dumps(measure(name, tuple(json.loads(size)), device, int(repeat))))
        return
    rows: list[Row] = []
    if asked.only and asked.out.exists():
        rows = json.loads(asked.out.read_text())["rows"]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for size in SIZES[device]:
            for row in measured(device, size, asked.repeat, asked.only):
                rows = merged(rows, row)
                write(rows, asked.out)
                print(row)


def write(rows: list[Row], path: Path) -> None:
    """The JSON and the picture."""
    ratios(rows)
    packages = ("torch", "cohobate-core", "liger-kernel", "trl")
    write_rows(path, "tests/benchmarks/core/bench_fused.py", packages, rows)
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
