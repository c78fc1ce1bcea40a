"""Training and one-shot methods. Each ends in a plain dense model with exact zeros and a ``CompressionPlan``."""

from sparsebert.methods.base import Method, Run
from sparsebert.methods.fixed_factors import FactorTuning
from sparsebert.methods.losparse import LoSparse
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.svd import SVD, fisher_row_weights

__all__ = ["SVD", "FactorTuning", "LoSparse", "Magnitude", "Method", "Run", "fisher_row_weights"]
