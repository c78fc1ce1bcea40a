"""Compiles a Triton kernel for a GPU that is not here, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """``shared`` and ``local`` are bytes, of shared memory a block and of spills and stack a thread."""

    shared: int
    registers: int
    local: int
    ptx: str
    sass: str

    def count(self, opcode: str) -> int:
        """How many instructions begin with ``opcode``, such as ``HGMMA`` or ``LDG.E.128``."""
        return len(re.findall(rf"(?m)^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?{re.escape(opcode)}", self.sass))


def compile_for(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    *,
    divisible: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """``arguments`` are types by name, as Triton writes them (``*fp16``, ``i32``); all other parameters are constants.
    Pointers, and the numbers ``divisible``, count as multiples of 16, as they are for torch's tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert {*arguments, *constants} == set(names), f"{set(names) ^ {*arguments, *constants}} are not given, or twice"
    places = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        kernel,
        {name: arguments.get(name, "constexpr") for name in names},
        {places[name]: value for name, value in constants.items()},
        {
            places[name]: [["tt.divisibility", 16]]
            for name, kind in arguments.items()
            if kind.startswith("*") or name in divisible
        },
    )
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        used = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    return Compiled(found.metadata.shared, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], found.asm["ptx"], sass)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
