"""Weights that a stage starts from: SAM's, the teacher's heads, an earlier run's."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.medseg.esp_medsam.encoder import SAMEncoder
from cohobate.medseg.esp_medsam.network import Network


def load_sam(encoder: SAMEncoder, folder: Path) -> None:
    """Take the ViT's weights from a SAM that transformers can load.

    Args:
        encoder: Of the same sizes; its controllers stay as they are.
        folder: Local folder with ``config.json`` and the weights.

    Raises:
        InputError: There is no SAM in the folder, or its sizes are others.
    """
    from transformers import SamModel

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json of a SAM (model.sam)")
    try:
        sam = SamModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: {str(error).splitlines()[0]} (model.sam)") from None
    given, own = sam.vision_encoder.state_dict(), encoder.vit.state_dict()
    for name, tensor in own.items():
        if name not in given or given[name].shape != tensor.shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise InputError(
                f"{folder}: {name} is {found}, the teacher needs {tuple(tensor.shape)}; "
                "model.vit and model.width must be this SAM's"
            )
    encoder.vit.load_state_dict({name: given[name] for name in own})


def copy_heads(student: Network, teacher: Network) -> None:
    """Give the student the teacher's patch prompt, queries and decoder.

    Raises:
        InputError: They differ in a size, a modality or the queries.
    """
    ours, theirs = student.decoder, teacher.decoder
    if ours.slots != theirs.slots:
        raise InputError(
            f"model.slots: the teacher's queries are {', '.join(theirs.slots)}, "
            f"the student's {', '.join(ours.slots)}"
        )
    for own, given in ((student.prompter, teacher.prompter), (ours, theirs)):
        weights = given.state_dict()
        for name, tensor in own.state_dict().items():
            if name not in weights:
                raise InputError(f"model.teacher: the teacher has no {name}")
            if weights[name].shape != tensor.shape:
                raise InputError(
                    f"model.teacher: {name} is {tuple(weights[name].shape)} in the teacher, "
                    f"{tuple(tensor.shape)} in the student"
                )
        own.load_state_dict({name: weights[name] for name in own.state_dict()})


def take_known(
    module: nn.Module,
    weights: dict[str, Tensor],
    prefix: str,
    parts: tuple[str, ...],
    new: list[str] | None = None,
) -> None:
    """Load parts of a module by name; all of them must be there, but for new modalities'.

    Args:
        module: What is loaded into.
        weights: Tensors by name.
        prefix: What stands before the module's own names.
        parts: Beginnings of the names that are loaded.
        new: Modalities whose tensors may be missing.

    Raises:
        InputError: A tensor is missing or has another shape.
    """
    taken = {}
    for name, tensor in module.state_dict().items():
        if not name.startswith(parts):
            continue
        given = weights.get(f"{prefix}{name}")
        if given is None and any(f".{modality}" in name for modality in new or []):
            continue
        if given is None or given.shape != tensor.shape:
            raise InputError(f"the earlier stage has no fitting weights for {name}")
        taken[name] = given
    module.load_state_dict(taken, strict=False)
