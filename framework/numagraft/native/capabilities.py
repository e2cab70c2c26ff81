"""What this build and this CPU can run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from numagraft import _native


@dataclass(frozen=True)
class Capabilities:
    """`isa` is the kernel row in use, one of `supported` (slowest first); `forced`: NUMAGRAFT_ISA chose it."""

    isa: str
    supported: tuple[str, ...]
    forced: bool
    compiler: str
    sanitizer: str


def capabilities() -> Capabilities:
    """The kernels of this machine; raises ConfigurationError when NUMAGRAFT_ISA names one that it does not support.

    >>> capabilities().isa in capabilities().supported
    True
    """
    return Capabilities(
        isa=_native.active_isa(),
        supported=tuple(_native.supported_isas()),
        forced=_native.isa_forced(),
        compiler=_native.compiler(),
        sanitizer=_native.sanitizer(),
    )
