"""Other implementations of the same layers, measured in the same way: same routing, rotation and statistics.

Each module is a command that prints one JSON object with `us_median, us_p10, us_p90` and, with `--error`,
`error_unquantised`. None of them imports numagraft, so that each runs with an interpreter that has only its own library and
numpy.
"""
