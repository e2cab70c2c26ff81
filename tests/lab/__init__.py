"""A virtual machine with a real multi-node Linux kernel, in which the tests marked `numa` run. See docs/lab.md.

    python -m tests.lab setup                              once: the emulator and a kernel
    python -m tests.lab run --nodes 2                      this project's tests/numa on two nodes
    python -m tests.lab run --topology sparse-ids -- numactl -H
"""
