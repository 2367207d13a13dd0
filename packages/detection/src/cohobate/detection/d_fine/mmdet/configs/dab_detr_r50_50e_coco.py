"""DAB-DETR with FDR and GO-LSD (D-FINE, arXiv 2410.13842).

mmdet's own setting, 50 epochs on COCO, 8 GPUs with 2 images each; only four types are changed.
"""

_base_ = "mmdet::dab_detr/dab-detr_r50_8xb2-50e_coco.py"
custom_imports = {"imports": ["cohobate.detection.d_fine.mmdet"]}

model = {
    "type": "FDRDABDETR",
    "bbox_head": {
        "type": "FDRDABDETRHead",
        "loss_fgl": {"type": "FineGrainedLocalizationLoss", "loss_weight": 0.15},
        "loss_ddf": {"type": "DecoupledDistillationFocalLoss", "loss_weight": 1.5},
    },
}
