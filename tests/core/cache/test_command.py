"""`cohobate cache`: a recipe's teacher, asked once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cohobate.core.cache import TeacherCache
from cohobate.core.teachers import CachedTeacher, FrozenTeacher, TeacherSet, weights_hash
from cohobate.core.testing import assert_one_line, run_command

CONFIG = """
model: {class_path: cohobate.toy.keyed.Taught}
data: {class_path: cohobate.toy.keyed.NamedPoints}
"""


@pytest.fixture
def cache(in_tmp):
    Path("named.yaml").write_text(CONFIG)

    def run(*words):
        options = ["--config=named.yaml", "--top-k=3", "--batch-size=8"]
        return run_command("cache", "toy/tiny", "--out=answers", *options, *words)

    return run


def teacher():
    torch.manual_seed(5)
    return nn.Linear(4, 6)


def points():
    from cohobate.toy.keyed import NamedCloud

    return torch.stack([NamedCloud(20, False, True)[i][0] for i in range(20)])


def test_answers_are_the_teachers(cache):
    outcome = cache("--precision=float32", "--temperature=2")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("answers: 20 answers of teacher, 0.00")
    stored = TeacherCache("answers", teacher=weights_hash(teacher()), transform="none", classes=6)
    answer = CachedTeacher(stored)(["point-7", "point-0"])
    expected = (teacher()(points()[[7, 0]]) / 2).log_softmax(1).topk(3)
    torch.testing.assert_close(answer.log_probs, expected[0])
    assert torch.equal(answer.ids, expected[1])


def test_a_set_of_teachers_is_one_teacher(cache):
    assert cache("--model.several=true").code == 0
    outcome = cache("--model.several=true", "--teacher=teacher.members.only")
    assert_one_line(outcome, "answers: made with teacher", "asked for")


def test_every_epochs_noise_has_its_answer(cache):
    assert cache("--data.augment=true", "--epochs=2", "--form=dense").code == 0
    stored = TeacherCache("answers")
    assert len(stored) == 40
    assert all(key.startswith("seed=") for _, key in stored.names)


def test_parts_make_one_cache(cache):
    assert "others are missing" in cache("--parts=2", "--part=1").out or len(
        TeacherCache("answers")
    )
    assert cache("--parts=2", "--part=0").code == 0
    assert len(TeacherCache("answers")) == 20


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--data.augment=true", "--data.keyed=false"], ["point-0", "no augmentation key"]),
        (["--model.frozen=false"], ["teacher teacher changes in training"]),
        (["--model.more=true"], ["--teacher: choose one of teacher, other"]),
        (["--teacher=teachr"], ["no 'teachr', did you mean 'teacher'"]),
        (["--top-k=7"], ["top_k: 7 of 6 classes"]),
        (["--part=2", "--parts=2"], ["part: 2"]),
        (["--frm=dense"], ["--frm"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(cache, words, parts):
    assert_one_line(cache(*words), *parts)
    assert not Path("answers").exists()


def test_data_without_names_are_refused(in_tmp):
    Path("frozen.yaml").write_text("model: {class_path: cohobate.toy.keyed.Taught}")
    outcome = run_command("cache", "toy/tiny", "--out=answers", "--config=frozen.yaml")
    assert_one_line(outcome, "Cloud: has no sample_key and transform_key")
    assert_one_line(run_command("cache", "toy/tiny"), "--out")


def test_a_set_is_told_apart_by_members_and_weights():
    def hash_of(seeds, **options):
        members = {}
        for seed in seeds:
            torch.manual_seed(seed)
            members[str(seed)] = FrozenTeacher(nn.Linear(2, 2))
        return weights_hash(TeacherSet(members, **options))

    hashes = [
        hash_of([0, 1]),
        hash_of([0, 2]),
        hash_of([0, 1], weights={"0": 2.0, "1": 1.0}),
        hash_of([0, 1], combine="probabilities"),
    ]
    assert len(set(hashes)) == 4
    assert hashes[0] == hash_of([0, 1])
    with pytest.raises(ValueError, match="CachedTeacher: holds no network"):
        weights_hash(CachedTeacher(None))
