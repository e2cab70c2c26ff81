"""What the doctor looks at: the platform, and for the live one what the process and the backend can really do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from numagraft.doctor.nvidia import ask_nvidia_driver, with_driver_facts
from numagraft.errors import NumagraftError
from numagraft.platform import Platform


@dataclass(frozen=True)
class Backend:
    """The native backend as it answered; `error` where it did not load or would not run."""

    isa: str = ""
    supported: tuple[str, ...] = ()
    forced: bool = False
    compiler: str = ""
    sanitizer: str = ""
    error: str = ""


@dataclass(frozen=True)
class Circumstances:
    """`refused`: system call -> errno name, of calls tried for real; None when nothing was tried (a dump)."""

    platform: Platform
    backend: Backend | None = None
    refused: Mapping[str, str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    compute_modes: Mapping[str, str] = field(default_factory=dict)  # PCI address -> as NVIDIA's driver says
    mps: bool = False  # the MPS daemon's pipe is there

    @classmethod
    def of(cls, platform: Platform) -> Circumstances:
        """For a live platform tries the system calls on one page (verified, undone); for a dump nothing is tried."""
        if not platform.live:
            return cls(platform)
        backend, refused = _ask_backend()
        facts = ask_nvidia_driver() if any(gpu.vendor == "nvidia" for gpu in platform.gpus) else {}
        pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
        return cls(
            with_driver_facts(platform, facts),
            backend,
            refused,
            dict(os.environ),
            {address: known.compute_mode for address, known in facts.items()},
            os.path.exists(os.path.join(pipe, "control")),
        )


def _ask_backend() -> tuple[Backend, dict[str, str] | None]:
    try:
        from numagraft import native

        capabilities = native.capabilities()
        backend = Backend(
            isa=capabilities.isa,
            supported=tuple(capabilities.supported),
            forced=capabilities.forced,
            compiler=capabilities.compiler,
            sanitizer=capabilities.sanitizer,
        )
        probe = native.binding_allowed()
    except (ImportError, AttributeError, OSError, NumagraftError) as error:
        return Backend(error=f"{type(error).__name__}: {error}"), None
    return backend, {name: outcome for name, outcome in _outcomes(probe).items() if outcome}


def _outcomes(probe: object) -> dict[str, str | None]:
    return dict(probe) if isinstance(probe, Mapping) else dict(vars(probe))
