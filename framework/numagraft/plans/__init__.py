"""How plans are made, judged and shown; `numagraft.planning` is what others use."""
