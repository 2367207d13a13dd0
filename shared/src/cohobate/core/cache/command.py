"""``cohobate cache``: ask a recipe's teacher about its training data once, to disk."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cohobate.core import catalog
from cohobate.core.cache.writer import write_cache
from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.core.recipes import Recipe, read_config, take_config_files
from cohobate.core.teachers import Teacher, weights_hash
from cohobate.core.training.data import EpochSampler


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options; those of ``fit`` come beside them."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the cache; an existing one goes on")
    add("--teacher", help="name of the teacher in the model, where there are several")
    add("--form", choices=["topk", "dense"], default="topk", help="top classes, or all logits")
    add("--top-k", type=int, default=64, help="classes kept by topk")
    add("--precision", choices=["float16", "bfloat16", "float32"], default="float16")
    add("--temperature", type=float, default=1.0, help="of the stored log-probabilities (topk)")
    add("--class-dim", type=int, default=1, help="axis of the classes in a batch of logits")
    add("--epochs", type=int, help="keep the augmented samples of so many epochs (default: none)")
    add("--batch-size", type=int, default=16)
    add("--workers", type=int, default=0, help="processes that load samples")
    add("--part", type=int, default=0, help="share of this process, from 0")
    add("--parts", type=int, default=1, help="number of processes that write this cache")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(recipe: catalog.Recipe, asked: argparse.Namespace, args: Sequence[str]) -> int:
    """Build the recipe's model and data and write the cache.

    The training data set must say what its samples are called and what was done to them
    (`cohobate.core.cache.KeyedDataset`, and a text ``transform_key``). A model whose batch is more
    than the teacher's input has a method ``teacher_logits(batch)``.

    Args:
        recipe: The recipe; of several stages, the last.
        asked: The options of `add_options`.
        args: The recipe's own options.

    Returns:
        Exit code: 0.

    Raises:
        InputError: An option is wrong, or teacher or data cannot be cached.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    rest, config = take_config_files(args, read_config(recipe.stages[-1].path))
    built = Recipe(config, rest, lambda _: {"logger": [], "enable_checkpointing": False})
    model, data = built.model, built.datamodule
    assert isinstance(model, DistillModule)
    device = torch.device(asked.device)
    name, teacher = _teacher(model, asked.teacher)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    dataset = loader.dataset
    if not hasattr(dataset, "sample_key") or not hasattr(dataset, "transform_key"):
        raise InputError(
            f"{type(dataset).__name__}: has no sample_key and transform_key, "
            "so its samples have no names to store answers under"
        )
    cache = write_cache(
        asked.out,
        dataset=dataset,
        ask=_question(model.to(device), teacher, device),
        teacher=weights_hash(teacher),
        transform=dataset.transform_key,
        form=asked.form,
        top_k=asked.top_k,
        precision=asked.precision,
        class_dim=asked.class_dim,
        temperature=asked.temperature,
        draws=_draws(loader, asked.epochs),
        batch_size=asked.batch_size,
        num_workers=asked.workers,
        collate=loader.collate_fn,
        part=asked.part,
        parts=asked.parts,
    )
    if cache is None:
        print(f"{asked.out}: part {asked.part} of {asked.parts} is there, others are missing")
        return 0
    size = sum(file.stat().st_size for file in asked.out.glob("*.safetensors"))
    print(f"{asked.out}: {len(cache)} answers of {name}, {size / 1e6:.4g} MB")
    return 0


def _teacher(model: DistillModule, name: str | None) -> tuple[str, Teacher]:
    """The teacher that is asked: the one named, or the only one.

    Raises:
        InputError: There is none, or it changes in training.
    """
    found = model.teachers()
    whole = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if not found:
        raise InputError(f"{type(model).__name__} has no teacher")
    if name is None and len(whole) > 1:
        raise InputError(f"--teacher: choose one of {', '.join(whole)}")
    name = name or whole[0]
    if name not in found:
        raise InputError(f"--teacher: no '{name}'{catalog.suggestion(name, found)}")
    if found[name].changing_state():
        raise InputError(f"teacher {name} changes in training, its answers cannot be kept")
    return name, found[name]


def _question(
    model: DistillModule, teacher: Teacher, device: torch.device
) -> Callable[[Any], Tensor]:
    """From a batch of the data set to the teacher's logits."""
    own = getattr(model, "teacher_logits", None)

    def ask(batch: Any) -> Tensor:
        batch = model.transfer_batch_to_device(batch, device, 0)
        answer = own(batch) if own else teacher(batch if isinstance(batch, Tensor) else batch[0])
        if not isinstance(answer, Tensor):
            raise InputError(
                f"the teacher answers with {type(answer).__name__}; "
                f"{type(model).__name__}.teacher_logits(batch) may pick the logits"
            )
        return answer

    return ask


def _draws(loader: DataLoader[Any], epochs: int | None) -> list[int] | None:
    """The draws of the first epochs; ``None`` for each sample once."""
    if epochs is None:
        return None
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if not isinstance(sampler, EpochSampler):
        raise InputError("--epochs: the training data are not drawn by an EpochSampler")
    draws: list[int] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        draws.extend(sampler)
    return draws
