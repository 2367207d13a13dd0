"""Use of a trained network in a service: export with open batch and length, and latency."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.ctr.nets.inputs import ClickNetwork, Features, Layout
from cohobate.ctr.suan.network import SUAN


def dynamic_shapes(network: ClickNetwork) -> tuple[dict[int, Any], ...]:
    """Open dimensions of the inputs for export: the batch, and the length of the history."""
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    length = torch.export.Dim("length", min=1, max=network.length)
    shapes: list[dict[int, Any]] = [{0: batch} for _ in Features._fields]
    for name in ("history", "history_time"):
        shapes[Features._fields.index(name)][1] = length
    return tuple(shapes)


def export_program(network: ClickNetwork) -> torch.export.ExportedProgram:
    """Trace a network with ``torch.export``; batch and length stay open."""
    network = network.cpu().eval()
    example = network.layout.example(3)
    length = max(network.length - 1, 2)
    example = example._replace(
        # contiguous, or the tracer learns that the length is not the whole
        history=example.history[:, -length:].contiguous(),
        history_time=example.history_time[:, -length:].contiguous(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's notes on its own internals
        return torch.export.export(network, tuple(example), dynamic_shapes=dynamic_shapes(network))


def export_onnx(network: ClickNetwork, path: Path, tolerance: float = 1e-4) -> Path:
    """Write a network as ONNX and check it at other batch sizes and lengths than it was traced at.

    Args:
        network: the student.
        path: the file.
        tolerance: largest difference of a probability.

    Raises:
        InputError: ONNX Runtime's scores differ; nothing is written.
    """
    program = export_program(network)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with save_atomic(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
        assert onnx is not None
        onnx.save(temporary, external_data=False)
        for batch, length in ((1, network.length), (4, 1), (2, max(1, network.length // 3))):
            found = _difference(network, temporary, batch, length)
            if not found <= tolerance:
                raise InputError(
                    f"{path}: ONNX Runtime differs by {found:.2g} at batch {batch}, length "
                    f"{length} (allowed {tolerance:.2g}); nothing was written"
                )
    return path


def _difference(network: ClickNetwork, file: Path, batch: int, length: int) -> float:
    import onnxruntime

    x = network.layout.example(max(batch, 2))
    x = Features(*(t[:batch] for t in x))
    x = x._replace(history=x.history[:, -length:], history_time=x.history_time[:, -length:])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = onnx_feed(session, x)
    with torch.no_grad():
        expected = torch.sigmoid(network(*x)).numpy()
    got = 1 / (1 + np.exp(-session.run(None, feed)[0]))
    return float(np.abs(expected - got).max())


def onnx_feed(session: Any, features: Features) -> dict[str, np.ndarray]:
    """Inputs by name for an ONNX Runtime session; the graph has none for fields that are empty."""
    names = {i.name for i in session.get_inputs()}
    return {k: v.numpy() for k, v in features._asdict().items() if k in names}


@dataclass(frozen=True)
class Latency:
    """Time of a request in milliseconds.

    Args:
        p50: median.
        p99: 99th percentile.
    """

    p50: float
    p99: float


def measure(request: Callable[[], object], repeats: int, warmup: int = 5) -> Latency:
    """Time a request, warm.

    Args:
        request: what to time.
        repeats: number of timed calls.
        warmup: calls before them.
    """
    for _ in range(warmup):
        request()
    times = np.empty(repeats)
    for i in range(repeats):
        start = time.perf_counter()
        request()
        times[i] = time.perf_counter() - start
    return Latency(*(float(1e3 * np.percentile(times, q)) for q in (50, 99)))


def one_user(layout: Layout, candidates: int) -> tuple[Features, Tensor]:
    """A request: features of one user (batch 1) and candidate ids (1, m, C)."""
    user = Features(*(x[:1] for x in layout.example(2)))
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, layout.ids, (1, candidates, layout.candidate), generator=rng)
    return user, ids


@torch.inference_mode()
def score_one_by_one(network: nn.Module, user: Features, candidates: Tensor) -> Tensor:
    """Logits (1, m) by one forward pass for each candidate."""
    each = candidates.unbind(1)
    return torch.stack([network(*user._replace(candidate=c)) for c in each], 1)


@torch.inference_mode()
def score_repeated(network: nn.Module, user: Features, candidates: Tensor) -> Tensor:
    """Logits (1, m) by one batch in which the user is repeated for each candidate."""
    m = candidates.shape[1]
    rows = Features(*(x.expand(m, *x.shape[1:]) for x in user))
    return network(*rows._replace(candidate=candidates[0]))[None]


@torch.inference_mode()
def score_parallel(network: SUAN, user: Features, candidates: Tensor) -> Tensor:
    """Logits (1, m) by one encoding of the user and one pass over all candidates."""
    return network.score(network.encode_user(user), candidates, user.time)
