"""The sparse layers against dense convolution, recorded layers, and finite differences."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.lidar.nets import build
from cohobate.lidar.sparse import Grid, KernelMap, sparse_conv
from cohobate.lidar.sparse.geometry import pack, unpack

Recorded = Callable[[str], dict[str, Any]]
needs_spconv = pytest.mark.skipif(
    importlib.util.find_spec("spconv") is None, reason="spconv is not installed"
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def voxels(count: int, low: int, high: int, seed: int = 0) -> Tensor:
    """Distinct coordinates in two batches, negative ones among them, in no order."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, high, (count, 3), generator=rng)
    batch = torch.randint(0, 2, (count, 1), generator=rng)
    places = torch.cat([batch, drawn], 1).unique(dim=0)
    return places[torch.randperm(len(places), generator=rng)]


def dense(coordinates: Tensor, features: Tensor, low: int, size: int) -> Tensor:
    """(B, C, size, size, size), zero where no voxel is."""
    grid = features.new_zeros(2, size, size, size, features.shape[1])
    b, x, y, z = coordinates.unbind(1)
    return grid.index_put((b, x - low, y - low, z - low), features).permute(0, 4, 1, 2, 3)


def at(grid: Tensor, coordinates: Tensor, low: int) -> Tensor:
    b, x, y, z = coordinates.unbind(1)
    return grid[b, :, x - low, y - low, z - low]


def filters(kernel: Tensor, size: int) -> Tensor:
    """(K, C_in, C_out), first axis fastest → (C_out, C_in, x, y, z)."""
    return kernel.reshape(size, size, size, *kernel.shape[1:]).permute(4, 3, 2, 1, 0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [1, 40, 200])
def test_stride_1_equals_dense_convolution(seed: int, count: int) -> None:
    coordinates = voxels(count, -5, 5, seed)
    grid, order = Grid.of(coordinates)
    x = torch.randn(len(order), 3, dtype=torch.float64)
    kernel = torch.randn(27, 3, 4, dtype=torch.float64)
    places = coordinates[order]
    expected = F.conv3d(dense(places, x, -5, 10), filters(kernel, 3), padding=1)
    torch.testing.assert_close(sparse_conv(x, kernel, grid.neighbours()), at(expected, places, -5))


@pytest.mark.parametrize("count", [1, 40, 200])
def test_stride_2_and_back_equal_dense_convolution(count: int) -> None:
    coordinates = voxels(count, -6, 6)
    grid, order = Grid.of(coordinates)
    places = coordinates[order]
    x = torch.randn(len(order), 3, dtype=torch.float64)
    down, up = torch.randn(8, 3, 4).double(), torch.randn(8, 4, 2).double()
    coarse, pairs = grid.coarser()
    lower = sparse_conv(x, down, pairs)
    expected = F.conv3d(dense(places, x, -6, 12), filters(down, 2), stride=2)
    torch.testing.assert_close(lower, at(expected, coarse.coordinates(), -3))
    back = sparse_conv(lower, up, pairs.transposed())
    wide = dense(coarse.coordinates(), lower, -3, 6)
    # conv_transpose3d takes (C_in, C_out, ...)
    expected = F.conv_transpose3d(wide, filters(up, 2).transpose(0, 1), stride=2)
    torch.testing.assert_close(back, at(expected, places, -6))


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (0, 1, 1)),
        ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ],
)
def test_any_stride_and_padding_equal_dense_convolution(
    size: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int]
) -> None:
    coordinates = voxels(60, 0, 8)
    grid, order = Grid.of(coordinates)
    x = torch.randn(len(order), 2, dtype=torch.float64)
    kernel = torch.randn(size[0] * size[1] * size[2], 2, 3, dtype=torch.float64)
    weight = kernel.reshape(*size, 2, 3).permute(4, 3, 0, 1, 2)
    expected = F.conv3d(dense(coordinates[order], x, 0, 8), weight, stride=stride, padding=padding)
    shape = tuple(expected.shape[2:])
    coarse, pairs = grid.strided(size, stride, padding, shape)  # type: ignore[arg-type]
    found = sparse_conv(x, kernel, pairs)
    torch.testing.assert_close(found, at(expected, coarse.coordinates(), 0))
    # where no output is active, the dense one has no input under its kernel
    active = torch.zeros(2, *shape, dtype=torch.bool)
    active[tuple(coarse.coordinates().T)] = True
    assert expected.permute(0, 2, 3, 4, 1)[~active].abs().max() == 0


def test_gradients_equal_finite_differences() -> None:
    grid, order = Grid.of(voxels(12, -2, 2))
    x = torch.randn(len(order), 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(27, 2, 3, dtype=torch.float64, requires_grad=True)
    _, down = grid.coarser()
    small = torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True)
    lower = torch.randn(down.size_out, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: sparse_conv(a, b, grid.neighbours()), (x, kernel))
    assert torch.autograd.gradcheck(lambda a, b: sparse_conv(a, b, down), (x, small))
    back = down.transposed()
    assert torch.autograd.gradcheck(lambda a, b: sparse_conv(a, b, back), (lower, small))


@pytest.mark.parametrize("name", ["subm3", "down2", "down_up"])
def test_layers_equal_the_recorded_ones(name: str, recorded: Recorded) -> None:
    z = recorded(f"sparse_{name}_a")
    grid, order = Grid.of(z["coords"])
    x = z["feats"][order].requires_grad_()
    kernel = z["kernel"].requires_grad_()
    outer, step = grid, 1
    if name == "subm3":
        out = sparse_conv(x, kernel, grid.neighbours())
    elif name == "down2":
        outer, pairs = grid.coarser()
        out, step = sparse_conv(x, kernel, pairs), 2
    else:
        down = z["kernel_down"].requires_grad_()
        _, pairs = grid.coarser()
        out = sparse_conv(sparse_conv(x, down, pairs), kernel, pairs.transposed())
    places = outer.coordinates() * torch.tensor([1, step, step, step])
    assert torch.equal(places, z["out_coords"].long())
    torch.testing.assert_close(out, z["out_feats"], rtol=1e-5, atol=1e-5)
    (out * z["grad_out"]).sum().backward()
    torch.testing.assert_close(x.grad, z["grad_feats"][order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel.grad, z["grad_kernel"], rtol=1e-5, atol=2e-5)
    if name == "down_up":
        torch.testing.assert_close(down.grad, z["grad_kernel_down"], rtol=1e-5, atol=2e-5)


def test_maps_are_made_once() -> None:
    grid, _ = Grid.of(voxels(30, -3, 3))
    assert grid.neighbours() is grid.neighbours()
    assert grid.coarser()[0] is grid.coarser()[0]


def test_packing_keeps_coordinates() -> None:
    far = torch.tensor([[3, -32766, 0, 32766], [0, 1, -1, 5]])
    assert torch.equal(unpack(pack(far)), far)


@pytest.mark.parametrize(
    ("coordinates", "words"),
    [
        (torch.zeros(2, 3).long(), "expected integers"),
        (torch.zeros(2, 4), "expected integers"),
        (torch.tensor([[0, 40000, 0, 0]]), "voxel size"),
        (torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]]), "twice"),
    ],
)
def test_bad_coordinates(coordinates: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Grid.of(coordinates)


def test_a_kernel_that_does_not_fit() -> None:
    one = torch.tensor([0])
    pairs = KernelMap((one,), (one,), 1, 1)
    with pytest.raises(InputError, match="kernel"):
        sparse_conv(torch.ones(1, 2), torch.ones(1, 3, 4), pairs)
    with pytest.raises(InputError, match="backend"):
        sparse_conv(torch.ones(1, 3), torch.ones(1, 3, 4), pairs, "other")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("spconv") is not None, reason="spconv is installed")
def test_a_backend_that_is_not_installed() -> None:
    one = torch.tensor([0])
    with pytest.raises(InputError, match="not installed"):
        sparse_conv(
            torch.ones(1, 3), torch.ones(1, 3, 4), KernelMap((one,), (one,), 1, 1), "spconv"
        )


@needs_spconv
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default")
def test_both_backends_agree() -> None:
    grid, order = Grid.of(voxels(300, -6, 6))
    for pairs, volume in ((grid.neighbours(), 27), (grid.coarser()[1], 8)):
        found = []
        for backend in ("torch", "spconv"):
            rng = torch.Generator().manual_seed(0)
            x = torch.randn(len(order), 8, generator=rng).requires_grad_()
            kernel = torch.randn(volume, 8, 16, generator=rng).requires_grad_()
            out = sparse_conv(x, kernel, pairs, backend)  # type: ignore[arg-type]
            out.square().sum().backward()
            found.append((out, x.grad, kernel.grad))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-4 * float(one.detach().abs().max())
            )


@needs_spconv
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default")
def test_a_network_learns_alike_on_both_backends() -> None:
    coordinates = voxels(400, -8, 8)
    x = torch.randn(len(coordinates), 1, generator=torch.Generator().manual_seed(0))
    found = []
    for backend in ("torch", "spconv"):
        torch.manual_seed(0)
        network = build("unet-small", 5, backend=backend)  # type: ignore[arg-type]
        out = network(coordinates, x)
        out.square().mean().backward()
        found.append([out, *(p.grad for p in network.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-4 * float(one.detach().abs().max())
        )


@needs_spconv
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default")
def test_voxelnet_is_the_same_on_both_backends() -> None:
    coordinates = voxels(300, 0, 40)
    points = torch.nn.functional.pad(torch.rand(20, 3) * 8 - 51, (1, 0))
    points[10:, 0] = 1
    x, found = torch.randn(len(coordinates), 4), []
    for backend in ("torch", "spconv"):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(build("voxelnet", 8, backend=backend).eval()(coordinates, x, points))  # type: ignore[arg-type]
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@needs_spconv
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default")
def test_what_spconv_computes_wrongly_is_refused() -> None:
    one = torch.tensor([0])
    pairs, kernel = KernelMap((one,), (one,), 1, 1), torch.ones(1, 3, 4)
    with pytest.raises(InputError, match="float64"):
        sparse_conv(torch.ones(1, 3).double(), kernel.double(), pairs, "spconv")
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="OMP_NUM_THREADS=1"):
        sparse_conv(torch.ones(1, 3), kernel, pairs, "spconv")


def test_mixed_precision_sums_in_float32() -> None:
    torch.manual_seed(0)
    network, coordinates = build("unet-small", 4), voxels(300, -6, 6)
    x = torch.randn(len(coordinates), 1)
    outputs = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(coordinates, x)
        out.float().square().sum().backward()
        kernel = network.get_submodule("conv0p1s1").kernel
        assert isinstance(kernel, Tensor)
        assert kernel.grad is not None
        outputs.append((out.detach().float(), kernel.grad.clone()))
    for one, other in zip(*outputs, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95
    grid, order = Grid.of(coordinates)
    _, pairs = grid.coarser()
    with torch.autocast("cpu", torch.bfloat16):
        lower = sparse_conv(x[order].bfloat16(), torch.randn(8, 1, 4), pairs)
    assert lower.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["neighbours", "coarser", "back", "strided"])
def test_cuda_equals_cpu(name: str) -> None:
    coordinates = voxels(300, 0, 12)
    results = []
    for device in ("cpu", "cuda"):
        grid, _ = Grid.of(coordinates.to(device))
        if name == "neighbours":
            pairs = grid.neighbours()
        elif name == "strided":
            _, pairs = grid.strided((3, 3, 3), (2, 2, 2), (1, 1, 1), (6, 6, 6))
        else:
            _, pairs = grid.coarser()
            pairs = pairs.transposed() if name == "back" else pairs
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(pairs.size_in, 8, generator=rng).to(device).requires_grad_()
        w = torch.randn(len(pairs.inputs), 8, 16, generator=rng).to(device).requires_grad_()
        out = sparse_conv(x, w, pairs)
        out.square().sum().backward()
        assert x.grad is not None
        assert w.grad is not None
        results.append((grid.keys.cpu(), out.detach().cpu(), x.grad.cpu(), w.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@needs_spconv
def test_spconv_equals_ours_on_cuda() -> None:
    coordinates = voxels(300, -6, 6).cuda()
    found = []
    for backend in ("torch", "spconv"):
        torch.manual_seed(0)
        network = build("unet-small", 4, backend=backend).cuda()  # type: ignore[arg-type]
        x = torch.randn(len(coordinates), 1, generator=torch.Generator().manual_seed(1)).cuda()
        out = network(coordinates, x)
        out.square().sum().backward()
        kernel = network.get_submodule("conv0p1s1").kernel
        assert isinstance(kernel, Tensor)
        assert kernel.grad is not None
        found.append((out.detach(), kernel.grad.clone()))
    torch.testing.assert_close(*zip(*found, strict=True), rtol=1e-3, atol=1e-3)
