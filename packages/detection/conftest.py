"""Doctests are collected from what is installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mmdet") else ["src/cohobate/detection/d_fine/mmdet/*"]
