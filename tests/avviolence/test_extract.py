from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torchvision.models.video import s3d

from cohobate.avviolence.data import read_features
from cohobate.avviolence.features import extractors
from cohobate.avviolence.features.extract import Choice
from cohobate.avviolence.features.vggish import VGGish
from cohobate.core.errors import InputError
from cohobate.core.testing import assert_one_line, run_command

Video = Callable[..., Path]
SECOND = [n / 24 for n in range(36)]


def extract(*words: object) -> object:
    return run_command("extract", *map(str, words), domain="avviolence")


def test_one_command_makes_features_of_a_folder(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    video(tmp_path / "in" / "a.mp4", times=SECOND, sound=1.5)
    video(tmp_path / "in" / "deep" / "b.mp4", times=SECOND[:20], sound=0.3)
    (tmp_path / "in" / "notes.txt").write_text("no video")
    words = [f"[{tmp_path / 'in'}]", tmp_path / "out", "--visual", tiny_network]
    done = extract(*words, "--audio", "logmel", "--crops", "5")
    assert done.code == 0, done
    found = read_features(tmp_path / "out" / "a.safetensors")
    assert found.visual.shape == (5, 2, 16)
    assert found.audio.shape == (2, 128)
    assert found.visual_extractor.startswith("tiny-videomae@")
    assert found.audio_extractor == "logmel"
    with (tmp_path / "out" / "report.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert float(rows["b.mp4"]["difference"]) == pytest.approx(0.3 - 2 / 3, abs=0.1)
    assert rows["a.mp4"]["snippets"] == "2"


def test_finished_files_are_kept_and_other_extractors_refused(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    words = [f"[{video(tmp_path / 'a.mp4', times=SECOND, sound=1.5)}]", tmp_path / "out"]
    words += ["--visual", tiny_network, "--audio", "logmel"]
    assert extract(*words).code == 0
    before = (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns
    assert extract(*words).code == 0
    assert (tmp_path / "out" / "a.safetensors").stat().st_mtime_ns == before
    assert_one_line(extract(*words, "--crops", "5"), "a.safetensors", "choose another folder")


def test_a_corrupt_file_is_reported_and_skipped(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "c"):
        video(tmp_path / "in" / f"{name}.mp4", times=SECOND, sound=1.5)
    (tmp_path / "in" / "b.mp4").write_bytes(b"\0" * 1000)
    words = [f"[{tmp_path / 'in'}]", tmp_path / "out", "--visual", tiny_network]
    assert_one_line(extract(*words, "--audio", "logmel"), "1 of 3 files skipped", "b.mp4")
    assert {p.stem for p in (tmp_path / "out").glob("*.safetensors")} == {"a", "c"}


@pytest.mark.slow
def test_worker_processes_give_the_same_features(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        video(tmp_path / "in" / f"{name}.mp4", times=SECOND, sound=1.5)
    words = ["--visual", tiny_network, "--audio", "logmel"]
    assert extract(f"[{tmp_path / 'in'}]", tmp_path / "one", *words).code == 0
    assert extract(f"[{tmp_path / 'in'}]", tmp_path / "two", *words, "--jobs", "2").code == 0
    for name in ("a", "b"):
        one, two = (read_features(tmp_path / x / f"{name}.safetensors") for x in ("one", "two"))
        np.testing.assert_allclose(one.visual, two.visual, atol=1e-6)
        np.testing.assert_array_equal(one.audio, two.audio)


def test_a_silent_video_gets_silence_and_a_warning(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    path = video(tmp_path / "a.mp4", times=SECOND)
    extraction = Choice(str(tiny_network), "logmel").load()
    with pytest.warns(UserWarning, match="has no sound, silence is used"):
        features = extraction.run(path).features
    assert not features.has_sound
    np.testing.assert_allclose(features.audio[:, :64], np.log(0.01), atol=1e-5)


@pytest.mark.slow
def test_memory_stays_flat_over_many_clips(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    path = video(tmp_path / "a.mp4", times=SECOND, size=(320, 240), sound=1.5)
    extraction = Choice(str(tiny_network), "logmel").load()
    process, used = psutil.Process(), []
    for _ in range(200):
        extraction.run(path)
        used.append(process.memory_info().rss)
    assert max(used[100:]) - max(used[:100]) < 20e6


def test_s3d_gives_1024_numbers_from_local_weights(tmp_path: Path, video: Video) -> None:
    torch.manual_seed(0)
    network = s3d()
    torch.save(network.state_dict(), tmp_path / "s3d.pt")
    extractor = extractors.visual_extractor("s3d", tmp_path / "s3d.pt")
    snippet = torch.randint(256, (16, 60, 80, 3), dtype=torch.uint8)
    clip = extractor.crops(snippet, 1)
    assert clip.shape == (1, 16, 3, 224, 224)
    network.eval()
    with torch.inference_mode():
        maps = network.avgpool(network.features(clip.transpose(1, 2)))
        torch.testing.assert_close(extractor(clip), maps.flatten(1))
    assert maps.flatten(1).shape == (1, 1024)


def test_an_identity_follows_the_weights_and_not_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert extractors.identity("x", one) != extractors.identity("x", two)
    two.load_state_dict(one.state_dict())
    assert extractors.identity("x", one) == extractors.identity("x", two)


def test_vggish_flattens_by_time_frequency_channel() -> None:
    with torch.device("meta"):
        network = VGGish()
    assert sum(p.numel() for p in network.parameters()) == 72_141_184
    maps = torch.arange(2.0 * 3 * 6 * 4).view(2, 3, 6, 4)
    network.features, network.embeddings = _Constant(maps), torch.nn.Identity()
    flat = network(torch.zeros(2, 96, 64))
    for time, band, channel in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (5, 3, 2)):
        place = (time * 4 + band) * 3 + channel
        torch.testing.assert_close(flat[:, place], maps[:, channel, time, band])


def test_vggish_whitens_clips_and_rounds() -> None:
    with torch.device("meta"):
        network = VGGish(postprocess=True)
    embedding = torch.linspace(-1, 3, 128)[None]
    network.features = torch.nn.Identity()
    network.embeddings = _Constant(embedding)
    torch.manual_seed(0)
    network.pca_eigen_vectors, network.pca_means = torch.randn(128, 128) / 9, torch.ones(128, 1)
    whitened = network.pca_eigen_vectors @ (embedding.T - network.pca_means)
    want = ((whitened.T.clamp(-2, 2) + 2) / 4 * 255).round()
    torch.testing.assert_close(network(torch.zeros(1, 4, 4)), want)
    assert (want == 255).any()


class _Constant(torch.nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda p: extractors.visual_extractor("i3d"), "neither a video model of torchvision"),
        (lambda p: extractors.visual_extractor("resnet50"), "neither a video model"),
        (lambda p: extractors.audio_extractor("yamnet"), "neither vggish"),
        (lambda p: extractors.visual_extractor("s3d", p / "no.pt"), "no.pt"),
        (lambda p: extractors.visual_extractor(str(p)), "extractor"),
        (lambda p: Choice(crops=3, audio="logmel", visual=str(p)).load(), "extractor"),
    ],
)
def test_extractors_that_cannot_be_had_are_named(
    tmp_path: Path, make: Callable[[Path], object], fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        make(tmp_path)


def test_two_videos_of_one_name_do_not_overwrite_each_other(
    tmp_path: Path, video: Video, tiny_network: Path
) -> None:
    (tmp_path / "x").mkdir()
    one, two = (
        video(tmp_path / "a.mp4", times=SECOND),
        video(tmp_path / "x" / "a.mp4", times=SECOND),
    )
    words = [f"[{one},{two}]", tmp_path / "out", "--visual", tiny_network, "--audio", "logmel"]
    assert_one_line(extract(*words), "same name")


def test_ast_and_clap_are_audio_extractors(tmp_path: Path) -> None:
    from transformers import (
        ASTConfig,
        ASTFeatureExtractor,
        ASTModel,
        ClapAudioConfig,
        ClapAudioModel,
        ClapFeatureExtractor,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ast = ASTModel(ASTConfig(**small, intermediate_size=16, max_length=128, num_mel_bins=64))
    ast.save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(max_length=128, num_mel_bins=64).save_pretrained(tmp_path / "ast")
    found = extractors.audio_extractor(str(tmp_path / "ast"))(torch.randn(3, 15_600))
    assert found.shape == (3, 16)
    assert torch.isfinite(found).all()
    clap = ClapAudioModel(
        ClapAudioConfig(
            hidden_size=32, patch_embeds_hidden_size=4, depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 1, 1], spec_size=256, num_mel_bins=64,
        )
    )  # fmt: skip
    clap.save_pretrained(tmp_path / "clap")
    ClapFeatureExtractor().save_pretrained(tmp_path / "clap")
    found = extractors.audio_extractor(str(tmp_path / "clap"))(torch.randn(2, 15_600))
    assert found.shape == (2, 32)
