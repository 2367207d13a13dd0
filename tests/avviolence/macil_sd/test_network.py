from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cohobate.avviolence.macil_sd import AudioVisualNet, VisualNet, checkpoint, losses
from cohobate.avviolence.nets import TemporalMIL, VisualTemporalMIL
from cohobate.core.errors import InputError
from cohobate.core.testing import golden, run_command

GOLDEN = Path(__file__).parent / "golden"


def official(path: Path, spoil: dict[str, Tensor | None] | None = None) -> Path:
    """The released weights, those that no forward pass reads added as noise."""
    state = golden(GOLDEN / "official_ckpt_live.npz")
    for name, shape in checkpoint.dead_shapes(AudioVisualNet()).items():
        state[name] = torch.randn(shape)
    for name, value in (spoil or {}).items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize("case", ["s8", "s9"])
def test_the_released_checkpoint_gives_the_official_outputs(tmp_path: Path, case: str) -> None:
    network = checkpoint.load_official(official(tmp_path / "macil_sd.pkl")).eval()
    z = golden(GOLDEN / f"network_ckpt_{case}.npz")
    visual, audio = (z[f"{kind}_u8"].float() / float(z["scale"]) for kind in ("visual", "audio"))
    with torch.no_grad():
        found = network(visual, audio)
    wanted = {
        "audio_prob": found.audio_logits.sigmoid()[..., None],
        "visual_prob": found.visual_logits.sigmoid()[..., None],
        "av_logits": found.logits[..., None],
        "visual_out": found.visual_rep,
        "audio_out": found.audio_rep,
        "bag_prob": losses.bag_logits(found.logits, z["seq_len"]).sigmoid(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(value, z[name], rtol=1e-4, atol=1e-5)
    partner = VisualNet().eval()
    partner.load_state_dict(
        {k: v for k, v in network.state_dict().items() if not k.startswith("fc_a")}
    )
    with torch.no_grad():
        alone = partner(visual)
    torch.testing.assert_close(alone[..., None], z["visual_only_logits"], rtol=1e-4, atol=1e-5)
    bag = losses.bag_logits(alone, z["seq_len"]).sigmoid()
    torch.testing.assert_close(bag, z["visual_only_bag_prob"], rtol=1e-4, atol=1e-5)


def test_parameters_are_counted_as_officially() -> None:
    assert checkpoint.count_parameters(AudioVisualNet()) == {"live": 247_425, "official": 347_009}
    assert checkpoint.count_parameters(VisualNet())["official"] == 330_497


def test_what_is_written_has_the_released_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = AudioVisualNet(10, 6, hidden=8, heads=2, ffn=12)
    checkpoint.save_official(network, tmp_path / "a.pkl")
    state = torch.load(tmp_path / "a.pkl", weights_only=True)
    assert "multiheadattn.linears.0.weight" in state
    assert (
        sum(t.numel() for t in state.values()) == checkpoint.count_parameters(network)["official"]
    )
    back = checkpoint.network_of(state, tmp_path / "a.pkl", heads=2)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), back.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        ({"fc_a.bias": None}, "no weights for fc_a.bias"),
        ({"extra.weight": torch.ones(2)}, "extra.weight is not part of"),
        ({"fc_v.bias": torch.ones(3)}, r"has shape \(3,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, spoil: dict[str, Tensor | None], fault: str
) -> None:
    with pytest.raises(InputError, match=f"macil_sd.pkl: .*{fault}"):
        checkpoint.load_official(official(tmp_path / "macil_sd.pkl", spoil))


def test_the_released_checkpoint_becomes_a_run_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cohobate.avviolence.macil_sd import __main__ as command

    command.take(official(tmp_path / "macil_sd.pkl"), tmp_path / "run")
    assert "347,009 parameters officially, 247,425 live" in capsys.readouterr().out
    command.give(tmp_path / "run", tmp_path / "back.pkl")
    one, two = (torch.load(tmp_path / n, weights_only=True) for n in ("macil_sd.pkl", "back.pkl"))
    assert one.keys() == two.keys()
    for theirs in checkpoint.official_names().values():
        assert torch.equal(one[theirs], two[theirs])
    monkeypatch.chdir(tmp_path)
    done = run_command("export", "avviolence/macil-sd", "--checkpoint", "run")
    assert done.code == 0, done


def test_attention_projections_start_equal_and_separate() -> None:
    layer = AudioVisualNet().layer
    assert torch.equal(layer.query.weight, layer.value.weight)
    assert layer.query.weight is not layer.value.weight


def test_padding_is_attended_as_officially() -> None:
    torch.manual_seed(0)
    network = AudioVisualNet(4, 3, hidden=8, heads=2, ffn=8).eval()
    visual, audio = torch.randn(1, 5, 4), torch.randn(1, 5, 3)
    longer = (
        torch.cat((visual, torch.zeros(1, 3, 4)), 1),
        torch.cat((audio, torch.zeros(1, 3, 3)), 1),
    )
    with torch.no_grad():
        alone, padded = network(visual, audio).logits, network(*longer).logits[:, :5]
    assert not torch.allclose(alone, padded, atol=1e-4)


def test_the_plain_networks_share_what_is_merged() -> None:
    one, two = TemporalMIL(6, 4, hidden=8), VisualTemporalMIL(6, hidden=8)
    merged = losses.merge_(one, two, 0.5)
    assert set(merged) == {n for n, _ in one.named_parameters() if not n.startswith("fc_a")}
    found = one(torch.randn(2, 9, 6), torch.randn(2, 9, 4))
    torch.testing.assert_close(found.logits, found.audio_logits + found.visual_logits)
    assert found.audio_rep.shape == (2, 9, 8)
