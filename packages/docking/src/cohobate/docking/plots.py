"""Pictures: poses in their pocket, enrichment curves."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rdkit import Chem
from rdkit.Chem import Draw

from cohobate.core.io import save_atomic

_COLOURS = {
    "C": "#404040", "N": "#2050d8", "O": "#d62020", "S": "#c8a000", "P": "#e07800",
    "F": "#30a030", "Cl": "#30a030", "Br": "#8a3010", "I": "#6a1b9a", "H": "#b0b0b0",
}  # fmt: skip
_OTHER = "#d030a0"
CONTACT = 4.0
"""Å between heavy atoms."""


@dataclass(frozen=True)
class Scene:
    """A molecule in its pocket.

    Attributes:
        title: Stands above.
        atoms: Positions (A, 3), Å.
        elements: Symbol of each atom.
        bonds: The two atoms of each bond (B, 2).
        labels: Name of each residue.
        residues: Cα and side-chain centroid of each residue (R, 2, 3), Å.
        contacts: Atom of the molecule and atom of each residue that are closest (R, 2, 3), Å.
    """

    title: str
    atoms: np.ndarray
    elements: Sequence[str]
    bonds: np.ndarray
    labels: Sequence[str]
    residues: np.ndarray
    contacts: np.ndarray


def closest(atoms: np.ndarray, residues: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The closest pair of atoms between a molecule and each residue.

    Args:
        atoms: (A, 3), Å.
        residues: Atoms of each residue, (…, 3).

    Returns:
        Distance (R,), Å, and the pair (R, 2, 3).

    Example:
        >>> closest(np.zeros((1, 3)), [np.array([[3.0, 4, 0], [9, 9, 9]])])[0].tolist()
        [5.0]
    """
    if not len(residues):
        return np.zeros(0), np.zeros((0, 2, 3))
    others = np.concatenate(list(residues))
    distance = np.linalg.norm(atoms[:, None] - others, axis=-1)
    starts = np.cumsum([0, *map(len, residues)])
    nearest = distance.min(0)
    other = np.array([a + nearest[a:b].argmin() for a, b in itertools.pairwise(starts)])
    return nearest[other], np.stack((atoms[distance[:, other].argmin(0)], others[other]), 1)


def principal_plane(points: np.ndarray) -> np.ndarray:
    """The two directions (2, 3) in which points (N, 3) spread most; unit vectors, orthogonal.

    A picture in these directions is a view of the points, never a mirror image: the viewer stands
    on their cross product.

    Example:
        >>> corners = np.array([[0.0, 0, 0], [4, 0, 0], [0, 1, 0], [4, 1, 0]])
        >>> abs(principal_plane(corners)).round(2).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    axes = np.linalg.svd(points - points.mean(0), full_matrices=True)[2][:2]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return np.where(largest < 0, -axes, axes)


def pocket_view(scenes: Sequence[Scene], path: Path, title: str = "") -> Path:
    """Draw molecules in their pocket, each in its principal plane.

    Args:
        scenes: One for each panel, at most six; further ones are left out.
        path: The PNG.
        title: Stands above all.
    """
    shown = scenes[:6]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.4 * rows), layout="constrained")
    for place, scene in enumerate(shown):
        _pocket(figure.add_subplot(rows, columns, place + 1), scene)
    _head(figure, title)
    return _save(figure, path)


def molecule_grid(
    molecules: Sequence[Chem.Mol], labels: Sequence[str], path: Path, title: str = ""
) -> Path:
    """Draw the formulas of molecules, four in a row.

    Args:
        molecules: At least one.
        labels: What stands above each.
        path: The PNG.
        title: Stands above all.
    """
    columns = min(4, len(molecules))
    rows = -(-len(molecules) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows), layout="constrained")
    for place, (molecule, label) in enumerate(zip(molecules, labels, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(np.asarray(Draw.MolToImage(molecule, size=(480, 360))))
        axes.set_title(label, fontsize=8)
        axes.set_axis_off()
    _head(figure, title)
    return _save(figure, path)


def enrichment_plot(
    share: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    title: str = "",
) -> Path:
    """Draw the share of actives found over the share of the library screened.

    Args:
        share: Share of the library (S,), rising.
        panels: Title → scorer → share of the actives (S,); the first scorer's line is bold.
        path: The PNG.
        title: Stands above all.
    """
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns + 0.6, 2.2 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (heading, curves) in zip(grid.flat, panels.items(), strict=False):
        axes.plot(share, share, color="0.6", linestyle="--", linewidth=1, label="random")
        for number, (name, found) in enumerate(curves.items()):
            axes.plot(
                share, found, color=f"C{number}", label=name, linewidth=1 if number else 2,
                zorder=3 + number,  # a control that does as well is seen on the bold line
            )  # fmt: skip
        axes.set(xscale="log", xlim=(share[0], 1), ylim=(0, 1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
        axes.set_title(heading, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[max(len(panels) - columns, 0) : len(panels)]:
        axes.tick_params(labelbottom=True)  # also where no panel stands below
    figure.supxlabel("share of the library screened", fontsize=9)
    figure.supylabel("share of the actives found", fontsize=9)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        [*handles[1:], handles[0]], [*names[1:], names[0]], loc="outside upper center",
        ncols=min(len(names), columns + 2), fontsize=8, title=_wrapped(figure, title) or None,
        title_fontsize=8,
    )  # fmt: skip
    return _save(figure, path)


def _pocket(axes: Axes, scene: Scene) -> None:
    plane, middle = principal_plane(scene.atoms), scene.atoms.mean(0)
    atoms, residues, contacts = (
        (x - middle) @ plane.T for x in (scene.atoms, scene.residues, scene.contacts)
    )
    near = np.linalg.norm(np.diff(scene.contacts, axis=1)[:, 0], axis=-1) < CONTACT
    axes.add_collection(LineCollection(list(residues), colors="0.75", linewidths=1, zorder=1))
    own = np.stack((residues[:, 1], contacts[:, 1]), 1)[near]  # from the residue to its atom
    axes.add_collection(LineCollection(list(own), colors="0.84", linewidths=1, zorder=0))
    axes.scatter(residues[:, 0, 0], residues[:, 0, 1], s=8, color="0.75", zorder=1)
    axes.scatter(residues[:, 1, 0], residues[:, 1, 1], s=16, color="0.6", zorder=1)
    axes.add_collection(
        LineCollection(
            list(contacts[near]), colors="0.35", linewidths=0.8, linestyles="dashed", zorder=2
        )
    )
    colours = np.array([_COLOURS.get(element, _OTHER) for element in scene.elements])
    first, second = atoms[scene.bonds[:, 0]], atoms[scene.bonds[:, 1]]
    half = (first + second) / 2  # each half in the colour of its atom
    axes.add_collection(
        LineCollection(
            [*np.stack((first, half), 1), *np.stack((half, second), 1)],
            colors=[*colours[scene.bonds[:, 0]], *colours[scene.bonds[:, 1]]],
            linewidths=3, capstyle="round", zorder=3,
        )
    )  # fmt: skip
    axes.scatter(atoms[:, 0], atoms[:, 1], s=18, color=list(colours), zorder=4)
    places = _spread(residues[:, 1], atoms)
    for label, place in zip(scene.labels, places, strict=True):
        axes.annotate(label, place, fontsize=7, color="0.25", ha="center", va="center", zorder=5)
    everything = np.concatenate((atoms, residues.reshape(-1, 2), contacts.reshape(-1, 2), places))
    low, high = everything.min(0) - 1.5, everything.max(0) + 1.5
    axes.plot([low[0], low[0] + 5], [low[1], low[1]], color="0.3", linewidth=1.5)
    axes.annotate("5 Å", (low[0] + 2.5, low[1] + 0.3), fontsize=7, ha="center", va="bottom")
    axes.set(xlim=(low[0] - 0.5, high[0]), ylim=(low[1] - 0.5, high[1]), aspect="equal")
    axes.set_title(scene.title, fontsize=9)
    axes.set_axis_off()


def _spread(wanted: np.ndarray, atoms: np.ndarray, steps: int = 80) -> np.ndarray:
    """Places (R, 2) of labels near the wanted ones, where they hide neither atoms nor each other.

    Args:
        wanted: (R, 2), Å.
        atoms: (A, 2), Å.
        steps: How often all are pushed.
    """
    room = np.array([2.6, 1.1])  # of a label, Å
    places = wanted + np.array([0.0, 0.7])
    for _ in range(steps):
        for others, wide in ((places, room), (atoms, room / 2 + 0.3)):
            apart = (places[:, None] - others) / wide
            length = np.linalg.norm(apart, axis=-1)
            push = np.where((length < 1) & (length > 1e-6), 1 - length, 0.0)
            direction = apart / np.maximum(length, 1e-6)[..., None]
            places = places + 0.15 * (push[..., None] * direction * wide).sum(1)
    return places


def _head(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(_wrapped(figure, title), fontsize=9)


def _wrapped(figure: Figure, title: str) -> str:
    """Lines as wide as the picture at most."""
    return "\n".join(textwrap.wrap(title, int(13 * figure.get_figwidth())))


def _save(figure: Figure, path: Path) -> Path:
    with save_atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path
