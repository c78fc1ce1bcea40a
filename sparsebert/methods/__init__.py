"""Training and one-shot methods. Each ends in a plain dense model with exact zeros and a ``CompressionPlan``."""

from sparsebert.methods import allocation
from sparsebert.methods.activations import input_moments
from sparsebert.methods.admm import ADMM
from sparsebert.methods.base import Method, Run
from sparsebert.methods.fixed_factors import FactorTuning
from sparsebert.methods.gradual import GradualMagnitude
from sparsebert.methods.knowledge import KnowledgePruning
from sparsebert.methods.losparse import LoSparse
from sparsebert.methods.lpaf import LPAF
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.maths.distillation import kl_divergence
from sparsebert.methods.maths.projections import Block, Dictionary
from sparsebert.methods.movement import Movement
from sparsebert.methods.permutation import permute_channels_
from sparsebert.methods.platon import Platon
from sparsebert.methods.seven import SEVEN
from sparsebert.methods.snip import Snip
from sparsebert.methods.svd import SVD, fisher_row_weights
from sparsebert.methods.teacher import Teacher

# Name in recipes and on the command line -> class. One whose first argument is called ``plan`` goes on from the plan
# that the stage before it ended in.
METHODS: dict[str, type[Method]] = {
    "admm": ADMM,
    "factor-tuning": FactorTuning,
    "gradual-magnitude": GradualMagnitude,
    "knowledge": KnowledgePruning,
    "losparse": LoSparse,
    "lpaf": LPAF,
    "magnitude": Magnitude,
    "movement": Movement,
    "platon": Platon,
    "seven": SEVEN,
    "snip": Snip,
    "svd": SVD,
}

__all__ = [
    "ADMM",
    "LPAF",
    "METHODS",
    "SEVEN",
    "SVD",
    "Block",
    "Dictionary",
    "FactorTuning",
    "GradualMagnitude",
    "KnowledgePruning",
    "LoSparse",
    "Magnitude",
    "Method",
    "Movement",
    "Platon",
    "Run",
    "Snip",
    "Teacher",
    "allocation",
    "fisher_row_weights",
    "input_moments",
    "kl_divergence",
    "permute_channels_",
]
