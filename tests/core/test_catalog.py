from __future__ import annotations

import subprocess
import sys

import pytest

from cohobate.core import catalog
from cohobate.core.errors import InputError


def test_finds_papers_by_their_file() -> None:
    found = catalog.papers("toy")
    assert list(found) == ["toy/staged", "toy/tiny"]
    assert found["toy/tiny"].about["year"] == 2026


def test_default_recipe_and_arms() -> None:
    recipe = catalog.find("toy/tiny")
    assert [stage.name for stage in recipe.stages] == ["fit"]
    assert list(recipe.paper.arms) == ["baseline", "wide"]


def test_stages_run_in_order_of_their_numbers() -> None:
    assert [stage.name for stage in catalog.find("toy/staged").stages] == ["warm", "distil"]
    assert [stage.name for stage in catalog.find("toy/staged/distil").stages] == ["distil"]


def test_domain_may_be_left_out_in_a_package_command() -> None:
    assert catalog.find("tiny", "toy").full_name == "toy/tiny"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("toy/tinny", "did you mean 'toy/tiny'"),
        ("toy/staged/distill", "did you mean 'toy/staged/distil'"),
        ("nothing/at-all", "there is: "),
    ],
)
def test_unknown_names_get_a_hint(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        catalog.find(name)


def test_overlay_replaces_leaves_and_drops_arguments_of_another_class() -> None:
    base = {"model": {"class_path": "a.A", "init_args": {"x": 1, "y": [1]}}}
    assert catalog.overlay(base, {"model": {"init_args": {"y": [2]}}}) == {
        "model": {"class_path": "a.A", "init_args": {"x": 1, "y": [2]}}
    }
    other = {"model": {"class_path": "b.B", "init_args": {"z": 3}}}
    assert catalog.overlay(base, other) == other
    assert base["model"]["init_args"] == {"x": 1, "y": [1]}


def test_broken_yaml_is_named(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    for text in ("a: [1", "- 1"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"bad\.yaml"):
            catalog.read_yaml(path)
    with pytest.raises(InputError, match="No such file"):
        catalog.read_yaml(tmp_path / "none.yaml")


def test_listing_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from cohobate.core.cli import main;"
        "main(['list']); main(['info', 'toy/tiny']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
