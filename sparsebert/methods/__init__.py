"""Training and one-shot methods. Each ends in a plain dense model with exact zeros and a ``CompressionPlan``."""

from sparsebert.methods.admm import ADMM
from sparsebert.methods.base import Method, Run
from sparsebert.methods.knowledge import KnowledgePruning
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.maths.projections import Block, Dictionary
from sparsebert.methods.movement import Movement
from sparsebert.methods.permutation import permute_channels_

__all__ = [
    "ADMM",
    "Block",
    "Dictionary",
    "KnowledgePruning",
    "Magnitude",
    "Method",
    "Movement",
    "Run",
    "permute_channels_",
]
