"""DINO, 4 scales, with FDR and GO-LSD (D-FINE, arXiv 2410.13842).

mmdet's own setting, 12 epochs on COCO, 8 GPUs with 2 images each; only four types are changed.
"""

_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = {"imports": ["cohobate.detection.d_fine.mmdet"]}

model = {
    "type": "FDRDINO",
    "bbox_head": {
        "type": "FDRDINOHead",
        "loss_fgl": {"type": "FineGrainedLocalizationLoss", "loss_weight": 0.15},
        "loss_ddf": {"type": "DecoupledDistillationFocalLoss", "loss_weight": 1.5},
    },
}
