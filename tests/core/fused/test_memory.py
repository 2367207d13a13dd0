"""The promise about memory, by the high-water mark of a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKENS, WIDTH, CLASSES = 1024, 128, 32000
GRADIENTS = 4 * WIDTH * (TOKENS + CLASSES)
CHUNK = 4 * CLASSES  # bytes of one token's logits
CASES = {
    "chunks": {"budget": 256 * CHUNK, "options": {}},
    "smaller chunks": {"budget": 128 * CHUNK, "options": {"kind": "jensen_shannon"}},
    "tiles": {"budget": 4 << 20, "options": {}},
    "smaller tiles": {"budget": 2 << 20, "options": {"kind": "jensen_shannon"}},
    "tiles, loss of each token": {"budget": 4 << 20, "options": {"reduction": "none"}},
}


@pytest.fixture(scope="module")
def peaks():
    child = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("child_memory.py")),
            *(str(n) for n in (TOKENS, WIDTH, CLASSES)),
            json.dumps(list(CASES.values())),
        ],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(CASES, json.loads(child.stdout), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize("name", CASES)
def test_peak_is_gradients_and_twice_the_budget(name, peaks):
    promised = GRADIENTS + 2 * CASES[name]["budget"]
    # blocks of rows (about 4 MiB) and what the matrix products pack
    assert 0.95 * promised < peaks[name] < promised + (8 << 20)
