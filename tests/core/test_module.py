from __future__ import annotations

import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.testing import assert_teachers_frozen, build
from cohobate.core.training.schedules import Linear
from cohobate.toy.tiny import Tiny


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randint(0, 2, (6,))


def model(**kwargs) -> Tiny:
    torch.manual_seed(1)
    return Tiny(features=4, dropout=0.0, **kwargs)


def test_the_teacher_is_frozen() -> None:
    assert_teachers_frozen(model(), batch())


def test_the_sum_is_weighted_by_progress() -> None:
    tiny = model()
    with torch.no_grad():
        tiny.net[0].weight.add_(0.5)  # now student and teacher differ
    outputs = tiny.net(batch()[0])
    task = tiny.task_loss(outputs, batch())
    term = tiny.distill_loss(outputs, batch())["consistency"]
    assert term > 0
    terms = {"task": task, "consistency": term}
    torch.testing.assert_close(tiny.weigh(terms), task)  # progress 0, Linear(0, 1)
    tiny.weights = {"consistency": Linear(0.25, 1.0), "task": Linear(2.0, 1.0)}
    torch.testing.assert_close(tiny.weigh(terms), 2 * task + 0.25 * term)


def test_the_baseline_has_the_same_student_and_asks_no_teacher(monkeypatch) -> None:
    distilled, baseline = model(), model(distill=False)
    for a, b in zip(distilled.net.parameters(), baseline.net.parameters(), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(baseline, "distill_loss", None)  # would fail when called
    monkeypatch.setattr(baseline, "forward_train", lambda batch: baseline.net(batch[0]))
    torch.testing.assert_close(
        baseline.training_step(batch(), 0),
        torch.nn.functional.cross_entropy(baseline.net(batch()[0]), batch()[1]),
    )


def test_a_stage_needs_all_weights_of_the_student() -> None:
    tiny, other = model(), Tiny(features=4, width=8)
    tiny.load_stage(other.state_dict())
    assert torch.equal(tiny.net[0].weight, other.net[0].weight)
    with pytest.raises(InputError, match=r"no fitting weights for net\.0\.weight"):
        tiny.load_stage(Tiny(features=4, width=9).state_dict())


def test_a_recipe_links_what_the_model_takes_from_the_data() -> None:
    built = build("toy/tiny", "--seed_everything=5")
    assert built.model.features == built.datamodule.features == 4
    assert built.datamodule.seed == 5
    assert built.resolved()["model"]["init_args"]["features"] == 4
