"""Networks shared by the papers of this domain, and what the papers expect of a network."""

from cohobate.avviolence.nets.attention import attend, dropout
from cohobate.avviolence.nets.streams import Streams, TwoStream, VisualStream
from cohobate.avviolence.nets.temporal import TemporalMIL, VisualTemporalMIL

__all__ = [
    "Streams",
    "TemporalMIL",
    "TwoStream",
    "VisualStream",
    "VisualTemporalMIL",
    "attend",
    "dropout",
]
