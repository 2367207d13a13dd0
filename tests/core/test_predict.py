from __future__ import annotations

from pathlib import Path

import pytest

from cohobate.core.errors import InputError
from cohobate.core.predict import each_file, files_in


def texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.txt"))


def test_files_are_meant_as_they_are_and_folders_by_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/y.txt", "a/x.txt", "a/z.csv", "w.csv"):
        (tmp_path / name).touch()
    own = tmp_path / "w.csv"
    found = files_in([own, tmp_path / "a", own], texts, "texts")
    assert [path.name for path in found] == ["w.csv", "x.txt", "y.txt"]
    with pytest.raises(InputError, match=f"^{tmp_path}: no texts in this folder$"):
        files_in([tmp_path], texts, "texts")
    other = tmp_path / "b" / "x.txt"
    with pytest.raises(InputError, match=f"^{other}: its result would overwrite that of .*x.txt$"):
        files_in([tmp_path / "a", other], texts, "texts")
    assert len(files_in([tmp_path / "a", other], texts, "texts", str)) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("b", "^b is bad; the other 2 are in out$"),
        ("ab", r"^a is bad \(and 1 more files\); the other 1 are in out$"),
        ("abc", r"^a is bad \(and 2 more files\)$"),
    ],
)
def test_the_first_fault_is_told_when_the_rest_is_done(bad: str, message: str) -> None:
    done: list[str] = []

    def work(path: Path) -> list[Path]:
        if path.name in bad:
            raise InputError(f"{path} is bad")
        done.append(path.name)
        return [path]

    def finish() -> list[Path]:
        done.append("finished")
        return []

    with pytest.raises(InputError, match=message):
        each_file([Path("a"), Path("b"), Path("c")], Path("out"), work, "working", finish)
    assert done == [name for name in "abc" if name not in bad] + ["finished"]


def test_what_tells_of_all_files_comes_first() -> None:
    paths = [Path("a"), Path("b")]
    found = each_file(paths, Path("out"), lambda path: [path], "working", lambda: [Path("all")])
    assert found == [Path("all"), *paths]
