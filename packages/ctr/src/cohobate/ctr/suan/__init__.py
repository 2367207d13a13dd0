"""SUAN: scaling laws of CTR models, and LightSUAN distilled online from a larger SUAN."""

from cohobate.ctr.suan.losses import click_loss, soft_click_loss
from cohobate.ctr.suan.method import DistilSUAN
from cohobate.ctr.suan.network import GRADES, SUAN, LightSUAN

__all__ = ["GRADES", "SUAN", "DistilSUAN", "LightSUAN", "click_loss", "soft_click_loss"]
