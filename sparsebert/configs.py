"""What a layer is compressed to: small frozen dataclasses that survive a JSON round trip."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

GROUP_SIZES = (2, 4, 8, 16)


@dataclass(frozen=True)
class NMConfig:
    """n:m pattern sparsity: of every ``m`` consecutive weights along ``in_features``, at most ``n`` are non-zero.

    ``NMConfig(2, 4)`` is the pattern of NVIDIA's sparse tensor cores. ``n`` counts the weights that are *kept*
    (1:4 keeps a quarter). ``m`` is 2, 4, 8 or 16 and ``1 <= n < m``; anything else is a ``ValueError``.
    """

    n: int
    m: int

    format: ClassVar[str] = "nm"

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"NMConfig: {name} is {value!r}, expected an int")
        if self.m not in GROUP_SIZES:
            raise ValueError(f"NMConfig: m is {self.m}, expected one of {', '.join(map(str, GROUP_SIZES))}")
        if not 1 <= self.n < self.m:
            raise ValueError(f"NMConfig: n is {self.n}, expected 1 <= n < m = {self.m} (n of every m weights are kept)")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> NMConfig:
        """``NMConfig.parse("2:4")``, as the command line takes it."""
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an n:m pattern; write it as 2:4 (keep 2 of every 4)")
        return cls(int(match[1]), int(match[2]))

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format, **asdict(self)}


_CONFIGS: dict[str, type[NMConfig]] = {NMConfig.format: NMConfig}


def config_from_dict(data: dict[str, Any]) -> NMConfig:
    """Inverse of ``to_dict``; unknown formats and stray keys are refused."""
    if not isinstance(data, dict):
        raise TypeError(f"config: got {type(data).__name__}, expected a JSON object")
    fields = dict(data)
    kind = fields.pop("format", None)
    if kind not in _CONFIGS:
        raise ValueError(f"config: format is {kind!r}, expected one of {sorted(_CONFIGS)}")
    try:
        return _CONFIGS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"config: cannot read {data!r} as {kind!r}: {error}") from error
