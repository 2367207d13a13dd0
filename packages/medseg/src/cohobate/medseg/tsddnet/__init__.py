"""TSDDNet: lesion detection and diagnosis from partly drawn boxes (arXiv 2306.06982)."""

from cohobate.medseg.tsddnet.audit import Audit, read_audit
from cohobate.medseg.tsddnet.data import UltrasoundData
from cohobate.medseg.tsddnet.losses import branch_ce, branch_hint, branch_kl
from cohobate.medseg.tsddnet.method import Classify, Detect, Fuse, TSDDNet
from cohobate.medseg.tsddnet.network import Detector, Diagnoser
from cohobate.medseg.tsddnet.selection import Choice, Decision, Selection, choose, eligible

__all__ = [
    "Audit",
    "Choice",
    "Classify",
    "Decision",
    "Detect",
    "Detector",
    "Diagnoser",
    "Fuse",
    "Selection",
    "TSDDNet",
    "UltrasoundData",
    "branch_ce",
    "branch_hint",
    "branch_kl",
    "choose",
    "eligible",
    "read_audit",
]
