"""ESP-MedSAM: self-prompting segmentation of several modalities, distilled from SAM."""

from cohobate.medseg.esp_medsam.controller import Controller, Controllers, Expert
from cohobate.medseg.esp_medsam.encoder import SAMEncoder, TinyViTEncoder, TinyViTSize, ViTSize
from cohobate.medseg.esp_medsam.losses import embedding_loss, mask_loss, patch_loss, patch_target
from cohobate.medseg.esp_medsam.method import ESPMedSAM, MedicalTeacher
from cohobate.medseg.esp_medsam.network import (
    DecoderSize,
    MaskDecoder,
    Network,
    OneModality,
    Outputs,
    PatchPrompt,
)
from cohobate.medseg.esp_medsam.official import (
    MODALITIES,
    load_mobile_sam,
    load_official,
    save_official,
)

__all__ = [
    "MODALITIES",
    "Controller",
    "Controllers",
    "DecoderSize",
    "ESPMedSAM",
    "Expert",
    "MaskDecoder",
    "MedicalTeacher",
    "Network",
    "OneModality",
    "Outputs",
    "PatchPrompt",
    "SAMEncoder",
    "TinyViTEncoder",
    "TinyViTSize",
    "ViTSize",
    "embedding_loss",
    "load_mobile_sam",
    "load_official",
    "mask_loss",
    "patch_loss",
    "patch_target",
    "save_official",
]
