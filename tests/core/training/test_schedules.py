from __future__ import annotations

import pytest

from cohobate.core.training.schedules import Constant, Cosine, Linear, Step, as_schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(2.0), [2.0, 2.0, 2.0, 2.0, 2.0]),
        (Linear(0.0, 4.0), [0.0, 1.0, 2.0, 3.0, 4.0]),
        (Linear(1.0, 0.0, begin=0.25, until=0.75), [1.0, 1.0, 0.5, 0.0, 0.0]),
        (Linear(1.0, 0.0, begin=0.5, until=0.5), [1.0, 1.0, 0.0, 0.0, 0.0]),
        (Cosine(1.0, 0.0), [1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]),
        (Step([1.0, 0.5, 0.1], at=[0.5, 0.75]), [1.0, 1.0, 0.5, 0.1, 0.1]),
    ],
)
def test_values_over_progress(schedule, values) -> None:
    found = [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx(values)


def test_a_number_is_a_constant() -> None:
    assert as_schedule(3) == Constant(3.0)
    line = Linear(0, 1)
    assert as_schedule(line) is line


def test_steps_that_do_not_fit_are_refused() -> None:
    for values, at in (([1.0], [0.5]), ([1.0, 2.0, 3.0], [0.5, 0.2])):
        with pytest.raises(ValueError, match="Step needs"):
            Step(values, at)
