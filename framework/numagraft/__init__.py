"""Graft NUMA-aware operators onto any Hugging Face model, with rules you can read and placement that is proven.

The table of contents. Names are imported on first use, so that `import numagraft` loads neither torch nor the native
backend (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numagraft.api import load_and_optimize, optimize, plan
    from numagraft.errors import (
        CheckpointError,
        ConfigurationError,
        NumagraftError,
        PlacementError,
        PlanError,
        PlatformError,
        RuleError,
        UnsupportedOperationError,
        WeightError,
    )
    from numagraft.planning import Plan
    from numagraft.platform import Platform
    from numagraft.quantizer import GraftConfig
    from numagraft.report import PlacementReport
    from numagraft.runtime import RuntimeLayout
    from numagraft.stats import operator_stats

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "errors",
    "ConfigurationError": "errors",
    "GraftConfig": "quantizer",
    "NumagraftError": "errors",
    "PlacementError": "errors",
    "PlacementReport": "report",
    "Plan": "planning",
    "PlanError": "errors",
    "Platform": "platform",
    "PlatformError": "errors",
    "RuleError": "errors",
    "RuntimeLayout": "runtime",
    "UnsupportedOperationError": "errors",
    "WeightError": "errors",
    "load_and_optimize": "api",
    "operator_stats": "stats",
    "optimize": "api",
    "plan": "api",
}

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "GraftConfig",
    "NumagraftError",
    "PlacementError",
    "PlacementReport",
    "Plan",
    "PlanError",
    "Platform",
    "PlatformError",
    "RuleError",
    "RuntimeLayout",
    "UnsupportedOperationError",
    "WeightError",
    "load_and_optimize",
    "operator_stats",
    "optimize",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"numagraft.{_HOME[name]}"), name)
    raise AttributeError(f"module 'numagraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
