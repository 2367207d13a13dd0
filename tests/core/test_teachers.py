from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cohobate.core.errors import InputError
from cohobate.core.teachers import (
    EMATeacher,
    FrozenTeacher,
    PeerSet,
    SnapshotTeacher,
    Teacher,
    TeacherSet,
    deep_to_shallow,
    load_teacher,
    weights_hash,
)
from cohobate.core.training.schedules import Linear


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


class Owner(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.student = network(1)
        self.teacher = teacher


def test_a_teacher_is_in_neither_parameters_nor_state() -> None:
    owner = Owner(FrozenTeacher(network()))
    assert all(name.startswith("student.") for name in owner.state_dict())
    assert {id(p) for p in owner.parameters()} == {id(p) for p in owner.student.parameters()}


def test_a_teacher_moves_with_its_owner_and_stays_in_eval() -> None:
    held = network()
    owner = Owner(FrozenTeacher(held)).train().double()
    assert held[0].weight.dtype == torch.float64
    assert not any(module.training for module in held.modules())
    assert owner.student.training


def test_a_frozen_teacher_builds_a_graph_to_its_inputs_only_when_asked() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert not FrozenTeacher(network())(x).requires_grad
    held = network()
    FrozenTeacher(held, grad_input=True)(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in held.parameters())


def test_batch_statistics_leave_the_running_ones_alone() -> None:
    held = network()
    mean = held[1].running_mean.clone()
    teacher = FrozenTeacher(held, batch_norm="batch")
    x = 5 + torch.randn(64, 3)
    out = held[:2](x)
    assert torch.equal(held[1].running_mean, mean)
    torch.testing.assert_close(out.mean(0), held[1].bias, atol=1e-5, rtol=0)
    assert not torch.equal(teacher(x), FrozenTeacher(network())(x))


def test_ema_equals_its_definition_in_float64() -> None:
    student = network().double()
    teacher = EMATeacher(student, decay=0.9)
    expected = [p.clone() for p in student.parameters()]
    for step in range(5):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        student[1].running_mean.fill_(step)
        teacher.after_step(0.0)
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, student.parameters(), strict=True)]
    for own, want in zip(teacher.networks[0].parameters(), expected, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-12, atol=1e-12)
    assert teacher.networks[0][1].running_mean[0] == 4


def test_ema_keeps_several_dtypes_and_follows_a_schedule() -> None:
    student = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).half()])
    teacher = EMATeacher(student, decay=Linear(1.0, 0.0))
    before = [p.clone() for p in teacher.networks[0].parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    teacher.after_step(0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(before, teacher.networks[0].parameters(), strict=True)
    )
    teacher.after_step(1.0)
    for a, b in zip(teacher.networks[0].parameters(), student.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def fill(student: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_a_snapshot_is_the_student_as_it_was(every: str) -> None:
    student = nn.Linear(1, 1)
    teacher = SnapshotTeacher(student, every=every)
    follow = teacher.after_step if every == "step" else teacher.after_epoch
    other = teacher.after_epoch if every == "step" else teacher.after_step
    fill(student, 2.0)
    follow(0.0)
    fill(student, 3.0)
    other(0.0)
    assert teacher(torch.ones(1, 1)).item() == 4.0


def test_snapshots_vote_and_resume() -> None:
    student = nn.Linear(1, 1)
    teacher = SnapshotTeacher(student, keep=2)
    for value in (1.0, 2.0, 3.0):
        fill(student, value)
        teacher.after_epoch(0.0)
    assert teacher(torch.ones(1, 1)).item() == 5.0  # snapshots 2 and 3 answer 4 and 6
    resumed = SnapshotTeacher(nn.Linear(1, 1), keep=2)
    resumed.load_changing_state(teacher.changing_state())
    assert resumed(torch.ones(1, 1)).item() == 5.0


def test_the_first_of_several_snapshots_is_not_averaged_with_the_start() -> None:
    student = nn.Linear(1, 1)
    fill(student, 100.0)
    teacher = SnapshotTeacher(student, keep=3)
    fill(student, 1.0)
    teacher.after_epoch(0.0)
    assert teacher(torch.ones(1, 1)).item() == 2.0


def test_a_set_averages_logits_or_probabilities() -> None:
    nets = {"a": network(1), "b": network(2)}
    members = {name: FrozenTeacher(net) for name, net in nets.items()}
    x = torch.randn(5, 3)
    a, b = (FrozenTeacher(net)(x) for net in nets.values())
    mean = TeacherSet(members, weights={"a": 3, "b": 1})(x)
    torch.testing.assert_close(mean, 0.75 * a + 0.25 * b)
    soft = TeacherSet(members, combine="probabilities")(x)
    torch.testing.assert_close(soft.exp(), (a.softmax(1) + b.softmax(1)) / 2)
    assert torch.equal(TeacherSet(members).ask("b", x), b)
    with pytest.raises(InputError, match="unknown teacher 'c'"):
        TeacherSet(members).ask("c", x)
    with pytest.raises(ValueError, match="weights"):
        TeacherSet(members, weights={"a": 1})


def test_peers_train_and_teach_each_other() -> None:
    peers = PeerSet([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    outputs = peers(torch.ones(1, 2))
    others = PeerSet.others(outputs, 1)
    assert [o.requires_grad for o in others] == [False, False]
    assert torch.equal(others[1], outputs[2])
    assert len(list(peers.parameters())) == 6
    with pytest.raises(ValueError, match="two peers"):
        PeerSet([nn.Linear(1, 1)])


def test_deep_to_shallow_detaches_only_when_asked() -> None:
    stages = [torch.ones(1, requires_grad=True) for _ in range(3)]
    for detach in (True, False):
        pairs = deep_to_shallow(stages, teacher=-1, detach=detach)
        assert [s is stages[i] for i, (s, _) in enumerate(pairs)] == [True, True]
        assert all(t.requires_grad is not detach for _, t in pairs)


def test_loading_a_teacher_renames_checks_and_freezes(tmp_path: Path) -> None:
    saved = network(5)
    path = tmp_path / "teacher.safetensors"
    save_file({f"module.{k}": v for k, v in saved.state_dict().items()}, path)
    teacher = load_teacher(network(6), path, key_map={"module.": ""})
    assert weights_hash(teacher) == weights_hash(saved)
    assert weights_hash(network(6)) != weights_hash(saved)
    with pytest.raises(InputError, match=r"teacher\.safetensors: no weights for 0\.weight"):
        load_teacher(network(6), path)
