from __future__ import annotations

import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cohobate.core.errors import InputError
from cohobate.core.io import (
    fitting_weights,
    load_checkpoint,
    load_weights,
    result_folder,
    save_atomic,
)
from cohobate.core.training.checkpoints import AtomicCheckpointIO


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_reads_safetensors_and_torch_files(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.ckpt"):
        assert torch.equal(load_weights(tmp_path / name)["a"], weights["a"])


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps(Trap(mark)))
    torch.save({"state_dict": Trap(mark)}, tmp_path / "evil.pt")
    for file in (path, tmp_path / "evil.pt"):
        with pytest.raises(InputError, match=r"evil\..*never loaded"):
            load_checkpoint(file)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half{suffix}"
    if suffix == ".ckpt":
        torch.save({"a": torch.zeros(1000)}, path)
    else:
        save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=f"half{suffix}: damaged"):
        load_checkpoint(path)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")
    torch.save({"epoch": 1}, tmp_path / "e.ckpt")
    with pytest.raises(InputError, match="no tensors"):
        load_weights(tmp_path / "e.ckpt")


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    own = nn.Linear(2, 3)
    with pytest.raises(InputError, match=r"f: weight has shape \(3, 4\), Linear needs \(3, 2\)"):
        fitting_weights(own, nn.Linear(4, 3).state_dict(), Path("f"))
    with pytest.raises(InputError, match="f: no weights for bias of Linear"):
        fitting_weights(own, {"weight": own.weight}, Path("f"))
    with pytest.raises(InputError, match=r"f: biases is not in Linear, did you mean 'bias'\?"):
        fitting_weights(own, {**own.state_dict(), "biases": own.bias}, Path("f"))


def test_an_error_while_writing_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with save_atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("below", ["", "a.txt", "far/a.txt"])
def test_on_or_under_a_file_nothing_is_written(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    target = file / below
    with pytest.raises(InputError, match="cannot be written"), save_atomic(file / "b"):
        pytest.fail("there is no folder to write to")
    message = r"file.*: cannot be written: not a folder"
    with pytest.raises(InputError, match=message), result_folder(target):
        pytest.fail("there is no folder to write to")
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_result_folder_goes_again_when_it_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    folder = tmp_path / "there" / "new" / "deep"

    def fail(name: str | None) -> None:
        with result_folder(folder):
            if name:
                (folder / name).touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(None)
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(RuntimeError):
        fail("a.txt")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    with result_folder(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def _write_past_the_limit(folder: Path) -> None:
    """A file-size limit stands in for a full disk: the write fails half-way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1_000_000)}, folder / "last.ckpt")
    except InputError as error:
        if "last.ckpt: cannot be written: no space left" in str(error):
            raise SystemExit(2) from None
    raise SystemExit(1)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, in_child) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, tmp_path / "last.ckpt")
    assert in_child(_write_past_the_limit, tmp_path) == 2
    assert torch.equal(load_checkpoint(tmp_path / "last.ckpt")["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
