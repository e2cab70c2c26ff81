"""The operator contract: what every replacement promises to the framework. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from numagraft.native import OperatorStats, PlacedBuffer, Runtime
    from numagraft.placement import Placement
    from numagraft.platform import Platform


@dataclass(frozen=True)
class Accepted:
    """The operator can replace the module; `note` is shown in the plan."""

    note: str = ""


@dataclass(frozen=True)
class Rejected:
    """The operator cannot replace the module, and why: one sentence for a person."""

    reason: str


@dataclass(frozen=True)
class Units:
    """How a module's weights divide: `count` units (output features, intermediate features) that a shard may split at
    multiples of `multiple`, and the bytes that all of them take packed. Placement is resolved from this."""

    count: int
    multiple: int
    packed_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a placed module costs: bytes per runtime node (index -> bytes), per torch device, and read per token."""

    node_bytes: Mapping[int, int] = field(default_factory=dict)
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    bytes_per_token: int = 0


class Operator(nn.Module):
    """Replaces one submodule; made on the meta device, filled as weights stream in, verified after loading.

    Life: `check` (meta) -> `units`/`footprint` (meta) -> `from_module` (keeps meta placeholder Parameters under the
    original names, shapes, dtypes) -> `load` for every tensor -> `finish` (placeholders go) -> `forward`.
    """

    #: device types a rule may name for this operator; None: any
    devices: ClassVar[tuple[str, ...] | None] = None

    #: a frozen dataclass: the kwargs a rule may give, typed (Literal, int, float, bool, str, PlacementSpec, or | None), with
    #: defaults. A field named `placement` of type PlacementSpec makes the operator a placed one.
    Params: ClassVar[type]

    @classmethod
    def check(cls, module: nn.Module, params: Any, platform: Platform) -> Accepted | Rejected:
        """Whether this operator reproduces `module` (on meta). Never computes, never raises for a strange module."""
        raise NotImplementedError

    @classmethod
    def check_device(cls, device: str, platform: Platform | None) -> Accepted | Rejected:
        """Whether this operator runs on `device` ("cpu", "cuda:1"). Never raises for a strange one."""
        try:
            kind = torch.device(device).type
        except RuntimeError:
            return Rejected(f"{device!r} is not a torch device; expected for example 'cpu' or 'cuda:0'")
        if cls.devices is not None and kind not in cls.devices:
            return Rejected(f"it runs on {' or '.join(cls.devices)} only, not on {device!r}")
        return Accepted()

    @classmethod
    def check_within(cls, parent: nn.Module, attribute: str) -> Accepted | Rejected:
        """Whether `parent` gets along with its child `attribute` being replaced, judged from the parent's own code: one that
        computes with the child's weight itself does not. Never raises."""
        return Accepted()

    @classmethod
    def units(cls, module: nn.Module, params: Any) -> Units | None:
        """How the weights divide over nodes; None for operators without placement."""
        raise NotImplementedError

    @classmethod
    def footprint(cls, module: nn.Module, params: Any, placement: Placement | None, device: str) -> Footprint:
        raise NotImplementedError

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        params: Any,
        *,
        name: str,
        placement: Placement | None,
        runtime: Runtime | None,
        device: str,
    ) -> Operator:
        """The replacement, with meta placeholders; allocates nothing yet."""
        raise NotImplementedError

    def load(self, name: str, tensor: torch.Tensor, *, expert: int | None = None) -> None:
        """Packs one tensor, named as in the original module ("weight", "gate_up_proj", ...), or one expert's slice of it.

        Without `expert` the tensor is the whole parameter; with it, one entry of the parameter's first dimension.
        Raises WeightError (unknown name, wrong shape or dtype, not in CPU memory, twice) before anything of it is stored.
        """
        raise NotImplementedError

    def missing(self) -> list[str]:
        """Names (as `load` takes them) that have not arrived."""
        raise NotImplementedError

    def finish(self) -> None:
        """Deletes the placeholders; called once, after everything arrived."""
        raise NotImplementedError

    def buffers_placed(self) -> Iterable[PlacedBuffer]:
        """What to verify."""
        return ()

    def stats(self) -> OperatorStats | None:
        """Calls, seconds, bytes read and remote bytes so far; None for operators that do not count."""
        return None

    def grafted_numel(self) -> int:
        """Weights held outside Parameters, for `num_parameters`."""
        return 0

    def grafted_bytes(self) -> int:
        """Bytes held outside Parameters, for `get_memory_footprint`."""
        return 0
