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

    `format` auto keeps the bytes of a checkpoint in fp8 or mxfp4, and is int8 elsewhere.
    `group` and `symmetric` say how int4 is grouped; int8 is symmetric per output channel, mxfp4 has a power of two per 32
    inputs, fp8 is e4m3 with a scale per block. `activations`: int8 rounds inputs as far as the operator's error allows,
    bf16 keeps 16 bits of them, auto takes the faster one of the format.
    """

    format: Literal["auto", "bf16", "int8", "int4", "fp8", "mxfp4"] = "auto"
    group: Literal[32, 64, 128] = 32
    symmetric: bool = False
    activations: Literal["auto", "int8", "bf16"] = "auto"
    placement: PlacementSpec = AUTO

    @property
    def kind(self) -> Literal["bf16", "int8", "int4", "fp8", "mxfp4"]:
        """The format; that of `auto` where no checkpoint has settled it."""
        return "int8" if self.format == "auto" else self.format

    def weight_format(self) -> native.WeightFormat:
        return native.WeightFormat(
            kind=self.kind, group=self.group, symmetric=self.symmetric, activations=self.activations
        )

    def conflict(self) -> Rejected | None:
        """The kwargs that do not go together: one that would be ignored is refused."""
        if self.format != "int4" and self.group != 32:
            return Rejected(f"kwarg group={self.group} is for format int4; format is {self.format}")
        floating = self.format in ("bf16", "fp8")
        if floating and self.symmetric:
            return Rejected(f"kwarg symmetric is for format int4; format is {self.format}")
        if floating and self.activations == "int8":
            return Rejected(f"kwarg activations=int8 needs integer weights; format is {self.format}")
        return None

    def label(self) -> str:
        """For `repr` and tables: `int4 g32 asymmetric`, `int8`."""
        text = self.kind
        if self.format == "int4":
            text += f" g{self.group} {'symmetric' if self.symmetric else 'asymmetric'}"
        return text if self.activations == "auto" else f"{text}, activations={self.activations}"
