"""The façade over the C++ backend: the only importer of `numagraft._native`. Imports no torch.

Tensors cross as `Matrix` (address, dtype name, shape, strides); whoever calls keeps the memory alive for the call.
Every call that computes releases the GIL.
"""

from __future__ import annotations

from numagraft.native.capabilities import Capabilities, capabilities
from numagraft.native.pages import PageCount, query_page_sizes, query_page_sizes_of, query_pages
from numagraft.native.runtime import ArenaReport, PlacedBuffer, Runtime, WorkerPlace
from numagraft.native.system import (
    InheritedPolicy,
    Probe,
    available_by_node,
    binding_allowed,
    inherited_policy,
    memory_cgroup_limit,
    plant_available,
    set_fault,
)
from numagraft.native.weights import (
    ExpertsWeights,
    Gate,
    LinearWeights,
    Matrix,
    OperatorStats,
    WeightFormat,
    experts_packed_bytes,
    linear_packed_bytes,
)

__all__ = [
    "ArenaReport",
    "Capabilities",
    "ExpertsWeights",
    "Gate",
    "InheritedPolicy",
    "LinearWeights",
    "Matrix",
    "OperatorStats",
    "PageCount",
    "PlacedBuffer",
    "Probe",
    "Runtime",
    "WeightFormat",
    "WorkerPlace",
    "available_by_node",
    "binding_allowed",
    "capabilities",
    "experts_packed_bytes",
    "inherited_policy",
    "linear_packed_bytes",
    "memory_cgroup_limit",
    "plant_available",
    "query_page_sizes",
    "query_page_sizes_of",
    "query_pages",
    "set_fault",
]

# The shape of this module (what is not imported below is yet to come; signatures are the seam others build on):
#
#   capabilities() -> Capabilities(isa: str, supported: tuple[str, ...], forced: bool, compiler: str, sanitizer: str)
#       `isa` is the kernel row in use ("scalar" | "avx2" | "avx512" | "avx512_vnni" | "amx"); NUMAGRAFT_ISA forces one and
#       an unsupported one raises ConfigurationError naming the supported ones.
#
#   @dataclass(frozen=True) Matrix(address: int, dtype: "f32"|"bf16"|"f16", rows: int, columns: int,
#                                  row_stride: int, column_stride: int = 1)          strides in elements
#   @dataclass(frozen=True) WeightFormat(kind="int8", group=32, symmetric=False, activations="auto")
#   @dataclass(frozen=True) Gate(kind="silu", alpha=1.702, limit=7.0)
#   @dataclass(frozen=True) PlacedBuffer(address: int, bytes: int, nodes: tuple[int, ...], interleaved: bool, owner: str)
#       `nodes` index the runtime's nodes
#
#   class Runtime(layout: numagraft.runtime.RuntimeLayout)
#       .layout   .memory_report()
#   class LinearWeights(runtime, *, out_features, in_features, format: WeightFormat, parts: Sequence[placement.Part],
#                       has_bias: bool, owner: str)
#       .load_weight(matrix: Matrix, *, first_row=0)         rows may arrive in pieces, any order, each exactly once
#       .load_bias(matrix: Matrix)                           rows=1
#       .missing() -> list[str]
#       .forward(x: Matrix, out: Matrix) -> None
#       .unpack(out: Matrix, *, part=0)                      dequantised weights, for tests and fidelity
#       .buffers() -> list[PlacedBuffer]     .packed_bytes -> int     .stats() -> OperatorStats     .isa
#   class ExpertsWeights(runtime, *, experts, hidden, intermediate, format, gate: Gate, parts, has_bias, owner)
#       .load_gate(expert, Matrix [I, H]) .load_up(expert, Matrix [I, H]) .load_down(expert, Matrix [H, I])
#       .load_gate_bias(expert, m) .load_up_bias(expert, m) .load_down_bias(expert, m)
#       .load_experts(gate=[Matrix...], up=[...], down=[...], first_expert=0)      many at once, all threads packing
#       .forward(x: Matrix, ids: Matrix-like int64 [T, k], weights: Matrix [T, k], out: Matrix)
#       .unpack_gate(expert, out) .unpack_up(expert, out) .unpack_down(expert, out)
#       .missing() .buffers() .packed_bytes .stats()
#   OperatorStats(calls: int, seconds: float, bytes_read: int, remote_bytes: int)
#
#   linear_packed_bytes(out_features, in_features, format, has_bias, parts) -> list[int]       one per part; no runtime
#   experts_packed_bytes(experts, hidden, intermediate, format, has_bias, parts) -> list[int]
#
#   query_pages(address, bytes) -> PageCount(per_node: dict[int, int] (kernel node id -> pages), absent: int,
#                                            method: "move_pages"|"numa_maps"|..., page_bytes: int)
#   query_page_sizes(address, bytes) -> dict[int, int]       bytes by page size, from smaps
#   binding_allowed() -> Probe(mbind: str|None, ...)         None or the errno name for each system call, tried for real
#   set_fault(call: str, errno: int | None)                  test seam: the named system call fails from now on
