"""Packed weights: matrices in node memory and what is computed with them. Imports no torch.

Tensors cross as `Matrix`; whoever calls keeps their memory alive for the call. Every call that packs or computes releases
the GIL. Loading is for one thread at a time; `forward` may be called from many once nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from numagraft import _native
from numagraft.errors import WeightError
from numagraft.native.runtime import PlacedBuffer, Runtime
from numagraft.placement import Part


@dataclass(frozen=True)
class Matrix:
    """Element (r, c) lies at address + (r * row_stride + c * column_stride) * size of an element; strides in elements."""

    address: int
    dtype: Literal["f32", "bf16", "f16", "i64"]
    rows: int
    columns: int
    row_stride: int
    column_stride: int = 1

    def view(self) -> _native.MatrixView:
        """As the binding takes it; raises ConfigurationError for a dtype that holds no weights or activations."""
        return _native.MatrixView(
            self.address, self.dtype, self.rows, self.columns, self.row_stride, self.column_stride
        )


@dataclass(frozen=True)
class FileMatrix:
    """A matrix whose rows lie in an open file from the byte `offset` on, each contiguous and `row_stride` elements apart.

    e4m3 has float32 scales at the address `scales`, one per block of 128 x 128; e2m1 (two to a byte, the first in the low
    half) has e8m0 exponents, one per row and 32 columns. `scale_stride` is from one row of scales to the next.
    """

    descriptor: int
    offset: int
    file_bytes: int
    dtype: Literal["f32", "bf16", "f16", "e4m3", "e2m1"]
    rows: int
    columns: int
    row_stride: int
    scales: int = 0
    scale_stride: int = 0

    def view(self) -> _native.WeightSource:
        """As the binding takes it, where a weight is loaded."""
        return _native.WeightSource(
            address=0,
            dtype=self.dtype,
            rows=self.rows,
            columns=self.columns,
            row_stride=self.row_stride,
            column_stride=1,
            scales=self.scales,
            scale_stride=self.scale_stride,
            file=self.descriptor,
            offset=self.offset,
            file_size=self.file_bytes,
        )


@dataclass(frozen=True)
class WeightFormat:
    """How weights are packed and inputs are taken.

    `kind`: bf16; int8 (symmetric, a scale per output channel); int4 (a scale and a minimum per `group` of 32, 64 or 128
    inputs, or with `symmetric` a scale alone); fp8 (e4m3, a scale per block); mxfp4 (e2m1, a power of two per 32).
    `activations`: int8 takes inputs as integers of a step that is at most about 1 % of their root mean square; bf16 as
    16-bit integers (int8, int4, mxfp4) or bf16 (bf16, fp8); auto takes the faster of those that the kind has.
    """

    kind: Literal["bf16", "int8", "int4", "fp8", "mxfp4"] = "int8"
    group: int = 32
    symmetric: bool = False
    activations: Literal["auto", "int8", "bf16"] = "auto"

    def native(self) -> _native.WeightFormat:
        """As the binding takes it; raises ConfigurationError for values that do not go together."""
        return _native.WeightFormat(self.kind, self.group, self.symmetric, self.activations)


@dataclass(frozen=True)
class Gate:
    """The experts' inner activation of gate g and up u.

    `silu`, `gelu`, `gelu_tanh`, `relu`: act(g) * u. `clamped_swiglu`: g = min(g, limit), u = clamp(u, -limit, limit),
    g * sigmoid(alpha * g) * (u + 1).
    """

    kind: Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"] = "silu"
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class NodeStats:
    """What the workers of one runtime node did: the calls it took part in, weight bytes read, and of those the remote ones.

    Mirrored weights divide a prefill into chunks: `stolen_chunks` come from the share of another node, `off_node_chunks`
    began while the kernel named another node than the worker's as the one it ran on.
    """

    calls: int = 0
    bytes_read: int = 0
    remote_bytes: int = 0
    chunks: int = 0
    stolen_chunks: int = 0
    off_node_chunks: int = 0

    @classmethod
    def of(cls, stats: _native.NodeStats) -> NodeStats:
        return cls(*(getattr(stats, field.name) for field in fields(cls)))

    def __add__(self, other: NodeStats) -> NodeStats:
        return NodeStats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: NodeStats) -> NodeStats:
        return NodeStats(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class OperatorStats:
    """Counts since the weights were made; `remote_bytes` were read from verified pages of another node than the reader.

    `nodes`: the same by runtime node, and who computed what.
    """

    calls: int
    seconds: float
    bytes_read: int
    remote_bytes: int
    nodes: tuple[NodeStats, ...] = ()

    @classmethod
    def of(cls, stats: _native.OperatorStats) -> OperatorStats:
        nodes = tuple(map(NodeStats.of, stats.nodes))
        return cls(stats.calls, stats.seconds, stats.bytes_read, stats.remote_bytes, nodes)


def _native_parts(parts: Sequence[Part]) -> list[_native.Part]:
    return [
        _native.Part(list(part.memory_nodes), part.interleaved, list(part.worker_nodes), part.begin, part.end)
        for part in parts
    ]


class _PackedWeights:
    """What every packed weight answers about itself."""

    _weights: _native.LinearWeights | _native.ExpertsWeights

    def buffers(self) -> list[PlacedBuffer]:
        """One per part that holds rows (linear) or features (experts)."""
        return [PlacedBuffer.of(buffer) for buffer in self._weights.buffers() if buffer.bytes]

    @property
    def packed_bytes(self) -> int:
        return self._weights.packed_bytes

    @property
    def isa(self) -> str:
        """The kernel row that packs and computes."""
        return self._weights.isa

    def stats(self) -> OperatorStats:
        return OperatorStats.of(self._weights.stats())


class LinearWeights(_PackedWeights):
    """y = x W^T + b with W [out_features, in_features] packed into the parts (units are output features).

    `isa` names another kernel row than the active one. Raises ConfigurationError (format, isa) and PlacementError (parts
    that do not cover the rows, memory that cannot be had).
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        out_features: int,
        in_features: int,
        format: WeightFormat,
        parts: Sequence[Part],
        has_bias: bool,
        owner: str,
        isa: str | None = None,
    ) -> None:
        self.runtime = runtime
        self._weights = _native.LinearWeights(
            runtime.native,
            out_features,
            in_features,
            format.native(),
            _native_parts(parts),
            has_bias,
            owner,
            isa or "",
        )

    def load_weight(self, matrix: Matrix | FileMatrix, *, first_row: int = 0) -> None:
        """Packs rows [first_row, first_row + matrix.rows) with all threads, each node's part by its own; a file's come whole.

        Raises WeightError, with nothing changed, for another shape or rows that came before, and CheckpointError where the
        file cannot be read.
        """
        self._weights.load_weight(matrix.view(), first_row)

    def load_bias(self, matrix: Matrix) -> None:
        """A [1, out_features] matrix. Raises WeightError for another shape, a second time, or weights without a bias."""
        self._weights.load_bias(matrix.view())

    def missing(self) -> list[str]:
        """What `load_*` has not got yet."""
        return self._weights.missing()

    def forward(self, x: Matrix, out: Matrix) -> None:
        """out [T, out_features] = x [T, in_features] W^T + b; out's columns are contiguous. T may be 0.

        A row with a NaN or an infinity gives NaN in its own row. Raises WeightError for other shapes or missing weights.
        """
        self._weights.forward(x.view(), out.view())

    @property
    def forward_rows(self) -> Callable[[int, str, int, int], None]:
        """`forward(x address, dtype, rows, out address)` of contiguous x and out of one dtype: 3 us less per call than two
        `Matrix`, which is what a small layer takes to decode a token. Nothing is checked but the dtype."""
        return self._weights.forward_rows

    def unpack(self, out: Matrix, *, replica: int = 0) -> None:
        """The dequantised weight [out_features, in_features]: what the packed bytes mean."""
        self._weights.unpack(out.view(), replica)


def linear_packed_bytes(
    out_features: int, in_features: int, format: WeightFormat, has_bias: bool, parts: Sequence[Part]
) -> list[int]:
    """Bytes of each part, before rounding to pages; needs no runtime.

    >>> linear_packed_bytes(64, 64, WeightFormat("int8"), False, [Part((0,), False, (0,), 0, 64)])
    [4352]
    """
    native = format.native()
    return [
        _native.linear_packed_bytes(out_features, in_features, native, has_bias, part) for part in _native_parts(parts)
    ]


class ExpertsWeights(_PackedWeights):
    """The experts of a mixture: gate and up [intermediate, hidden], down [hidden, intermediate], for each expert.

    Units of the parts are intermediate features: shards add partial sums. `isa` names another kernel row than the active
    one. Raises ConfigurationError (format, gate, isa) and PlacementError (parts that do not cover the features, memory
    that cannot be had).
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        experts: int,
        hidden: int,
        intermediate: int,
        format: WeightFormat,
        gate: Gate,
        parts: Sequence[Part],
        has_bias: bool,
        owner: str,
        isa: str | None = None,
    ) -> None:
        self.runtime = runtime
        self._weights = _native.ExpertsWeights(
            runtime.native,
            _native.ExpertsShape(experts, hidden, intermediate, has_bias),
            format.native(),
            _native.Gate(gate.kind, gate.alpha, gate.limit),
            _native_parts(parts),
            owner,
            isa or "",
        )

    def load_experts(
        self,
        gate: Sequence[Matrix | FileMatrix] = (),
        up: Sequence[Matrix | FileMatrix] = (),
        down: Sequence[Matrix | FileMatrix] = (),
        *,
        first_expert: int = 0,
    ) -> None:
        """Packs one matrix per expert from `first_expert` on with all threads; a piece may be left out.

        Raises WeightError, with nothing changed, naming every matrix of another shape or that came before, and
        CheckpointError where a file cannot be read.
        """
        self._weights.load(
            [matrix.view() for matrix in gate],
            [matrix.view() for matrix in up],
            [matrix.view() for matrix in down],
            first_expert,
        )

    def load_gate(self, expert: int, matrix: Matrix) -> None:
        self.load_experts(gate=[matrix], first_expert=expert)

    def load_up(self, expert: int, matrix: Matrix) -> None:
        self.load_experts(up=[matrix], first_expert=expert)

    def load_down(self, expert: int, matrix: Matrix) -> None:
        self.load_experts(down=[matrix], first_expert=expert)

    def load_gate_bias(self, expert: int, matrix: Matrix) -> None:
        self._weights.load_bias("gate", expert, matrix.view())

    def load_up_bias(self, expert: int, matrix: Matrix) -> None:
        self._weights.load_bias("up", expert, matrix.view())

    def load_down_bias(self, expert: int, matrix: Matrix) -> None:
        self._weights.load_bias("down", expert, matrix.view())

    def missing(self) -> list[str]:
        """What `load_*` has not got yet."""
        return self._weights.missing()

    def forward(self, x: Matrix, ids: Matrix, weights: Matrix, out: Matrix) -> None:
        """out [T, hidden] = for each token the sum over its slots of weight * expert(x); ids int64 and weights [T, k].

        An id equal to the number of experts skips its slot. Raises IndexError naming tokens and ids beyond it, and
        WeightError for other shapes or missing weights, before anything is computed.
        """
        if ids.dtype != "i64":
            raise WeightError(f"expert ids are {ids.dtype}, expected i64")
        chosen = _native.ExpertIds(ids.address, ids.rows, ids.columns, ids.row_stride, ids.column_stride)
        self._weights.forward(x.view(), chosen, weights.view(), out.view())

    @property
    def forward_rows(self) -> Callable[[int, str, int, int, int, int, str, int], None]:
        """`forward(x address, dtype, tokens, ids address, slots, weights address, their dtype, out address)` of contiguous
        tensors, out of x's dtype."""
        return self._weights.forward_rows

    def unpack_gate(self, expert: int, out: Matrix, *, replica: int = 0) -> None:
        """The dequantised gate [intermediate, hidden] of one expert: what the packed bytes mean."""
        self._weights.unpack("gate", expert, out.view(), replica)

    def unpack_up(self, expert: int, out: Matrix, *, replica: int = 0) -> None:
        self._weights.unpack("up", expert, out.view(), replica)

    def unpack_down(self, expert: int, out: Matrix, *, replica: int = 0) -> None:
        self._weights.unpack("down", expert, out.view(), replica)


def experts_packed_bytes(
    experts: int, hidden: int, intermediate: int, format: WeightFormat, has_bias: bool, parts: Sequence[Part]
) -> list[int]:
    """Bytes of each part, before rounding to pages; needs no runtime."""
    shape = _native.ExpertsShape(experts, hidden, intermediate, has_bias)
    native = format.native()
    return [_native.experts_packed_bytes(shape, native, part) for part in _native_parts(parts)]
