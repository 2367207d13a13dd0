from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cohobate.avviolence.macil_sd import losses
from cohobate.avviolence.macil_sd.losses import bag_logits, contrast_semi_bags
from cohobate.core.losses import info_nce
from cohobate.core.testing import golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["s1", "s2"])
def test_info_nce_matches_the_official_code(case: str) -> None:
    z = golden(GOLDEN / f"info_nce_{case}.npz")
    rows = [z[name].requires_grad_() for name in ("query", "positive", "negatives")]
    loss = info_nce(*rows, temperature=float(z["temperature"]))
    torch.testing.assert_close(loss, z["loss"], rtol=1e-4, atol=1e-5)
    for name, grad in zip(
        ("query", "positive", "negatives"), torch.autograd.grad(loss, rows), strict=True
    ):
        torch.testing.assert_close(grad, z[f"grad_{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["s3", "s4"])
def test_bag_probabilities_match_the_official_code(case: str) -> None:
    z = golden(GOLDEN / f"topk_mil_{case}.npz")
    logits = z["logits"][..., 0].requires_grad_()
    probability = bag_logits(logits, z["seq_len"]).sigmoid()
    torch.testing.assert_close(probability, z["bag_prob"], rtol=1e-4, atol=1e-6)
    (grad,) = torch.autograd.grad(probability.sum(), logits)
    torch.testing.assert_close(grad, z["grad_sum_bag_prob"][..., 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["s5", "s6"])
def test_the_contrastive_terms_match_the_official_code(case: str) -> None:
    z = golden(GOLDEN / f"cmal_{case}.npz")
    reps = [z[name].requires_grad_() for name in ("audio_rep", "visual_rep")]
    scores = (z["audio_scores"], z["visual_scores"], z["seq_len"])
    terms = torch.stack(contrast_semi_bags(z["bag_prob"] > 0.5, *scores, *reps))
    torch.testing.assert_close(terms, z["losses"], rtol=1e-4, atol=1e-5)
    if case == "s5":
        grads = torch.autograd.grad((terms * z["grad_weights"]).sum(), reps)
        for name, grad in zip(("audio", "visual"), grads, strict=True):
            torch.testing.assert_close(grad, z[f"grad_{name}_rep"], rtol=1e-4, atol=1e-5)


def test_the_schedules_match_the_official_code() -> None:
    z = golden(GOLDEN / "schedules.npz")
    for epoch in range(50):
        assert losses.merge_coefficient(epoch) == pytest.approx(float(z["m"][epoch]), abs=1e-12)
        assert losses.contrast_weight(epoch) == pytest.approx(float(z["lam"][epoch]), abs=1e-12)


def loop_over_bags(
    violent: Tensor,
    audio_scores: Tensor,
    visual_scores: Tensor,
    lengths: Tensor,
    a: Tensor,
    v: Tensor,
) -> list[Tensor]:
    """The same terms written bag by bag in float64, from the description alone."""
    high: dict[str, list[Tensor]] = {"a": [], "v": []}
    low: dict[str, list[Tensor]] = {"a": [], "v": []}
    normal: dict[str, list[Tensor]] = {"a": [], "v": []}
    for i, n in enumerate(lengths.tolist()):
        k = n // 16 + 1
        for kind, scores, rep in (("a", audio_scores, a), ("v", visual_scores, v)):
            order = scores[i, :n].argsort(descending=True)
            low[kind] += list(rep[i, order[-k:]])
            top = rep[i, order[:k]]
            if violent[i]:
                high[kind] += [top.mean(0)] * k
            else:
                normal[kind] += list(top)
    unit = torch.nn.functional.normalize

    def term(query: list[Tensor], positive: list[Tensor], negatives: list[Tensor]) -> Tensor:
        q, p, z = (unit(torch.stack(rows), dim=-1) for rows in (query, positive, negatives))
        logits = torch.cat(((q * p).sum(1, keepdim=True), q @ z.T), 1) / 0.1
        return -logits.log_softmax(1)[:, 0].mean()

    return [
        term(high["a"], high["v"], low["v"]),
        term(high["a"], high["v"], normal["v"]),
        term(high["v"], high["a"], low["a"]),
        term(high["v"], high["a"], normal["a"]),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_vectorised_terms_equal_a_loop_over_bags(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor([1, 15, 16, 17, 40, 33, 2])
    scores = torch.rand(2, 7, 40, dtype=torch.float64).unbind(0)
    reps = [torch.randn(7, 40, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    violent = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    got = contrast_semi_bags(violent, *scores, lengths, *reps)
    want = loop_over_bags(violent, *scores, lengths, *reps)
    torch.testing.assert_close(torch.stack(got), torch.stack(want))
    grads = [torch.autograd.grad(sum(x), reps, retain_graph=True) for x in (got, want)]
    torch.testing.assert_close(grads[0], grads[1])


def test_gradients_of_the_terms_are_right() -> None:
    torch.manual_seed(0)
    reps = [torch.randn(3, 17, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scores, lengths = torch.rand(2, 3, 17).unbind(0), torch.tensor([17, 5, 16])
    violent = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda a, v: sum(contrast_semi_bags(violent, *scores, lengths, a, v)), reps
    )


@pytest.mark.parametrize("kind", [True, False])
def test_a_batch_of_one_kind_contrasts_nothing(kind: bool) -> None:
    rep = torch.randn(2, 20, 4)
    violent, lengths = torch.full((2,), kind), torch.tensor([20, 3])
    scores = torch.rand(2, 20)
    assert torch.stack(contrast_semi_bags(violent, scores, scores, lengths, rep, rep)).eq(0).all()


def test_padding_never_enters_a_bag() -> None:
    lengths = torch.tensor([3, 18])
    logits = torch.full((2, 40), 1e6)
    for bag, n in enumerate(lengths.tolist()):
        logits[bag, :n] = torch.arange(n).float()
    assert bag_logits(logits, lengths).tolist() == [2.0, 16.5]


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"bag lengths must lie in 1..8"):
        bag_logits(torch.zeros(2, 8), torch.tensor(lengths))


def test_a_merge_moves_one_network_towards_the_other_and_no_further() -> None:
    torch.manual_seed(0)
    one = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 3)})
    two = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 4)})
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in (one, two)]
    assert losses.merge_(one, two, 0.75) == ["a.weight", "a.bias"]
    for key, value in one.state_dict().items():
        want = before[0][key]
        if key.startswith("a"):
            want = 0.75 * want + 0.25 * before[1][key]
        torch.testing.assert_close(value, want)
    assert all(torch.equal(value, before[1][key]) for key, value in two.state_dict().items())
