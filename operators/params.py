"""The kwargs that `linear` and `experts` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from numagraft import native
from numagraft.contract import Rejected
from numagraft.placement import PlacementSpec

AUTO = PlacementSpec()


@dataclass(frozen=True)
class PackedParams:
    """How weights are packed, how inputs are taken, and where the weights go.

    `group` and `symmetric` say how int4 is grouped; int8 is symmetric per output channel. `activations`: int8 multiplies
    in integers, bf16 in floating point, auto takes the faster one of the format.
    """

    format: Literal["bf16", "int8", "int4"] = "int8"
    group: Literal[32, 64, 128] = 32
    symmetric: bool = False
    activations: Literal["auto", "int8", "bf16"] = "auto"
    placement: PlacementSpec = AUTO

    def weight_format(self) -> native.WeightFormat:
        return native.WeightFormat(
            kind=self.format, group=self.group, symmetric=self.symmetric, activations=self.activations
        )

    def conflict(self) -> Rejected | None:
        """The kwargs that do not go together: one that would be ignored is refused."""
        if self.format != "int4" and self.group != 32:
            return Rejected(f"kwarg group={self.group} is for format int4; format is {self.format}")
        if self.format == "bf16" and self.symmetric:
            return Rejected("kwarg symmetric is for format int4; format is bf16")
        if self.format == "bf16" and self.activations == "int8":
            return Rejected("kwarg activations=int8 needs integer weights; format is bf16")
        return None

    def label(self) -> str:
        """For `repr` and tables: `int4 g32 asymmetric`, `int8`."""
        text = self.format
        if self.format == "int4":
            text += f" g{self.group} {'symmetric' if self.symmetric else 'asymmetric'}"
        return text if self.activations == "auto" else f"{text}, activations={self.activations}"
