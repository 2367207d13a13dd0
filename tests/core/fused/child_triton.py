"""Run by test_triton.py in a process of its own under TRITON_INTERPRET=1; prints differences."""

from __future__ import annotations

import sys

import torch

from cohobate.core.fused import Probabilities, linear_divergence, triton_rows
from cohobate.core.losses import KINDS


def main() -> int:
    torch.manual_seed(0)
    triton_rows._BLOCK = 4  # several blocks to a row of seven classes
    wrong = 0
    cases = [(kind, "hidden") for kind in KINDS]
    cases += [("forward_kl", "probabilities"), ("jensen_shannon", "probabilities")]
    cases += [("forward_kl", "logits"), ("forward_kl", "none"), ("forward_kl", "unlabelled")]
    for number, (kind, source) in enumerate(cases):
        x, w, bias = (torch.randn(s).requires_grad_() for s in ((3, 4), (7, 4), (7,)))
        x_t, w_t = torch.randn(3, 6), torch.randn(7, 6)
        if source == "probabilities":
            x_t, w_t = Probabilities(torch.randn(3, 7).softmax(1)), None
        elif source == "logits":  # not contiguous
            x_t, w_t = torch.randn(7, 3).t(), None
        elif source == "none":
            x_t, w_t = None, None
        labels = None if source == "unlabelled" else torch.randint(0, 7, (3,))
        plain = number % 2 == 0
        results = []
        for backend in ("reference", "triton"):
            for tensor in (x, w, bias):
                tensor.grad = None
            loss = linear_divergence(
                x, w, x_t, w_t, kind=kind, beta=0.3, tau=1.0 if plain else 2.0,
                weight=torch.tensor([1, 0, 0.5]), labels=labels, ce_weight=0.7,
                softcap=None if plain else (3.0, 2.0), scale=1.0 if plain else 0.8, bias_s=bias,
                reduction="none" if number == 2 else "mean", backend=backend,
            ).sum()  # fmt: skip
            loss.backward()
            results.append([loss.detach(), x.grad, w.grad, bias.grad])
        for name, a, b in zip(("loss", "x", "w", "bias"), *results, strict=True):
            error = (a - b).abs().max().item()
            if not error < 2e-6 * max(1.0, a.abs().max().item()):
                wrong += 1
                print(f"{kind} {source} {name}: {error}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
