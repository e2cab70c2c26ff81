"""Benchmarks: `python -m benchmarks.<name> --json` from the repository root.

They print figures and assert nothing; each measures the machine's limits, and its peers where it can, in the same run.
The last line of the output is one JSON object.
"""
