from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cohobate.avviolence.nets import attend, attention, dropout


def explicit(query: Tensor, key_value: Tensor, keep: Tensor, rescale: float) -> Tensor:
    heads = len(keep)
    key, value = key_value.chunk(2, -1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    dropped = weights * keep.transpose(0, 1) * rescale
    return (dropped @ v).transpose(1, 2).flatten(2)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(5, 7, 12, dtype=dtype, requires_grad=True),
        torch.randn(5, 9, 24, dtype=dtype, requires_grad=True),
    )


@pytest.mark.parametrize("block", [1, 130, 10_000])
def test_blocked_attention_equals_stored_attention(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block)
    query, key_value = inputs()
    torch.manual_seed(1)
    got = attend(query, key_value, 3, 0.25)
    torch.manual_seed(1)
    keep = attention.keep_mask((3, 5, 7, 9), 0.25)
    want = explicit(query, key_value, keep, 4 / 3)
    torch.testing.assert_close(got, want)
    direction = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs_of := (query, key_value), direction),
        torch.autograd.grad(want, inputs_of, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_dropout_it_is_plain_attention() -> None:
    query, key_value = inputs()
    keep = torch.ones(3, 5, 7, 9)
    torch.testing.assert_close(attend(query, key_value, 3), explicit(query, key_value, keep, 1.0))


def test_the_mean_over_masks_is_attention_without_dropout() -> None:
    query, key_value = (x.detach() for x in inputs())
    many = attend(query.repeat(4000, 1, 1), key_value.repeat(4000, 1, 1), 3, 0.25)
    plain = attend(query, key_value, 3)
    error = many.unflatten(0, (4000, 5)).mean(0) - plain
    assert error.abs().max() < 0.05


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_zeroes_the_share_it_should_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(400, 500), probability)
    assert ((y == 0).float().mean() - probability).abs() < 0.005
    assert (y.mean() - 1).abs() < 0.01
    assert y.unique().numel() == 2


def test_dropout_adds_to_its_base_with_the_gradient_of_both() -> None:
    x, base = torch.randn(2, 50, 60, requires_grad=True).unbind(0)
    torch.manual_seed(3)
    noise = dropout(torch.ones(50, 60), 0.3)
    torch.manual_seed(3)
    out = dropout(x, 0.3, base=base)
    torch.testing.assert_close(out, base + x * noise)
    dx, db = torch.autograd.grad(out.sum(), (x, base))
    torch.testing.assert_close(dx, noise)
    torch.testing.assert_close(db, torch.ones_like(base))
