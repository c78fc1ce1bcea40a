"""Training and one-shot methods. Each ends in a plain dense model with exact zeros and a ``CompressionPlan``."""

from sparsebert.methods import allocation
from sparsebert.methods.base import Method, Run
from sparsebert.methods.gradual import GradualMagnitude
from sparsebert.methods.knowledge import KnowledgePruning
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.movement import Movement
from sparsebert.methods.permutation import permute_channels_
from sparsebert.methods.platon import Platon
from sparsebert.methods.seven import SEVEN
from sparsebert.methods.snip import Snip

__all__ = [
    "SEVEN",
    "GradualMagnitude",
    "KnowledgePruning",
    "Magnitude",
    "Method",
    "Movement",
    "Platon",
    "Run",
    "Snip",
    "allocation",
    "permute_channels_",
]
