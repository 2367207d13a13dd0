"""Networks and their inputs, shared by the papers of the domain."""

from cohobate.ctr.nets.inputs import Batch, ClickNetwork, Common, Features, Layout
from cohobate.ctr.nets.sequence import BST, DIN, HSTU, MeanMLP, TargetAttention

__all__ = [
    "BST",
    "DIN",
    "HSTU",
    "Batch",
    "ClickNetwork",
    "Common",
    "Features",
    "Layout",
    "MeanMLP",
    "TargetAttention",
]
