"""Judges a machine: what would cost placement or speed, and what to do about it. Imports no torch."""

from __future__ import annotations

from numagraft.doctor.circumstances import Backend, Circumstances
from numagraft.doctor.diagnosis import Diagnosis, diagnose
from numagraft.doctor.finding import Finding
from numagraft.doctor.measurement import Measurement, measure

__all__ = ["Backend", "Circumstances", "Diagnosis", "Finding", "Measurement", "diagnose", "measure"]
