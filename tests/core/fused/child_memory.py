"""Run by test_memory.py: prints the bytes that calls and their backward passes take at their peak.

The environment tells malloc to give large freed arrays back at once, so that the high-water mark
counts what is alive and not what the C library keeps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from cohobate.core.fused import linear_divergence


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak(tokens: int, width: int, classes: int, budget: int, options: dict) -> int:
    def operands(n: int, v: int) -> list[torch.Tensor]:
        x, w = torch.randn(n, width), torch.randn(v, width) * 0.05
        return [
            x.requires_grad_(),
            w.requires_grad_(),
            torch.randn(n, width),
            torch.randn(v, width),
        ]

    def call(tensors: list[torch.Tensor], budget: int) -> None:
        linear_divergence(*tensors, budget=budget, **options).sum().backward()

    # what libraries load and allocate once: the same evaluation of a small problem
    call(operands(256, 256), budget * 256 // classes)
    big = operands(tokens, classes)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    call(big, budget)
    return status("VmHWM") - before


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = [int(word) for word in sys.argv[1:4]]
    print(json.dumps([peak(*size, **case) for case in json.loads(sys.argv[4])]))
