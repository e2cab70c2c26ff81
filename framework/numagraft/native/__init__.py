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
    FileMatrix,
    Gate,
    LinearWeights,
    Matrix,
    NodeStats,
    OperatorStats,
    WeightFormat,
    experts_packed_bytes,
    linear_packed_bytes,
)

__all__ = [
    "ArenaReport",
    "Capabilities",
    "ExpertsWeights",
    "FileMatrix",
    "Gate",
    "InheritedPolicy",
    "LinearWeights",
    "Matrix",
    "NodeStats",
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
