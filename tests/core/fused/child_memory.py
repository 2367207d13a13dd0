"""Run by test_memory.py: prints the bytes one call and its backward pass take at their peak."""

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


def main(tokens: int, width: int, classes: int, options: dict) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def operands(n: int, v: int) -> list[torch.Tensor]:
        x, w = torch.randn(n, width), torch.randn(v, width) * 0.05
        return [
            x.requires_grad_(),
            w.requires_grad_(),
            torch.randn(n, width),
            torch.randn(v, width),
        ]

    def call(*tensors: torch.Tensor) -> None:
        linear_divergence(*tensors, **options).sum().backward()

    call(*operands(128, 256))  # what libraries allocate once
    big = operands(tokens, classes)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    call(*big)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]), json.loads(sys.argv[4]))
