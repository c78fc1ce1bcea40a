"""Tests of the Triton kernels in Triton's interpreter, which has to be asked for before a kernel is imported: `make
test` runs them in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if "interpreted" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 and a process of its own"))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New tensors hold NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
