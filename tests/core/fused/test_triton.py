"""The Triton kernel without a GPU: run by the interpreter, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

from cohobate.core.fused import chunked, tiles
from cohobate.core.fused.spec import Spec
from cohobate.core.losses import KINDS

HOPPER = ("cuda", 90, 32)


def test_interpreted_kernel_equals_the_reference():
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("child_triton.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr


def compile_kernel(kind, labels, want, cap, probabilities, out):
    """Compile one variant of the kernel down to a binary for the GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cohobate.core.fused.triton_rows import _row_kernel

    constants = {
        "KIND": KINDS.index(kind), "TEACHER": True, "PROBABILITIES": probabilities,
        "LABELS": labels, "WANT": want, "CAP_S": cap, "CAP_T": cap, "BLOCK": 4096,
    }  # fmt: skip
    integers = ("classes", "z_stride", "t_stride", "out_stride")
    types = {"label_ptr": "*i64", "out_ptr": out} | dict.fromkeys(integers, "i32")
    types |= dict.fromkeys(constants, "constexpr")
    names = _row_kernel.arg_names
    signature = {name: types.get(name, "*fp32" if "_ptr" in name else "fp32") for name in names}
    source = ASTSource(
        fn=_row_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about a default of the next Triton
        return triton.compile(source, target=GPUTarget(*HOPPER), options={"num_warps": 8})


@pytest.fixture
def triton_cache(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("kind", ["forward_kl", "skewed_reverse_kl"])
def test_the_kernel_compiles_for_a_gpu(kind, triton_cache):
    compiled = compile_kernel(
        kind, labels=True, want=True, cap=True, probabilities=False, out="*bf16"
    )
    assert compiled.asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_compiles_for_a_gpu(kind, triton_cache):
    for flags in product((False, True), repeat=4):
        assert compile_kernel(kind, *flags, out="*fp32").asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_gpu_path_has_sound_shapes_and_types(dtype, masked):
    """Every product of the GPU path on fake tensors: the row stage sees float32 logits, and the
    weight's gradient is a product over a group of chunks."""
    if dtype != torch.float32 and Version(torch.__version__) < Version("2.15"):
        pytest.skip("an older torch asks a driver for the shape of a product with `out_dtype`")
    seen = []

    def stage(raw, teacher, coef, labels, spec, out):
        assert raw.dtype == teacher[0].dtype == torch.float32
        assert raw.shape == teacher[0].shape == out.shape
        assert out.dtype == dtype
        seen.append(len(raw))
        return raw.new_zeros(len(raw)), raw.new_zeros(len(raw))

    groups = []
    add_weight_grad = chunked.add_weight_grad

    def watched(total, dz, x, *, first):
        groups.append(len(dz))
        add_weight_grad(total, dz, x, first=first)

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "add_weight_grad", watched)

        def new(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="cuda")

        spec = Spec("forward_kl", "hidden", 0.5, 1.0, 1.0, 0.0, (1.0, 1.0), (0.0, 0.0))
        problem = chunked.Problem(
            new(5000, 64), new(1000, 64), new(1000), (new(5000, 32), new(1000, 32)),
            new(5000, dtype=torch.float32), None, spec,
            new(4000, dtype=torch.long) if masked else None, (True, True, True),
        )  # fmt: skip
        results = [chunked.evaluate(problem, 512, stage), tiles.evaluate_tiles(problem, 1 << 17)]
        for result in results:
            kept = torch.float32 if dtype == torch.float16 else dtype
            assert {g.dtype for g in (result.x, result.w, result.bias)} == {kept}
            assert result.x.shape == (5000, 64)
            assert result.w.shape == (1000, 64)
    assert max(seen) == 512
    assert sum(seen) == problem.tokens
    if dtype != torch.float32:
        assert groups[0] == 2048
