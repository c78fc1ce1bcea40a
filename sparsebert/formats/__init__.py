"""Packed layouts as they lie on disk: pure torch, stateless, the same on every device."""

from sparsebert.formats import bitmap, int8, low_rank, nm, rows

__all__ = ["bitmap", "int8", "low_rank", "nm", "rows"]
