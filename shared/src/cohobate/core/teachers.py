"""Teachers: frozen, averaged, earlier selves, sets. None of them trains or enters a checkpoint.

A `Teacher` keeps its network outside the module tree. The student's module therefore has no teacher
parameter to optimise, broadcast or save, by construction and not by a filter; ``.to(device)`` still
reaches it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cohobate.core.catalog import suggestion
from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights
from cohobate.core.training.schedules import Schedule, as_schedule

if TYPE_CHECKING:
    from cohobate.core.cache import TeacherCache
    from cohobate.core.fused import TopK

log = logging.getLogger("cohobate")


class Teacher(nn.Module):
    """A network that is only asked.

    It is frozen, stays in eval mode whatever its owner does, runs without building a graph, and its
    tensors are in neither ``parameters()`` nor ``state_dict()`` of its owner.

    Args:
        *networks: What the teacher holds.
        grad_input: Let gradients flow through the teacher to its inputs (its weights stay frozen).
    """

    def __init__(self, *networks: nn.Module, grad_input: bool = False) -> None:
        super().__init__()
        self.grad_input = grad_input
        self._held = [network.requires_grad_(False).eval() for network in networks]

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks held."""
        return tuple(self._held)

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing: a teacher does not change mode with its owner."""
        self.training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        for network in self._held:
            network._apply(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the teacher."""
        with torch.set_grad_enabled(self.grad_input and torch.is_grad_enabled()):
            return self.answer(*args, **kwargs)

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the answer; the default asks the one network held."""
        return self._held[0](*args, **kwargs)

    def after_step(self, progress: float) -> None:
        """Follow an optimiser step of the student."""

    def after_epoch(self, progress: float) -> None:
        """Follow an epoch of the student."""

    def changing_state(self) -> dict[str, Any]:
        """What a resumed run needs; empty for a teacher that does not change."""
        return {}

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Take up what `changing_state` gave."""


class FrozenTeacher(Teacher):
    """A trained network that stays as it is.

    Args:
        network: The teacher network, weights loaded.
        batch_norm: ``eval`` normalises by the running statistics; ``batch`` by the batch's own and
            leaves the running ones untouched (some feature-matching papers require it).
        grad_input: As for `Teacher`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        batch_norm: Literal["eval", "batch"] = "eval",
        grad_input: bool = False,
    ) -> None:
        super().__init__(network, grad_input=grad_input)
        if batch_norm == "batch":
            for layer in network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.train()
                    layer.momentum, layer.num_batches_tracked = 0.0, None


class EMATeacher(Teacher):
    """The exponential moving average of the student: ``θ ← d·θ + (1 − d)·θ_student`` each step.

    Buffers (running statistics) are copied.

    Args:
        student: The network to follow.
        decay: d, a number or a schedule of progress.

    References:
        Tarvainen, Valpola. Mean teachers are better role models. NeurIPS 2017, arXiv 1703.01780.
    """

    def __init__(self, student: nn.Module, decay: float | Schedule = 0.999) -> None:
        super().__init__(copy.deepcopy(student))
        self.decay = as_schedule(decay)
        self._student = [student]  # a list, so that the student is not registered twice

    def after_step(self, progress: float) -> None:
        """Average in the student's weights, one call for each dtype."""
        self.update(self.decay(progress))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Average in the student's weights.

        Args:
            decay: Share of the old average that stays, in [0, 1].
        """
        own, new = self._held[0], self._student[0]
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, current in zip(own.parameters(), new.parameters(), strict=True):
            averages, currents = by_dtype.setdefault(average.dtype, ([], []))
            averages.append(average)
            currents.append(current)
        for averages, currents in by_dtype.values():
            torch._foreach_lerp_(averages, currents, 1.0 - decay)
        for buffer, copied in zip(own.buffers(), new.buffers(), strict=True):
            buffer.copy_(copied)

    def changing_state(self) -> dict[str, Any]:
        """The averaged weights."""
        return dict(self._held[0].state_dict())

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Go on from averaged weights."""
        self._held[0].load_state_dict(state)


class SnapshotTeacher(Teacher):
    """The student as it was: after the previous step or epoch; several snapshots vote.

    Until the first snapshot the teacher is the initial student.

    Args:
        student: The network to remember.
        every: When a snapshot is taken.
        keep: Number of latest snapshots; the answer is the mean of theirs.

    References:
        Kim et al. Self-knowledge distillation with progressive refinement of targets. ICCV 2021,
        arXiv 2006.12000 (previous epoch).
    """

    def __init__(
        self, student: nn.Module, *, every: Literal["epoch", "step"] = "epoch", keep: int = 1
    ) -> None:
        if keep < 1:
            raise ValueError(f"SnapshotTeacher: keep must be at least 1, got {keep}")
        super().__init__(copy.deepcopy(student))
        self.every, self.keep = every, keep
        self._taken = 0
        self._student = [student]

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """The mean answer of the snapshots."""
        answers = [network(*args, **kwargs) for network in self._held]
        return answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)

    def after_step(self, progress: float) -> None:
        """Remember the student when snapshots go by steps."""
        if self.every == "step":
            self.take()

    def after_epoch(self, progress: float) -> None:
        """Remember the student when snapshots go by epochs."""
        if self.every == "epoch":
            self.take()

    def take(self) -> None:
        """Remember the student as it is now."""
        self._taken += 1
        if self._taken > 1 and len(self._held) < self.keep:
            self._held.append(copy.deepcopy(self._held[0]))
        oldest = self._held.pop(0)
        oldest.load_state_dict(self._student[0].state_dict())
        self._held.append(oldest)

    def changing_state(self) -> dict[str, Any]:
        """All snapshots, oldest first."""
        return {"taken": self._taken, "snapshots": [dict(n.state_dict()) for n in self._held]}

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Go on with earlier snapshots."""
        self._taken = state["taken"]
        while len(self._held) < len(state["snapshots"]):
            self._held.append(copy.deepcopy(self._held[0]))
        for network, snapshot in zip(self._held, state["snapshots"], strict=True):
            network.load_state_dict(snapshot)


class TeacherSet(Teacher):
    """Several teachers as one, asked one after the other so that one answer is held at a time.

    Args:
        teachers: The members by name.
        weights: Weight of each member's answer, normalised to sum 1; equal when not given.
        combine: Mean of the ``logits`` or of the ``probabilities`` (returned as log-probabilities,
            which are logits too).
        class_dim: The class axis, for ``probabilities``.

    Raises:
        ValueError: No member, or weights that do not fit the members.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        *,
        weights: Mapping[str, float] | None = None,
        combine: Literal["logits", "probabilities"] = "logits",
        class_dim: int = 1,
    ) -> None:
        super().__init__()
        names = list(teachers)
        given = dict(weights) if weights is not None else dict.fromkeys(names, 1.0)
        if not names or set(given) != set(names) or sum(given.values()) <= 0:
            raise ValueError(f"TeacherSet: weights {sorted(given)} for members {sorted(names)}")
        self.members = nn.ModuleDict(teachers)
        self.weights = {name: given[name] / sum(given.values()) for name in names}
        self.combine, self.class_dim = combine, class_dim

    def answer(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted mean of all members' answers."""
        total: Tensor | None = None
        for name, weight in self.weights.items():
            answer = self.members[name](*args, **kwargs)
            if self.combine == "probabilities":
                answer = answer.float().softmax(self.class_dim)
            total = answer * weight if total is None else total.add_(answer, alpha=weight)
        assert total is not None
        return total.clamp_min_(1e-38).log_() if self.combine == "probabilities" else total

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Ask one member, where each batch has a teacher of its own.

        Raises:
            InputError: There is no such member.
        """
        if name not in self.weights:
            raise InputError(f"unknown teacher '{name}'{suggestion(name, self.weights)}")
        return self.members[name](*args, **kwargs)


class CachedTeacher(Teacher):
    """A teacher that answers from disk: ask it with the names of the batch's samples.

    Args:
        cache: The answers; open it with the hash, transform and class count it must have.
    """

    def __init__(self, cache: TeacherCache) -> None:
        super().__init__()
        self.cache = cache
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)  # follows .to(device)

    def answer(
        self, samples: Sequence[str], augmentations: Sequence[str] | None = None
    ) -> Tensor | TopK:
        """The answers to a batch, on the device the teacher was moved to.

        Args:
            samples: Sample ids.
            augmentations: Key of each sample's augmentation; ``None`` for none.

        Returns:
            Logits (B, ...), or the top classes of them.

        Raises:
            InputError: A sample is not in the cache, or its record is damaged.
        """
        answer = self.cache.read(samples, augmentations)
        device = self._place.device
        if isinstance(answer, Tensor):
            return answer.to(device, non_blocking=True)
        return type(answer)(*(tensor.to(device, non_blocking=True) for tensor in answer))


class PeerSet(nn.Module):
    """Networks that learn together and teach each other; the first is the student that is kept.

    Unlike a `Teacher` the peers train, so they belong to the optimiser and to the checkpoint of the
    run; ``student.safetensors`` holds the first alone.

    Args:
        peers: The networks.

    References:
        Zhang et al. Deep mutual learning. CVPR 2018, arXiv 1706.00384.
    """

    def __init__(self, peers: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(peers) < 2:
            raise ValueError(f"PeerSet: mutual learning needs two peers, got {len(peers)}")
        self.peers = nn.ModuleList(peers)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Every peer's output."""
        return [peer(*args, **kwargs) for peer in self.peers]

    @staticmethod
    def others(outputs: Sequence[Tensor], peer: int) -> list[Tensor]:
        """The other peers' outputs, detached: the teachers of ``peer``."""
        return [output.detach() for i, output in enumerate(outputs) if i != peer]


def deep_to_shallow(
    stages: Sequence[Tensor], teacher: int, *, detach: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Pairs for self-distillation inside one network: one stage teaches all the others.

    Args:
        stages: Outputs of the network's stages, all of one shape.
        teacher: Place of the teaching stage.
        detach: Whether the teacher is kept from moving towards its students.

    Returns:
        (student, teacher) for every stage but the teacher's.

    Example:
        >>> a, b = torch.zeros(1), torch.ones(1)
        >>> [(s.item(), t.item()) for s, t in deep_to_shallow([a, b], teacher=1)]
        [(0.0, 1.0)]
    """
    target = stages[teacher].detach() if detach else stages[teacher]
    chosen = teacher % len(stages)
    return [(stage, target) for place, stage in enumerate(stages) if place != chosen]


def load_teacher(
    network: nn.Module,
    checkpoint: Path | None = None,
    *,
    key_map: Mapping[str, str] | None = None,
    strict: bool = True,
    batch_norm: Literal["eval", "batch"] = "eval",
) -> FrozenTeacher:
    """Load weights into a network and freeze it.

    Args:
        network: The teacher network.
        checkpoint: Its weights (safetensors, or a ``torch.save`` file of tensors).
        key_map: Prefix in the file → prefix in the network; the longest that fits is used.
        strict: Whether every weight of the network must be in the file and the other way round.
        batch_norm: As for `FrozenTeacher`.

    Raises:
        InputError: The file cannot be read or does not fit the network; the first name is given.
    """
    if checkpoint is not None:
        weights = _rename(load_weights(checkpoint), key_map or {})
        matched = fitting_weights(network, weights, checkpoint, strict=strict)
        network.load_state_dict(matched, strict=False)
        log.info(
            "teacher %s: %d of %d tensors from %s (%s)",
            type(network).__name__,
            len(matched),
            len(network.state_dict()),
            checkpoint,
            weights_hash(network)[:12],
        )
    return FrozenTeacher(network, batch_norm=batch_norm)


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights: which teacher was it?

    Args:
        network: Any module; a `Teacher` counts with the networks it holds, a `TeacherSet` with
            those of its members and how they are combined.

    Raises:
        ValueError: A teacher that holds no network.
    """
    networks: list[nn.Module] = [network]
    digest = hashlib.sha256()
    if isinstance(network, Teacher):
        teachers = [m for m in network.modules() if isinstance(m, Teacher)]
        networks = [held for teacher in teachers for held in teacher.networks]
        for teacher in teachers:
            if isinstance(teacher, TeacherSet):
                digest.update(f"{sorted(teacher.weights.items())} {teacher.combine}".encode())
    if not networks:
        raise ValueError(f"{type(network).__name__}: holds no network to tell apart")
    for held in networks:
        for name, tensor in sorted(held.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rename(weights: dict[str, Tensor], key_map: Mapping[str, str]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        fitting = [prefix for prefix in key_map if name.startswith(prefix)]
        if not fitting:
            return name
        prefix = max(fitting, key=len)
        return key_map[prefix] + name[len(prefix) :]

    return {renamed(name): tensor for name, tensor in weights.items()}
