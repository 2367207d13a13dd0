from __future__ import annotations

import dataclasses

import pytest
import torch

from cohobate.core.cache import TeacherCache, write_cache
from cohobate.core.errors import InputError
from cohobate.core.teachers import CachedTeacher, weights_hash
from cohobate.core.testing import assert_recipe_parses, assert_teachers_frozen, recipes
from cohobate.medseg.esp_medsam import (
    DecoderSize,
    ESPMedSAM,
    MedicalTeacher,
    TinyViTSize,
    ViTSize,
    embedding_loss,
    mask_loss,
    patch_loss,
    synthetic,
)
from cohobate.medseg.esp_medsam.pictures import Pictures
from cohobate.medseg.esp_medsam.weights import copy_heads, load_sam

SIZES = {
    "width": 16,
    "student": TinyViTSize((8, 16, 16, 32), (1, 1, 1, 1), (1, 2, 2, 4), (4, 4, 4, 4)),
    "vit": ViTSize(24, 2, 3, 2, (1,), 64),
    "decoder": DecoderSize(2, 24, 2, 8),
}
NAMES = ["dermoscopy", "ultrasound", "microscopy"]


def stage(name, seed=0, **options):
    torch.manual_seed(seed)
    data = {"modalities": NAMES, "image_size": 64, "normalization": "sam"}
    return ESPMedSAM(**{**data, **SIZES, "stage": name, **options})


def with_teacher(model, teacher):
    model.teacher = MedicalTeacher(teacher.network)
    return model


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(3, 3, 64, 64, generator=rng),
        "mask": (torch.rand(3, 1, 64, 64, generator=rng) > 0.8).float(),
        "inside": torch.tensor([[64, 64]] * 3),
        "modality": ["ultrasound"] * 3,
    }


@pytest.mark.parametrize(("name", "path"), recipes("medseg"), ids=lambda x: str(x))
def test_every_recipe_parses(name, path):
    assert_recipe_parses(path)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model, batch, rate=0.1):
    """One step of the stage's own optimiser; what changed."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    model.training_step(batch, 0).backward()  # in the mode it was made in, as Lightning does
    optimizer.step()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def test_the_modality_stage_changes_the_active_modality_alone(batch):
    model = with_teacher(stage("modality"), stage("teacher"))
    probe = torch.randn(2, 3, 64, 64)
    model.eval()
    before = {name: model.network(probe, name) for name in NAMES}
    changed = step(model, batch)
    own = "network.encoder.controllers.ultrasound."
    assert changed
    assert all(name.startswith(own) for name in changed)
    gradients = {n for n, p in model.named_parameters() if p.grad is not None}
    assert gradients == {n for n in trained(model) if n.startswith(own)}
    model.eval()
    for name in ("dermoscopy", "microscopy"):
        after = model.network(probe, name)
        assert all(torch.equal(a, b) for a, b in zip(before[name], after, strict=True))
    assert not torch.equal(model.network(probe, "ultrasound").masks, before["ultrasound"].masks)


def test_batch_statistics_move_in_the_common_stage_alone(batch):
    teacher = stage("teacher")
    for name, moves in (("common", True), ("modality", False), ("joint", False)):
        model = with_teacher(stage(name, start="runs/x" if name == "joint" else None), teacher)
        changed = step(model, batch)
        assert any("running_mean" in c for c in changed) is moves, name


def test_what_each_stage_trains():
    def parts(model):
        return {".".join(name.split(".")[1:3]) for name in trained(model)}

    heads = {"prompter.patches", "prompter.prompt", "decoder.queries", "decoder.mlps"}
    heads |= {"decoder.transformer", "decoder.upscaling"}
    shared = {"encoder.vit", "encoder.neck"}
    controllers = {"encoder.controllers"}
    assert parts(stage("teacher")) == heads | controllers | {"encoder.vit"}
    assert parts(stage("teacher", sam="x")) == heads | controllers
    assert parts(stage("common")) == shared
    assert parts(stage("modality")) == controllers
    assert parts(stage("joint", start="runs/x")) == heads | controllers
    assert parts(stage("modality", adapt="encoder")) == shared
    one = stage("modality", adapt="shared")
    assert parts(one) == controllers
    assert {n.split(".")[3] for n in trained(one)} == {"shared"}
    none = stage("modality", adapt="none")
    assert trained(none) == set()
    assert not none.automatic_optimization
    assert none.configure_optimizers() == []


def test_arms_without_controllers_are_the_shared_encoder(batch):
    full, shared, none = (
        stage("modality", adapt=a).eval().network for a in ("modality", "shared", "none")
    )
    for network in (shared, none):
        weights = {k: v for k, v in full.state_dict().items() if "controllers" not in k}
        network.load_state_dict(weights, strict=False)
    x = batch["image"]
    torch.testing.assert_close(none.embed(x, "ultrasound"), full.encoder(x))
    assert torch.equal(shared.embed(x, "ultrasound"), shared.embed(x, "dermoscopy"))
    assert not torch.allclose(shared.embed(x, "ultrasound"), full.encoder(x), atol=1e-4)


def test_the_losses_are_the_papers(batch):
    teacher = stage("teacher", patch_weight=0.25)
    out = teacher.network(batch["image"], batch["modality"])
    expected = mask_loss(out.masks, batch["mask"]) + 0.25 * patch_loss(out.patches, batch["mask"])
    torch.testing.assert_close(teacher.training_step(batch, 0), expected)
    x = batch["image"]
    common = with_teacher(stage("common"), teacher).eval()
    expected = embedding_loss(common.network.encoder(x), teacher.network.encoder(x))
    torch.testing.assert_close(common.training_step({"image": x}, 0), expected)
    modality = with_teacher(stage("modality"), teacher)
    expected = embedding_loss(
        modality.network.encoder(x, "ultrasound"), teacher.network.encoder(x, "ultrasound")
    )
    torch.testing.assert_close(modality.training_step(batch, 0), expected)


def test_with_nothing_to_train_the_loss_is_only_told(batch):
    model = with_teacher(stage("modality", adapt="none"), stage("teacher"))
    loss = model.training_step(batch, 0)
    assert not loss.requires_grad
    assert loss > 0


@pytest.mark.parametrize("name", ["common", "modality"])
def test_the_teacher_is_frozen(name, batch):
    assert_teachers_frozen(with_teacher(stage(name), stage("teacher")), batch)


def test_heads_are_the_teachers():
    teacher, student = stage("teacher", seed=1), stage("modality", seed=2)
    copy_heads(student.network, teacher.network)
    for part in ("prompter", "decoder"):
        theirs = getattr(teacher.network, part).state_dict()
        ours = getattr(student.network, part).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    one = stage("modality", modalities=["ultrasound"], slots=NAMES)
    copy_heads(one.network, teacher.network)
    assert one.network.modalities == ["ultrasound"]
    with pytest.raises(InputError, match=r"model\.slots: the teacher's queries are dermoscopy"):
        copy_heads(stage("modality", modalities=["ultrasound"]).network, teacher.network)
    wide = stage("modality", decoder=DecoderSize(2, 32, 2, 8))
    with pytest.raises(InputError, match=r"mlp.lin1.weight is \(24, 16\) in the teacher"):
        copy_heads(wide.network, teacher.network)


def test_the_modality_stage_takes_the_shared_encoder_alone():
    common, model = stage("common", seed=1), stage("modality", seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = common.state_dict()
    model.load_stage(weights)
    for name, tensor in model.state_dict().items():
        shared = name.startswith(("network.encoder.vit.", "network.encoder.neck."))
        assert torch.equal(tensor, weights[name] if shared else before[name])
    weights.pop("network.encoder.neck.0.weight")
    with pytest.raises(InputError, match=r"no fitting weights for neck\.0\.weight"):
        model.load_stage(weights)


def test_an_added_modality_trains_its_own_parts_alone():
    options = {"modalities": ["mri"], "known": NAMES, "start": "runs/x"}
    for name in ("teacher", "joint"):
        added = trained(stage(name, **options))
        assert added
        assert all(".mri" in parameter for parameter in added)
        assert "network.decoder.own_queries.mri" in added
    student = trained(stage("modality", **options))
    assert all(n.startswith("network.encoder.controllers.mri.") for n in student)
    with pytest.raises(InputError, match=r"model\.start: name the run"):
        stage("teacher", modalities=["mri"], known=NAMES)


def test_a_sam_folder_gives_the_frozen_vit(tmp_path):
    from transformers import SamConfig, SamModel

    vision = {**dataclasses.asdict(SIZES["vit"]), "output_channels": 16}
    sam = SamModel(SamConfig(vision_config=vision))
    with torch.no_grad():
        for parameter in sam.vision_encoder.parameters():
            parameter.normal_(0, 0.1)
    sam.save_pretrained(tmp_path)
    encoder = stage("teacher", sam=tmp_path).network.encoder
    load_sam(encoder, tmp_path)
    image = torch.randn(1, 3, 64, 64)
    expected = sam.eval().vision_encoder(image).last_hidden_state
    torch.testing.assert_close(encoder.eval()(image), expected, atol=1e-5, rtol=1e-4)
    wide = dataclasses.replace(SIZES["vit"], hidden_size=48)
    with pytest.raises(InputError, match=r"pos_embed is \(1, 4, 4, 24\), the teacher needs"):
        load_sam(stage("teacher", sam=tmp_path, vit=wide).network.encoder, tmp_path)
    with pytest.raises(InputError, match=r"no config\.json of a SAM"):
        load_sam(encoder, tmp_path / "none")


# --- the cache of the teacher's embeddings --------------------------------------------------------


@pytest.fixture
def pictures():
    chosen = [p for p in synthetic.pictures(64)["train"] if p.name.endswith(("-1", "-2"))]
    return Pictures(chosen, 64, "sam", flip=0.5, keep=True)


def write(folder, pictures, teacher):
    def ask(batch):
        return teacher(batch["image"], batch["modality"])

    write_cache(
        folder,
        dataset=pictures,
        ask=ask,
        teacher=weights_hash(teacher),
        transform=pictures.transform_key,
        form="dense",
        draws=pictures.every_draw(),
        progress=False,
    )
    return TeacherCache(folder, teacher=weights_hash(teacher), transform=pictures.transform_key)


def collate(samples):
    return torch.utils.data.default_collate(samples)


def test_cached_embeddings_give_the_live_teachers_loss(tmp_path, pictures):
    teacher = MedicalTeacher(stage("teacher").network)
    cached, live = stage("modality"), with_teacher(stage("modality"), stage("teacher"))
    cached.answers["of_train"] = CachedTeacher(write(tmp_path, pictures, teacher))
    draws = pictures.every_draw()
    assert len({pictures.sample_key(d) for d in draws}) == 2 * len(pictures)
    for draw in draws:  # flipped and not: each meets its own embedding
        one = collate([pictures[draw]])
        torch.testing.assert_close(
            cached.training_step(one, 0), live.training_step(one, 0), rtol=2e-3, atol=1e-5
        )
    flipped, plain = (
        collate([pictures[next(d for d in draws if pictures.flipped(d) is wanted)]])
        for wanted in (True, False)
    )
    a, b = (cached._ask(x, "train") for x in (flipped, plain))
    assert not torch.allclose(a, b, atol=1e-2)


def test_the_teacher_is_not_asked_twice(tmp_path, pictures):
    class Counting(MedicalTeacher):
        asked = 0

        def answer(self, image, modality=None):
            Counting.asked += len(image)
            return super().answer(image, modality)

    teacher = Counting(stage("teacher").network)
    write(tmp_path, pictures, teacher)
    first = Counting.asked
    assert first >= 2 * len(pictures)
    write(tmp_path, pictures, teacher)
    # the second time only the form of an answer is asked for
    assert Counting.asked <= first + 1


def test_another_teacher_or_transform_is_refused(tmp_path, pictures):
    write(tmp_path, pictures, MedicalTeacher(stage("teacher").network))
    other = MedicalTeacher(stage("teacher", seed=1).network)
    with pytest.raises(InputError, match="made with teacher"):
        write(tmp_path, pictures, other)
    with pytest.raises(InputError, match="made with transform"):
        TeacherCache(tmp_path, transform="another size")


def test_the_wrong_modality_is_another_answer(batch):
    network = stage("teacher").network.eval()
    right = network(batch["image"], "ultrasound").masks
    assert not torch.allclose(right, network(batch["image"], "microscopy").masks)
    with pytest.raises(InputError, match="unknown modality 'sonography'"):
        network(batch["image"], "sonography")
