from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score
from torch import Tensor

from cohobate.ctr.metrics import (
    BINS,
    ClickMetrics,
    auc,
    binned_auc,
    calibrate,
    expected_calibration_error,
    gauc,
    log_loss,
    relative_improvement,
    reliability,
)


def data(n: int = 4000, decimals: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with many ties, labels, users."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=n).round(decimals)
    labels = (rng.random(n) < 1 / (1 + np.exp(1 - logits))).astype(np.float32)
    return torch.tensor(logits), torch.tensor(labels), torch.tensor(rng.integers(0, 300, n))


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_auc_equals_scikit_learn(decimals: int) -> None:
    scores, labels, _ = data(decimals=decimals)
    assert float(auc(scores, labels)) == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_nan_and_a_warning(label: int) -> None:
    scores, labels = torch.arange(4.0), torch.full((4,), float(label))
    for function in (
        lambda: auc(scores, labels),
        lambda: gauc(scores, labels, torch.zeros(4, dtype=torch.long)),
        lambda: binned_auc(torch.stack([1 - labels, labels])),
    ):
        with pytest.warns(UserWarning, match="one class"):
            assert torch.isnan(function())


def test_gauc_weighs_users_by_rows_and_skips_one_class_users() -> None:
    scores, labels, users = data()
    total = weight = 0.0
    skipped = 0
    for user in users.unique():
        mine = users == user
        if labels[mine].unique().numel() < 2:
            skipped += 1
            continue
        total += roc_auc_score(labels[mine], scores[mine]) * int(mine.sum())
        weight += int(mine.sum())
    assert skipped > 0
    assert float(gauc(scores, labels, users)) == pytest.approx(total / weight, abs=1e-9)


def test_streaming_auc_is_close_to_the_exact_one() -> None:
    scores, labels, users = data(20_000, decimals=6)
    streaming = ClickMetrics(exact=False)
    streaming.update(scores, labels, users)
    assert streaming.histogram.shape == (2, BINS)
    found = streaming.compute()["auc"]
    assert float(found) == pytest.approx(float(auc(scores, labels)), abs=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_results_do_not_depend_on_the_batch_size(exact: bool) -> None:
    scores, labels, users = data()
    results = []
    for size in (4000, 7):
        metric = ClickMetrics(exact=exact, sample_rate=0.2)
        for start in range(0, len(scores), size):
            metric.update(*(x[start : start + size] for x in (scores, labels, users)))
        results.append({k: float(v) for k, v in metric.compute().items()})
    assert results[0] == pytest.approx(results[1], abs=1e-12)


def test_log_loss_equals_scikit_learn() -> None:
    scores, labels, _ = data()
    p = torch.sigmoid(scores)
    assert float(log_loss(p, labels)) == pytest.approx(sklearn_log_loss(labels, p), abs=1e-9)
    assert float(log_loss(torch.tensor([0.0]), torch.tensor([1.0]))) == pytest.approx(
        -np.log(1e-7), rel=1e-6
    )


def test_sampling_correction_recovers_the_rate_and_keeps_the_order() -> None:
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    kept = 0.1
    seen = p / (p + (1 - p) * kept)  # share of clicks once negatives are sampled
    torch.testing.assert_close(calibrate(seen, kept), p)
    assert torch.equal(calibrate(p, kept).argsort(), p.argsort())


def test_calibration_error_is_zero_for_true_probabilities_and_grows_with_a_shift() -> None:
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=rng, dtype=torch.float64)
    y = torch.bernoulli(p, generator=rng)
    assert float(expected_calibration_error(p, y)) < 0.01
    shifted = expected_calibration_error((p + 0.1).clamp(max=1), y)
    assert float(shifted) == pytest.approx(0.095, abs=0.01)
    table = reliability(p, y)
    assert int(table[:, 0].sum()) == len(p)


def test_relative_improvement() -> None:
    assert relative_improvement(0.75, 0.70) == pytest.approx(0.25)


def _process(rank: int, port: int, scores: Tensor, labels: Tensor, users: Tensor, queue) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for exact in (True, False):
        metric = ClickMetrics(exact=exact)
        mine = slice(0, 1500) if rank == 0 else slice(1500, None)  # unequal parts
        metric.update(scores[mine], labels[mine], users[mine])
        results[exact] = {k: float(v) for k, v in metric.compute().items()}
    if rank == 0:
        queue.put(results)
    dist.destroy_process_group()


def test_two_processes_equal_one(free_port: int) -> None:
    scores, labels, users = data()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_process, args=(r, free_port, scores, labels, users, queue))
        for r in (0, 1)
    ]
    for process in processes:
        process.start()
    together = queue.get(timeout=120)
    for process in processes:
        process.join(60)
    for exact in (True, False):
        metric = ClickMetrics(exact=exact)
        metric.update(scores, labels, users)
        with warnings.catch_warnings():
            alone = {k: float(v) for k, v in metric.compute().items()}
        assert together[exact] == pytest.approx(alone, abs=1e-12)
