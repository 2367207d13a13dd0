"""Candidate selection over the whole training set: detections in, audit table out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cohobate.medseg.tsddnet.audit import Audit
from cohobate.medseg.tsddnet.data import Batch, UltrasoundData
from cohobate.medseg.tsddnet.network import Detections, Diagnoser
from cohobate.medseg.tsddnet.selection import Choice, Selection, choose, eligible, iou


@torch.no_grad()
def refine(
    net: Diagnoser,
    classifiers: Sequence[nn.Module],
    data: UltrasoundData,
    rule: Selection,
    batch_size: int = 16,
) -> Audit:
    """Choose a box for every training image.

    Args:
        net: D-Net and the cropping, in eval mode.
        classifiers: C-Nets by inner fold, in eval mode: an image is scored by that of its own fold,
            which did not train on it. A single one scores all.
        data: The training images, with the boxes as drawn.
        rule: Thresholds and scope.
        batch_size: Images at a time; changes speed and memory, not the result.

    Returns:
        The table; boxes in pixels of the images.
    """
    part = data.train
    device = net.mean.device
    found: list[Choice] = []
    drawn = torch.from_numpy(data.drawn)
    loader = data.whole(part, batch_size)
    for batch in tqdm(loader, desc="selecting boxes", disable=len(part) < 500):
        images = batch["image"].to(device).expand(-1, 3, -1, -1)
        size = batch["size"].to(device)
        detections = net.detector.detect(net.detector.features(images), images, size)
        old, index = drawn[batch["index"]].to(device), batch["index"]
        folds = torch.from_numpy(part.fold)[index].to(device)
        found.append(_choose(net, classifiers, batch, detections, old, folds, rule))
    new = torch.cat([c.boxes for c in found]).cpu()
    overlap = iou(drawn, new)
    samples = part.samples
    return Audit(
        names=samples.names,
        classes=[samples.class_names[i] for i in samples.labels],
        old=part.original(data.drawn).astype(float),
        new=part.original(new.numpy()).astype(float),
        p_old=torch.cat([c.old for c in found]).double().cpu().numpy(),
        p_new=torch.cat([c.new for c in found]).double().cpu().numpy(),
        iou=overlap.double().numpy(),
        decisions=[d for c in found for d in c.decisions],
    )


def _choose(
    net: Diagnoser,
    classifiers: Sequence[nn.Module],
    batch: Batch,
    detections: Detections,
    drawn: Tensor,
    folds: Tensor,
    rule: Selection,
) -> Choice:
    """One batch: C-Net looks at the candidates and the drawn boxes in one pass."""
    device = drawn.device
    candidates = eligible(*detections, drawn, rule)
    images = batch["image"].to(device).expand(-1, 3, -1, -1)
    label, size = batch["label"].to(device), batch["size"].to(device)
    of, place = candidates.nonzero(as_tuple=True)
    has_box = drawn.isfinite().all(1).nonzero()[:, 0]
    boxes = torch.cat([detections.boxes[of, place], drawn[has_box]])
    source = torch.cat([of, has_box])
    p = boxes.new_empty(len(boxes))
    scored_by = folds[source] if len(classifiers) > 1 else torch.zeros_like(source)
    for fold, classifier in enumerate(classifiers):
        mine = scored_by == fold
        if mine.any():
            crops = net.crops(images, size, boxes[mine], source[mine])
            all_classes = classifier(crops).float().softmax(1)
            p[mine] = all_classes.gather(1, label[source[mine], None])[:, 0]
    on_candidates = torch.full_like(detections.scores, -1.0)
    on_candidates[of, place] = p[: len(of)]
    on_drawn = drawn.new_full((len(drawn),), float("nan"))
    on_drawn[has_box] = p[len(of) :]
    return choose(*detections, on_candidates, candidates, drawn, on_drawn, rule)


def quality(data: UltrasoundData) -> dict[str, float]:
    """Overlap of the training boxes in use with the true ones, which nothing else reads.

    Args:
        data: With boxes applied.

    Returns:
        ``drawn_iou``: mean IoU over images with a drawn box; ``hidden_iou``: over images whose box
        was hidden, 0 where they have none; ``hidden_share``: how many of those have one. Empty when
        boxes were neither hidden nor perturbed, so that there is no truth beside them.
    """
    if not data.hidden and not data.coarse:
        return {}
    part = data.train
    truth = torch.from_numpy(part.samples.boxes * part.scale[:, None])
    overlap = iou(torch.from_numpy(part.boxes), truth)
    drawn = torch.from_numpy(data.drawn).isfinite().all(1)
    known = truth.isfinite().all(1)
    found = {}
    if (drawn & known).any():
        found["drawn_iou"] = float(overlap[drawn & known].nan_to_num(0.0).mean())
    hidden = ~drawn & known
    if hidden.any():
        found["hidden_iou"] = float(overlap[hidden].nan_to_num(0.0).mean())
        found["hidden_share"] = float(overlap[hidden].isfinite().float().mean())
    return found
