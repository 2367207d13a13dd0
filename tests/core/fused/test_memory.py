"""The promise about memory, by the high-water mark of a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOKENS, WIDTH, CLASSES = 1024, 128, 32000
GRADIENTS = 4 * WIDTH * (TOKENS + CLASSES)


def peak(**options):
    child = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("child_memory.py")),
            *(str(n) for n in (TOKENS, WIDTH, CLASSES)),
            json.dumps(options),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(child.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize("chunk", [128, 256])
def test_peak_is_gradients_and_two_chunks_of_logits(chunk):
    budget = chunk * CLASSES * 4
    promised = GRADIENTS + 2 * chunk * CLASSES * 4
    used = peak(budget=budget, kind="jensen_shannon" if chunk == 128 else "forward_kl")
    # a few blocks of rows (4 MiB) and what the matrix products pack
    assert 0.5 * promised < used < 1.05 * promised + (8 << 20)
