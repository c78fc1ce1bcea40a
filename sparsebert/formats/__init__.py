"""Packed layouts as they lie on disk: pure torch, stateless, the same on every device."""

from sparsebert.formats import nm

__all__ = ["nm"]
