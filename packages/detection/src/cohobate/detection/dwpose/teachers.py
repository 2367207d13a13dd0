"""Who teaches: a larger network in stage 1, the network's own first head in stage 2, an average."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cohobate.core.teachers import EMATeacher, Teacher
from cohobate.detection.dwpose.losses import SimCC
from cohobate.detection.dwpose.network import RTMPose

BatchNorm = Literal["eval", "train"]


class PoseTeacher(Teacher):
    """A trained RTMPose: its feature map and its logits.

    Args:
        network: The network.
        batch_norm: ``eval``: a teacher that does not change. ``train``: as the released code runs,
            which leaves the teacher in training mode: it answers by the batch's own statistics and
            its running statistics drift.
        stored: Whether checkpoints of a run hold it; not needed when it is read from a file.
    """

    def __init__(
        self, network: RTMPose, *, batch_norm: BatchNorm = "eval", stored: bool = True
    ) -> None:
        super().__init__(network)
        self.stored = stored or batch_norm == "train"
        if batch_norm == "train":
            for layer in network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.train()

    def answer(self, images: Tensor) -> tuple[Tensor, SimCC]:
        """Features ``(B, C, h, w)`` and logits."""
        network: Any = self._held[0]
        features = network.backbone(images)
        return features, network.head(features)

    def changing_state(self) -> dict[str, Any]:
        """The weights, when there is no file of them."""
        return dict(self._held[0].state_dict()) if self.stored else {}

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Take the weights up again."""
        self._held[0].load_state_dict(state)


class HeadTeacher(Teacher):
    """A trained head, asked about the features that its student sees too."""

    def changing_state(self) -> dict[str, Any]:
        """The weights; they are nowhere else in the run."""
        return dict(self._held[0].state_dict())

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Take the weights up again."""
        self._held[0].load_state_dict(state)


class Average(EMATeacher):
    """The moving average that is evaluated and kept, running statistics included.

    ``θ ← θ + m (θ_student - θ)`` with ``m(t) = momentum + (1 - momentum) exp(-(1 + t) / gamma)``.

    Args:
        student: The network to follow.
        momentum: m in the end.
        gamma: Steps over which it falls.
    """

    def __init__(self, student: nn.Module, momentum: float, gamma: float = 2000.0) -> None:
        super().__init__(student)
        self.momentum, self.gamma, self.steps = momentum, gamma, 0

    @property
    def network(self) -> nn.Module:
        """The averaged network."""
        return self._held[0]

    def restart(self) -> None:
        """Begin with the student as it is now."""
        self.network.load_state_dict(self._student[0].state_dict())
        self.steps = 0

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Average in the weights of a step; the first is copied."""
        share = self.momentum + (1 - self.momentum) * math.exp(-(1 + self.steps) / self.gamma)
        share = share if self.steps else 1.0
        self.steps += 1
        own, new = self.network.state_dict(), self._student[0].state_dict()
        floating = [k for k, v in own.items() if v.is_floating_point()]
        torch._foreach_lerp_([own[k] for k in floating], [new[k] for k in floating], share)
        for name in own.keys() - set(floating):
            own[name].copy_(new[name])

    def changing_state(self) -> dict[str, Any]:
        """Steps done; the weights are the checkpoint's own."""
        return {"steps": self.steps}

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.steps = int(state["steps"])
