"""The package's torch ops: schema, fake and reference first, faster backends of the same op beside them.

``register()`` runs at ``import sparsebert`` so that ``torch.export.load`` finds the ops; it touches torch alone.
"""

from __future__ import annotations

from sparsebert.ops.nm import nm_linear, register

__all__ = ["nm_linear", "register"]
