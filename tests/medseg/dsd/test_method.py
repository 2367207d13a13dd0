from __future__ import annotations

import pytest
import torch
from torch import nn

from cohobate.core.errors import InputError
from cohobate.core.testing import assert_recipe_parses, recipes
from cohobate.medseg.data import Preprocess
from cohobate.medseg.dsd import DSD, dice_ce, distillation, prepare

SMALL = {"filters": [4, 6, 8, 8]}  # strides 1, 2, 4, 8: three stages a side


def dsd(**options):
    torch.manual_seed(0)
    shape = {
        "num_classes": 3,
        "in_channels": 1,
        "class_names": ["background", "one", "two"],
        "roi_size": (16, 16, 16),
        "preprocess": Preprocess(),
        "backbone_args": SMALL,
    }
    return DSD(**{**shape, **options}).train()


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(2, 1, 16, 16, 16, generator=rng),
        "label": torch.randint(0, 3, (2, 1, 16, 16, 16), generator=rng, dtype=torch.uint8),
    }


def test_the_loss_is_the_papers(batch):
    model = dsd(alpha=0.5, temperature=2.0)
    out = model.model(batch["image"])
    y = prepare(batch["label"], out.main)
    d, e = out.decoder, out.encoder
    expected = dice_ce(out.main, y) + sum(dice_ce(z, y) for z in d)
    kl = distillation(d[1:], d[0], temperature=2.0).sum()
    kl = kl + distillation(e[:-1], e[-1], temperature=2.0).sum()
    torch.testing.assert_close(model.training_step(batch, 0), expected + 0.5 * kl)


def test_the_baseline_has_the_output_alone(batch):
    model = dsd(distill=False)
    logits = model.student(batch["image"])
    loss = model.training_step(batch, 0)
    torch.testing.assert_close(loss, dice_ce(logits, prepare(batch["label"], logits)))
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in model.student.parameters())


@pytest.mark.parametrize("backbone", ["dynunet", "vnet"])
def test_all_arms_start_alike(backbone, batch):
    arms = []
    args = SMALL if backbone == "dynunet" else {}
    size = (16, 16, 16) if backbone == "dynunet" else (32, 32, 32)
    for options in ({}, {"kl": "none"}, {"distill": False}):
        model = dsd(backbone=backbone, backbone_args=args, roi_size=size, **options)
        arms.append((model.student.state_dict(), torch.rand(4)))
    for state, after in arms[1:]:
        assert all(torch.equal(state[k], v) for k, v in arms[0][0].items())
        assert torch.equal(after, arms[0][1])  # dropout goes on alike as well


@pytest.mark.parametrize(
    ("kl", "terms", "sides"),
    [
        ("both", {"deep_supervision", "decoder_kl", "encoder_kl"}, {"enc", "dec"}),
        ("decoder", {"deep_supervision", "decoder_kl"}, {"dec"}),
        ("encoder", {"deep_supervision", "encoder_kl"}, {"enc", "dec"}),
        ("none", {"deep_supervision"}, {"dec"}),
    ],
)
def test_ablations(kl, terms, sides, batch):
    model = dsd(kl=kl)
    outputs = model.forward_train(batch)
    assert set(model.distill_loss(outputs, batch)) == terms
    assert {stage.name[:3] for stage in model.model.stages} == sides
    model.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("share", ["auto", "never"])
@pytest.mark.parametrize("detach", ["none", "decoder", "both"])
def test_detached_teachers(detach, share, batch):
    """With heads of their own, E_Z's head has no loss but the encoder KL."""
    model = dsd(detach_teacher=detach, share_heads=share)
    outputs = model.forward_train(batch)
    terms = model.distill_loss(outputs, batch)
    found = outputs.outputs
    for name, logits, stopped in (
        ("decoder_kl", found.decoder[0], detach != "none"),
        ("encoder_kl", found.encoder[-1], detach == "both"),
    ):
        (grad,) = torch.autograd.grad(terms[name], logits, retain_graph=True, allow_unused=True)
        assert (grad is None) == stopped
    model.zero_grad()
    model.training_step(batch, 0).backward()
    silent = {n for n, p in model.model.heads.named_parameters() if p.grad is None}
    trains_nothing = detach == "both" and share == "never"
    assert all(name.startswith("enc3.") for name in silent)
    assert bool(silent) == trains_nothing


def test_background_can_be_left_out(batch):
    model = dsd(kl_background=False)
    outputs = model.forward_train(batch)
    d = outputs.outputs.decoder
    expected = distillation(d[1:], d[0], include_background=False).sum()
    torch.testing.assert_close(model.distill_loss(outputs, batch)["decoder_kl"], expected)


def test_learnable_weights(batch):
    model = dsd(learn_weights=True)
    assert {k: v.tolist() for k, v in model.student_weights.items()} == {
        "decoder": [1.0, 1.0],
        "encoder": [1.0, 1.0],
    }
    model.training_step(batch, 0).backward()
    out = model.model(batch["image"])
    for side, (students, teacher) in {
        "decoder": (out.decoder[1:], out.decoder[0]),
        "encoder": (out.encoder[:-1], out.encoder[-1]),
    }.items():
        # d(w · KL) / dw is the KL itself
        torch.testing.assert_close(
            model.student_weights[side].grad, distillation(students, teacher)
        )
    assert len(dsd(learn_weights=True, kl="decoder").student_weights) == 1
    assert len(dsd(learn_weights=True, distill=False).student_weights) == 0


def test_the_student_is_the_bare_network():
    model = dsd()
    assert type(model.student).__name__ == "DynUNet"
    (example,) = model.example_input()
    assert example.shape == (1, 1, 16, 16, 16)
    assert model.eval()(example).shape == (1, 3, 16, 16, 16)


class Own(nn.Module):
    """A user's network of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.low = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 2, 2)
        self.up, self.out = nn.ConvTranspose3d(6, 4, 2, 2), nn.Conv3d(4, 3, 1)

    def forward(self, x):
        a = self.top(x)
        return self.out(self.up(self.low(a)) + a)


def test_own_network(batch):
    model = dsd(backbone=Own(), backbone_args=None, encoder=["top", "low"], decoder=["up", "low"])
    model.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
    dsd(backbone=Own(), backbone_args=None, distill=False).training_step(batch, 0)
    with pytest.raises(InputError, match="Own: no preset for this class"):
        dsd(backbone=Own(), backbone_args=None)


def test_learning_rate_is_halved_every_sixth(batch):
    class Length:
        max_epochs = 12

    model = dsd()
    model._trainer = Length()
    found = model.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert optimizer.defaults["weight_decay"] == 1e-5
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1e-3 * 0.5 ** (epoch // 2) for epoch in range(12)]
    model.schedule = "constant"
    assert isinstance(model.configure_optimizers(), torch.optim.AdamW)
    model.schedule, model._trainer.max_epochs = "step", -1
    with pytest.raises(InputError, match=r"model.schedule 'step' needs trainer.max_epochs"):
        model.configure_optimizers()


@pytest.mark.parametrize(("name", "path"), recipes("medseg"), ids=lambda x: str(x).split("/")[-1])
def test_recipes_parse(name, path):
    assert_recipe_parses(path)
