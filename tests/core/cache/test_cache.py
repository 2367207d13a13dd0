"""Teacher outputs on disk: exact, resumable, checked, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cohobate.core.cache import TeacherCache, WithAnswers
from cohobate.core.errors import InputError
from cohobate.core.fused import TopK
from cohobate.core.teachers import CachedTeacher
from cohobate.core.training.data import Draw, EpochSampler

CLASSES = 32
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def batch_of(dataset, indices):
    return {"x": torch.stack([dataset[i]["x"] for i in indices])}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(6,), (4, 3)])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_dense_answers_come_back_bit_by_bit(samples, ask, write, precision, shape, class_dim):
    dataset = samples(shape=shape)
    cache = write(
        dataset, form="dense", precision=precision, class_dim=class_dim,
        ask=lambda batch: ask(batch, class_dim),
    )  # fmt: skip
    order = [17, 3, 29, 3, 0]
    expected = ask(batch_of(dataset, order), class_dim).to(PRECISIONS[precision])
    assert torch.equal(cache.read([f"case-{i}" for i in order]), expected)
    assert torch.equal(cache[17], expected[0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(6,), (4, 3)])
def test_top_classes_come_back_bit_by_bit(samples, ask, write, precision, temperature, shape):
    dataset = samples(shape=shape)
    cache = write(dataset, precision=precision, temperature=temperature)
    order = [17, 3, 29]
    log_probs = (ask(batch_of(dataset, order)).movedim(1, -1) / temperature).log_softmax(-1)
    top, ids = log_probs.topk(5, dim=-1)
    got = cache.read([f"case-{i}" for i in order])
    assert torch.equal(got.ids, ids)
    assert torch.equal(got.log_probs, top.to(PRECISIONS[precision]))
    tail = torch.log(1 - top.double().exp().sum(-1))
    torch.testing.assert_close(got.log_tail.double(), tail, rtol=1e-5, atol=1e-5)


def test_all_classes_leave_no_tail(samples, write):
    got = write(samples(), top_k=CLASSES).read(["case-3"])
    assert got.log_tail.item() == -torch.inf


def test_samples_of_different_sizes(samples, ask, write):
    class Growing(samples):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {"x": sample["x"][:, : 1 + int(index) % 3]}

    dataset = Growing(shape=(4, 3))
    cache = write(dataset, batch_size=1)
    for i in range(len(dataset)):
        expected = ask(batch_of(dataset, [i])).movedim(1, -1).log_softmax(-1).topk(5)[1]
        assert torch.equal(cache.read([f"case-{i}"]).ids, expected)
    with pytest.raises(InputError, match="different shapes"):
        cache.read(["case-0", "case-1"])
    cache.verify(progress=False)


def test_workers_read_what_was_written(samples, write):
    cache = write(samples())
    loader = DataLoader(
        cache, batch_size=4, shuffle=True, num_workers=2, collate_fn=TopK._make,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    seen = torch.cat([batch.log_probs for batch in loader])
    whole = cache.__getitems__(range(30)).log_probs
    assert torch.equal(seen.double().sum(1).sort()[0], whole.double().sum(1).sort()[0])


def test_a_pickled_reader_opens_the_files_anew(samples, write):
    cache = write(samples())
    data = pickle.dumps(cache)
    assert len(data) < 2000
    again = pickle.loads(data)  # our own bytes
    assert torch.equal(again.read(["case-9"]).ids, cache.read(["case-9"]).ids)


def test_a_data_set_with_answers(samples, write):
    dataset = samples()
    together = WithAnswers(dataset, write(dataset, form="dense"))
    batch = next(iter(DataLoader(together, batch_size=4)))
    assert batch["x"].shape == (4, 6)
    assert torch.equal(batch["teacher"], together.cache.__getitems__([0, 1, 2, 3]))
    topk = WithAnswers(dataset, write(dataset, "topk"))[5]["teacher"]
    assert isinstance(topk, TopK)
    assert topk.ids.shape == (5,)


def test_a_teacher_that_answers_from_the_cache(samples, write):
    teacher = CachedTeacher(write(samples(), form="dense"))
    answer = teacher(["case-4", "case-2"])
    assert torch.equal(answer, teacher.cache.read(["case-4", "case-2"]))
    assert not answer.requires_grad
    assert teacher.state_dict() == {}
    assert list(teacher.parameters()) == []
    assert not teacher.train().training
    meta = CachedTeacher(write(samples(), "topk")).to("meta")(["case-1"])
    assert meta.ids.device.type == "meta"


def test_augmentations_have_answers_of_their_own(samples, ask, write):
    dataset = samples(crops=True)
    sampler = EpochSampler(len(dataset), seed=3, rank=0, world=1)
    draws = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        draws.extend(sampler)
    cache = write(dataset, draws=draws, form="dense", precision="float32")
    assert len(cache) == 90
    for draw in draws[::17]:
        answer = cache.read(*([part] for part in dataset.sample_key(draw)))
        assert torch.equal(answer, ask(batch_of(dataset, [draw])))
    with pytest.raises(InputError, match=r"no sample case-1 without augmentation; .* 3 in all"):
        cache.read(["case-1"])
    with pytest.raises(InputError, match=r"no sample case-1 under augmentation 'seed=1'"):
        cache.read(["case-1"], ["seed=1"])


def test_random_crops_without_a_key_are_refused(samples, write, tmp_path):
    with pytest.raises(InputError, match="sample case-0: two draws of it differ"):
        write(samples(crops=True, keyed=False))
    assert not (tmp_path / "cache").exists()


def test_one_name_is_asked_once(samples, write):
    assert len(write(samples(), draws=[0, 1, 0, Draw(1, 5), 2])) == 3


def test_writing_leaves_the_random_state_alone(samples, write):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    write(samples(), num_workers=0)
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_cache_is_not_asked_again(samples, ask, write, tmp_path):
    write(samples())
    before = files(tmp_path / "cache")
    asked = []

    def counting(batch):
        asked.append(len(batch["x"]))
        return ask(batch)

    write(samples(), ask=counting)
    assert asked == [1]  # the shape of an answer
    assert files(tmp_path / "cache") == before


def test_a_missing_shard_alone_is_written_again(samples, write, tmp_path):
    write(samples())
    before = files(tmp_path / "cache")
    lost = tmp_path / "cache" / "000002.safetensors"
    lost.unlink()
    with pytest.raises(InputError, match=r"000002.safetensors: missing, with 1 of 5 shards"):
        TeacherCache(tmp_path / "cache")
    stale = tmp_path / "cache" / f".000002.{2**22 + 1}.safetensors"  # of a process long gone
    stale.write_bytes(b"half")
    write(samples())
    assert files(tmp_path / "cache") == before


def test_parts_make_the_whole(samples, write, tmp_path):
    write(samples(), "whole")
    assert write(samples(), part=1, parts=3) is None
    assert write(samples(), part=0, parts=3) is None
    assert len(write(samples(), part=2, parts=3)) == 30
    assert files(tmp_path / "cache") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("size", "classes", "top_k"),
    [(1000, 20_000, 16), pytest.param(100_000, 32_000, 64, marks=pytest.mark.slow)],
)
def test_killed_twenty_times_it_ends_with_the_same_files(tmp_path, size, classes, top_k):
    words = [str(Path(__file__).with_name("child_killed.py")), tmp_path, 20, size, classes, top_k]
    child = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    ended, done = map(int, child.stdout.split())
    assert ended >= 15  # attempts that did not live to the end
    assert done >= 1  # they got somewhere
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    TeacherCache(tmp_path / "killed").verify(progress=False)


def test_every_flipped_byte_is_found(samples, write, tmp_path):
    folder = tmp_path / "cache"
    write(samples(size=3), top_k=2)
    good = TeacherCache(folder).read(["case-1"])
    path = folder / "000000.safetensors"
    sound = path.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            cache = TeacherCache(folder)
            cache.verify(progress=False)
        except InputError:
            continue
        assert place < header  # blanks and unread words of the header carry nothing
        assert torch.equal(cache.read(["case-1"]).ids, good.ids)


def test_the_damaged_sample_is_named(samples, write, tmp_path):
    write(samples())
    path = tmp_path / "cache" / "000001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1  # in the last record, or in the names, whichever comes last
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"000001.safetensors: (damaged shard|sample case-13: )"):
        TeacherCache(tmp_path / "cache").verify(progress=False)


@pytest.mark.parametrize("keep", [0, 5, 100, 700, -1])
def test_a_shard_cut_short_is_found(samples, write, tmp_path, keep):
    write(samples(), shard_samples=30)
    path = tmp_path / "cache" / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"000000.safetensors: damaged shard"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"teacher": "def"}, "made with teacher abc, asked for def"),
        ({"transform": "flip"}, "made with transform identity, asked for flip"),
        ({"classes": 31}, "made with number of classes 32, asked for 31"),
    ],
)
def test_a_cache_made_otherwise_is_refused(samples, write, tmp_path, asked, message):
    write(samples())
    with pytest.raises(InputError, match=message):
        TeacherCache(tmp_path / "cache", **asked)
    TeacherCache(tmp_path / "cache", teacher="abc", transform="identity", classes=32)
    if "classes" not in asked:
        with pytest.raises(InputError, match=message):
            write(samples(), **asked)


def test_another_cache_is_not_written_over(samples, write):
    write(samples())
    with pytest.raises(InputError, match="made with CacheSpec"):
        write(samples(), top_k=6)
    with pytest.raises(InputError, match="made for 30 other samples"):
        write(samples(size=31))


def test_bad_input_is_named(samples, write, tmp_path):
    with pytest.raises(InputError, match=r"cache.json: no such cache"):
        TeacherCache(tmp_path)
    with pytest.raises(InputError, match="top_k: 33 of 32 classes"):
        write(samples(), top_k=33)
    with pytest.raises(InputError, match="class_dim: 2"):
        write(samples(), class_dim=2)
    with pytest.raises(InputError, match="part: 3"):
        write(samples(), part=3, parts=3)
    with pytest.raises(InputError, match="there is no sample"):
        write(samples(size=0))
    write(samples())
    with pytest.raises(InputError, match="no sample nobody"):
        TeacherCache(tmp_path / "cache").read(["nobody"])
    meta = tmp_path / "cache" / "cache.json"
    meta.write_text(json.dumps({"spec": {}}))
    with pytest.raises(InputError, match=r"cache.json: damaged"):
        TeacherCache(tmp_path / "cache")


def test_names_are_listed(samples, write):
    cache = write(samples(size=3))
    assert cache.names == [("case-0", ""), ("case-1", ""), ("case-2", "")]
    assert np.array_equal(cache.find(["case-2", "case-0"]), [2, 0])
