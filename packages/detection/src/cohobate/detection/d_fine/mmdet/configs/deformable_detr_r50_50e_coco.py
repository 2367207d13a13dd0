"""Deformable-DETR with box refinement, with FDR and GO-LSD (D-FINE, arXiv 2410.13842).

mmdet's own setting, 50 epochs on COCO, 16 GPUs with 2 images each; only four types are changed.
"""

_base_ = "mmdet::deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py"
custom_imports = {"imports": ["cohobate.detection.d_fine.mmdet"]}

model = {
    "type": "FDRDeformableDETR",
    "bbox_head": {
        "type": "FDRDeformableDETRHead",
        "loss_fgl": {"type": "FineGrainedLocalizationLoss", "loss_weight": 0.15},
        "loss_ddf": {"type": "DecoupledDistillationFocalLoss", "loss_weight": 1.5},
    },
}
