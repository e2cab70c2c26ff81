"""Tests that need several NUMA nodes (marker `numa`). Run them in the lab: `make lab`. Nothing here imports torch unless
it is marked slow: importing it takes half a minute in an emulated guest."""
