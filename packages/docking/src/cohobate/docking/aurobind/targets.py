"""What the student learns from: the teacher's answers and the nearest centroids' embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import load_weights, save_atomic
from cohobate.docking.aurobind.programs import teacher_of
from cohobate.docking.aurobind.student import ReleasedStudent
from cohobate.docking.aurobind.teachers import CompactTeacher, Teacher
from cohobate.docking.data.features import centroids
from cohobate.docking.data.sources import by_target


@dataclass(frozen=True)
class Answers:
    """For every complex of the data.

    Attributes:
        fitness: The teacher's, pK (n,); another model is asked about what is learned from alone,
            the rest is NaN.
        hidden: The teacher's pooled trunk tokens (n, H), likewise.
        prior: The structure model's of the nearest centroid's complex with the same target (n, P):
            pooled tokens, or for the released layout of the student mean(s) + mean(z), P = 1.
    """

    fitness: Tensor
    hidden: Tensor
    prior: Tensor


def ask(model: Any, data: Any, folder: Path, stage: str) -> Answers:
    """The answers that a module of the last stage needs.

    One process asks, for a program must not run twice. Where nothing is trained only the priors
    count: the structure model knows them, and nothing is kept.

    Args:
        model: The module: its structure model, student, teacher and options.
        data: The data module.
        folder: The run's; ``teacher.safetensors`` in it keeps the answers.
        stage: Lightning's; ``fit`` trains.

    Raises:
        InputError: Options of the teacher do not fit each other, or it has no answer.
    """
    own = CompactTeacher(model.network, model.device)
    prior: Teacher = own
    if isinstance(model.fast, ReleasedStudent):
        prior = CompactTeacher(model.network, model.device, model.fast.prior_of)
    if stage != "fit":
        return answers_of(prior, data, model.centroids, None, model.fast.channels[1])
    teacher: Teacher = own
    if model.teacher_files is not None:
        teacher = teacher_of(model.teacher_kind, model.teacher_files, model.teacher_run, own)
    elif model.teacher_run is not None:
        raise InputError("model.teacher_run: needs model.teacher_files and teacher_kind")
    path = folder / "teacher.safetensors"
    if model.trainer.is_global_zero:
        answers_of(teacher, data, model.centroids, path, model.hidden, prior)
    model.trainer.strategy.barrier()
    return answers_of(teacher, data, model.centroids, path, model.hidden, prior)


@torch.no_grad()
def answers_of(
    teacher: Teacher,
    data: Any,
    count: int,
    path: Path | None,
    width: int,
    own: Teacher | None = None,
) -> Answers:
    """Ask the teacher once; afterwards read the file, if there is to be one.

    Args:
        teacher: Whom.
        data: The data module.
        count: Centroids of each target.
        path: Where the answers are kept.
        width: Length of the hidden states that the student expects.
        own: Whose hidden states are the priors, where that is not the teacher: the model that will
            be at hand when a library is screened. It is asked about the centroids alone.

    Raises:
        InputError: The teacher's have another.
    """
    if path is not None and path.exists():
        answers = Answers(**load_weights(path))
    else:
        near = nearest(data, count)
        if own is None or own is teacher:
            fitness, states = teacher.answers(data, range(len(data.data)))
            prior = states[near]
        else:
            fitness, states = _of_training(teacher, data)
            asked, back = near.unique(return_inverse=True)
            prior = own.answers(data, asked.tolist())[1][back]
        answers = Answers(fitness, states, prior)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with save_atomic(path) as temporary:
                save_file(vars(answers), temporary)
    if answers.hidden.shape[1] != width:
        raise InputError(
            f"the teacher's hidden states have {answers.hidden.shape[1]} numbers, the student "
            f"expects {width}: --model.hidden {answers.hidden.shape[1]}"
        )
    return answers


def _of_training(teacher: Teacher, data: Any) -> tuple[Tensor, Tensor]:
    """Answers to the training and the unlabelled complexes: a program takes minutes for each."""
    places = sorted({*data.parts["train"], *data.extra})
    answers = teacher.answers(data, places)
    every = [torch.full((len(data.data), *a.shape[1:]), float("nan")) for a in answers]
    for whole, part in zip(every, answers, strict=True):
        whole[places] = part
    return every[0], every[1]


def nearest(data: Any, count: int) -> Tensor:
    """Place of each complex's nearest centroid (n,) by Tanimoto, inside its target.

    Centroids are chosen among the training molecules and those without label.
    """
    complexes = data.data.complexes
    open_to = {*data.parts["train"], *data.extra}
    found = torch.zeros(len(complexes), dtype=torch.long)
    for places in by_target(complexes).values():
        own = [i for i in places if i in open_to] or places
        chosen = [own[i] for i in centroids([complexes[i].molecule for i in own], count)]
        bits = torch.stack([data.data[i]["bits"] for i in places])
        found[places] = torch.tensor(chosen)[tanimoto(bits, bits_of(data, chosen)).argmax(1)]
    return found


def bits_of(data: Any, places: list[int]) -> Tensor:
    """Fingerprints (n, bits) of complexes."""
    return torch.stack([data.data[i]["bits"] for i in places])


def tanimoto(a: Tensor, b: Tensor) -> Tensor:
    """Similarity (n, m) of fingerprints (n, bits) and (m, bits).

    Example:
        >>> tanimoto(torch.tensor([[1.0, 1, 0]]), torch.tensor([[1.0, 0, 0]])).item()
        0.5
    """
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)
