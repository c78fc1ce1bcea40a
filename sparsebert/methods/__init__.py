"""Training and one-shot methods. Each ends in a plain dense model with exact zeros and a ``CompressionPlan``."""

from sparsebert.methods.admm import ADMM
from sparsebert.methods.base import Method, Run
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.maths.projections import Block, Dictionary

__all__ = ["ADMM", "Block", "Dictionary", "Magnitude", "Method", "Run"]
