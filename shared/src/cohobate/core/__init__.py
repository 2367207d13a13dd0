"""Distillation losses, teachers, training, comparison and export shared by every domain.

Importing this package is cheap: nothing here imports torch until a submodule needs it.
"""

__version__ = "0.1.0"
