"""FDR and GO-LSD in mmdet's DETRs, by ``custom_imports`` of this package and four type names.

The import registers everything below, takes the place of mmcv's compiled operators where they are
not installed, and lets torch read mmengine's checkpoints.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

if find_spec("mmdet") is None or find_spec("mmcv") is None:
    raise ImportError("mmdet is not installed: pip install 'cohobate-detection[mmdet]'")

from cohobate.detection.d_fine.mmdet.compat import allow_checkpoints, stand_in

stand_in()
allow_checkpoints()

from cohobate.detection.d_fine.mmdet.decoders import (  # noqa: E402
    FDRDABDetrTransformerDecoder,
    FDRDeformableDetrTransformerDecoder,
    FDRDinoTransformerDecoder,
)
from cohobate.detection.d_fine.mmdet.detectors import (  # noqa: E402
    FDRDABDETR,
    FDRDINO,
    FDRDeformableDETR,
)
from cohobate.detection.d_fine.mmdet.heads import (  # noqa: E402
    FDRDABDETRHead,
    FDRDeformableDETRHead,
    FDRDINOHead,
)
from cohobate.detection.d_fine.mmdet.hooks import EMARestartHook  # noqa: E402
from cohobate.detection.d_fine.mmdet.losses import (  # noqa: E402
    DecoupledDistillationFocalLoss,
    FineGrainedLocalizationLoss,
)

CONFIGS = Path(__file__).parent / "configs"

__all__ = [
    "CONFIGS",
    "FDRDABDETR",
    "FDRDINO",
    "DecoupledDistillationFocalLoss",
    "EMARestartHook",
    "FDRDABDETRHead",
    "FDRDABDetrTransformerDecoder",
    "FDRDINOHead",
    "FDRDeformableDETR",
    "FDRDeformableDETRHead",
    "FDRDeformableDetrTransformerDecoder",
    "FDRDinoTransformerDecoder",
    "FineGrainedLocalizationLoss",
]
