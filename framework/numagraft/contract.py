"""The operator contract: what every replacement promises to the framework. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    """What a placed module costs: bytes per runtime node (index -> bytes), per torch device, and read per token.

    `added_per_token`: float32 values per token that every shard computes in full, so that nodes must add them up; 0 where
    shards compute different outputs.
    """

    node_bytes: Mapping[int, int] = field(default_factory=dict)
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    bytes_per_token: int = 0
    added_per_token: int = 0


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [rows, columns] whose values lie row by row in an open file; a row is an output channel.

    `coding` is how one value is stored. e4m3 has `scales` [rows / 128, columns / 128] float32, one per block (both rounded
    up); e2m1 lies two to a byte, the first in the low half, with `scales` [rows, columns / 32] uint8, powers of two with a
    bias of 127. Others have none. Rows begin `row_stride` values apart.
    """

    descriptor: int
    offset: int  # of the first value, in bytes
    file_bytes: int
    coding: Literal["f32", "bf16", "f16", "e4m3", "e2m1"]
    rows: int
    columns: int
    row_stride: int
    scales: torch.Tensor | None = None

    _BITS: ClassVar[Mapping[str, int]] = {"f32": 32, "bf16": 16, "f16": 16, "e4m3": 8, "e2m1": 4}

    def every(self, step: int, first: int, count: int) -> StoredMatrix | None:
        """`count` rows from `first` on, `step` apart, as a matrix of their own; None where scales cover several rows and do
        not divide so."""
        scales = self.scales
        if self.coding == "e4m3":
            if step != 1 or first % 128:
                return None
            scales = scales[first // 128 :]
        elif scales is not None:
            scales = scales[first::step]
        begin = self.offset + first * self.row_stride * self._BITS[self.coding] // 8
        return replace(self, offset=begin, rows=count, row_stride=self.row_stride * step, scales=scales)


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
    def settled(cls, module: nn.Module, params: Any) -> Any:
        """`params` with everything decided that they leave to the module; what a plan shows and keeps.

        Parameters that the checkpoint stores quantised carry their coding ("e4m3", "e2m1") as `numagraft_coding`.
        """
        return params

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

    def load_stored(
        self, name: str, matrices: Sequence[Sequence[StoredMatrix]], *, first_expert: int | None = None
    ) -> bool:
        """Packs weights straight out of an open file: what `load` does, without a copy of them in memory.

        One entry per expert from `first_expert` on (a single one without experts); an entry is one matrix, or several that
        make up the parameter's rows one after the other. Returns False, with nothing done, where the operator cannot: the
        caller then reads the values and calls `load`. Raises as `load` does, and CheckpointError where reading fails.
        """
        return False

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
