# /// script
# dependencies = ["nox[uv]>=2025.2.9"]
# ///
"""One environment for each package: `nox` runs the tests, `nox -s demo` shows what it is about.

Packages are discovered: a new folder in `packages/` needs no edit here.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "mmdet"]

ROOT = Path(__file__).parent
CORE = "core"
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
EVERY = [CORE, *PACKAGES]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# One thread a process: on busy cores two are many times slower. Compiled modules are kept, whatever
# the machine says: without them every process spends 20 seconds on its imports.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": None}
CPU = {**THREADS, "CUDA_VISIBLE_DEVICES": ""}
WORKERS = ("--numprocesses=auto", "--maxprocesses=4", "--dist=loadscope")


def folder(package: str) -> Path:
    return ROOT / "shared" if package == CORE else ROOT / "packages" / package


def group(path: Path, name: str) -> list[str]:
    """A dependency group of a package; a package without it needs nothing."""
    toml = nox.project.load_toml(path / "pyproject.toml")
    found = toml.get("dependency-groups", {})
    return list(nox.project.dependency_groups(toml, name)) if name in found else []


def install(session: nox.Session, *packages: str, extra: tuple[str, ...] = ()) -> None:
    """Install the core and packages from the tree, editable, with what their tests need."""
    wanted = list(dict.fromkeys([CORE, *packages]))
    editable = [word for name in wanted for word in ("-e", str(folder(name)))]
    needs = [need for name in wanted for need in group(folder(name), "test")]
    session.install(*editable, *needs, *extra)


def tests_of(package: str) -> list[str]:
    found = [f"tests/{package}", *(["tests/contract"] if package == CORE else [])]
    return [path for path in found if (ROOT / path).exists()]


@nox.session
@nox.parametrize("package", EVERY, ids=EVERY)
def tests(session: nox.Session, package: str) -> None:
    """Run the default tests and the doctests of one package in its own environment."""
    install(session, package, extra=("pytest-xdist>=3.6",))
    source = folder(package) / "src"
    session.run(
        "pytest", "-m", "not slow and not gpu", "--doctest-modules", str(source), *WORKERS,
        *tests_of(package), *session.posargs, env=CPU,
    )  # fmt: skip


@nox.session(default=False)
@nox.parametrize("package", EVERY, ids=EVERY)
def slow(session: nox.Session, package: str) -> None:
    """Run the tests that take more than a minute."""
    install(session, package)
    session.run(
        "pytest", "-m", "slow and not gpu", *tests_of(package), *session.posargs,
        env=CPU, success_codes=[0, 5],
    )  # fmt: skip


@nox.session(default=False)
def mmdet(session: nox.Session) -> None:
    """Run the tests of D-FINE inside mmdet's detectors, with wheels alone."""
    install(session, "detection", extra=("-e", f"{folder('detection')}[mmdet]"))
    session.run("pytest", "tests/detection/d_fine/mmdet", *session.posargs, env=CPU)


@nox.session(default=False)
@nox.parametrize("package", EVERY, ids=EVERY)
def gpu(session: nox.Session, package: str) -> None:
    """Run the tests that need a CUDA device."""
    install(session, package)
    session.run(
        "pytest", "-m", "gpu", *tests_of(package), *session.posargs,
        env=THREADS, success_codes=[0, 5],
    )  # fmt: skip


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train a 3-D segmentation network on MRI with and without dual self-distillation."""
    install(session, "medseg")
    session.run(
        "cohobate", "compare", "medseg/dsd", "--seeds", "2", "--jobs", "2",
        "--trainer.max_epochs", "3", "--out", "runs/demo", *session.posargs, env=THREADS,
    )  # fmt: skip


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Check style, spelling, and that each package declares what it imports."""
    session.install(*group(ROOT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    for package in EVERY:
        with session.chdir(folder(package)):
            session.run(
                "deptry", "src", "--known-first-party=cohobate", "--experimental-namespace-package",
                "--ignore=DEP002",  # what a dependency needs of us at run time is not imported
            )  # fmt: skip


@nox.session(default=False)
@nox.parametrize("package", EVERY, ids=EVERY)
def types(session: nox.Session, package: str) -> None:
    """Check types: strict in the core."""
    install(session, package, extra=tuple(group(ROOT, "types")))
    session.run("mypy", "-p", f"cohobate.{package}")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the site; a broken link or reference is an error. `-- serve` shows it."""
    install(session, extra=tuple(group(ROOT, "docs")))
    session.run("python", "docs/generate.py", "--check")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]))


@nox.session(default=False)
def results(session: nox.Session) -> None:
    """Write the tables of README and pages from `paper.yaml` and `docs/results`."""
    install(session)
    session.run("python", "docs/generate.py")


@nox.session(default=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def build(session: nox.Session, package: str) -> None:
    """Build wheels, install them side by side, and use them from another directory."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in (CORE, package):
        session.run("uv", "build", "--wheel", f"--out-dir={dist}", str(folder(name)), external=True)
    ours = [f"--reinstall-package=cohobate-{name}" for name in (CORE, package)]
    session.install(*ours, *map(str, dist.glob("*.whl")))
    session.chdir(session.create_tmp())
    session.run("python", "-c", f"import cohobate.core, cohobate.{package} as p; print(p.__file__)")
    session.run("cohobate", "list")
    session.run(f"cohobate-{package}", "list")


@nox.session(default=False)
@nox.parametrize("package", EVERY, ids=EVERY)
def lowest(session: nox.Session, package: str) -> None:
    """Run the default tests with the oldest dependencies that are declared.

    What those warn of is their own affair.
    """
    install(session, package, extra=("--resolution=lowest-direct",))
    session.run(
        "pytest", "-m", "not slow and not gpu", "-W", "default", *tests_of(package),
        *session.posargs, env=CPU,
    )  # fmt: skip


@nox.session(default=False)
@nox.parametrize("package", EVERY, ids=EVERY)
def bench(session: nox.Session, package: str) -> None:
    """Measure hot paths; the JSON goes to `docs/results/bench-*.json`."""
    scripts = sorted(ROOT.glob(f"tests/benchmarks/{package}/bench_*.py"))
    install(session, package, extra=tuple(group(folder(package), "bench")))
    for script in scripts:
        session.run("python", str(script), *session.posargs)


if __name__ == "__main__":
    nox.main()
