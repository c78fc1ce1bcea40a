"""Training and one-shot methods. Each ends in a plain dense model with exact zeros and a ``CompressionPlan``."""

from sparsebert.methods.base import Method, Run
from sparsebert.methods.magnitude import Magnitude
from sparsebert.methods.permutation import permute_channels_

# Name in recipes and on the command line -> class. One whose first argument is called ``plan`` goes on from the plan
# that the stage before it ended in.
METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
}

__all__ = ["METHODS", "Magnitude", "Method", "Run", "permute_channels_"]
