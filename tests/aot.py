"""Compiles a Triton kernel for a GPU that is not here, and reads what came out."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tempfile
import textwrap
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

    def loop(self, opcode: str) -> list[str]:
        """The opcodes of the longest loop that has one beginning with ``opcode``."""
        opcodes: list[str] = []
        labels: dict[str, int] = {}
        loops: list[list[str]] = []
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(opcodes)
            elif found := re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b(.*);", line):
                opcodes.append(found[1])
                target = re.search(r"\.L_x_\d+", found[2])
                if found[1].startswith("BRA") and target and target[0] in labels:
                    loops.append(opcodes[labels[target[0]] :])
        return max((loop for loop in loops if any(o.startswith(opcode) for o in loop)), key=len, default=[])

    def loaded_bytes(self, kernel: Any, pointer: str) -> set[int]:
        """How many bytes a thread loads at a time where the source of ``kernel`` passes ``pointer``."""
        lines, first = inspect.getsourcelines(kernel.fn)
        here = {
            (Path(inspect.getsourcefile(kernel.fn) or "").name, first - 1 + line)
            for node in ast.walk(ast.parse(textwrap.dedent("".join(lines))))
            if isinstance(node, ast.Call) and any(isinstance(a, ast.Name) and a.id == pointer for a in _passed(node))
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        found, places = set(), set()
        for line in self.ptx.splitlines():
            if ".loc" in line:
                # A place and, of what was inlined, those it was called from.
                places = {(file, int(number)) for file, number in re.findall(r"(\w+\.py):(\d+):", line)}
            elif places & here:
                if copied := re.search(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\w+)", line):
                    found.add(int(copied[1], 16))
                elif loaded := re.search(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+) ", line):
                    found.add(int(loaded[1] or 1) * int(loaded[2]) // 8)
        return found


def _passed(call: ast.Call) -> list[ast.AST]:
    """What a call is given, and the ends of sums among it: ``u_ptr`` of ``load(u_ptr + places)``."""
    return [node for argument in call.args for node in ast.walk(argument) if not isinstance(argument, ast.Call)]


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
