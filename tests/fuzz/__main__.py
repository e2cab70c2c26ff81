"""`make fuzz`: every target for its share of the time, then a planted bug that must be found.

Exit code 1 with the input's path when something is found; where atheris cannot be had, says so in the last line and stops.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 50
#: of the whole, per target: where strangers' files come in most ways
SHARES = {"rules": 0.35, "templates": 0.2, "plans": 0.3, "imports": 0.15}
#: at most; it stops as soon as the bug is found: 7 to 32 with eight seeds
CONTROL_SECONDS = 240
FINDINGS = Path("build") / "fuzz"


def drive(target: str, folder: Path, seconds: float, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.drive", target, str(folder), str(int(seconds)), *flags],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds + 120,
    )


def findings(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.match(r"(crash|timeout|oom|leak)-", path.name))


def executions(log: str) -> str:
    found = re.search(r"number_of_executed_units: (\d+)", log)
    return f"{int(found[1]):,}" if found else "?"


def explain(log: str) -> str:
    """The exception's own lines of a fuzzer's log."""
    at = log.find("Uncaught Python exception")
    return log[at:].partition("\n==")[0][:2500] if at >= 0 else "\n".join(log.splitlines()[-15:])


def fuzz(target: str, seconds: float, *flags: str, keep: Path | None = None) -> tuple[list[Path], str]:
    """What was found (kept in `keep`), and the log."""
    with tempfile.TemporaryDirectory(prefix="numagraft-fuzz-") as name:
        folder = Path(name)
        done = drive(target, folder, seconds, *flags)
        log = done.stdout + done.stderr
        found = findings(folder)
        if done.returncode and not found:
            raise SystemExit(f"fuzzing {target} ended with {done.returncode} and no input:\n{explain(log)}")
        if keep is None:
            return found, log
        kept = []
        for path in found:
            (keep / target).mkdir(parents=True, exist_ok=True)
            kept.append(Path(shutil.copy(path, keep / target / path.name)))
        return kept, log


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(SHARES)}; all without")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer: 0 is another one every time")
    chosen = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            f"SKIPPED fuzzing: atheris is not installed; it has wheels for CPython 3.11 to 3.13 on Linux, this is "
            f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()} "
            "(pip install 'numagraft[fuzz]')"
        )
        return 0
    shares = {name: share for name, share in SHARES.items() if not chosen.targets or name in chosen.targets}
    wrong = 0
    for target, share in shares.items():
        seconds = chosen.seconds * share / sum(shares.values())
        found, log = fuzz(target, seconds, f"--seed={chosen.seed}", keep=FINDINGS)
        print(f"{target}: {executions(log)} inputs in {seconds:.0f} s, {len(found)} findings", flush=True)
        if found:
            wrong += len(found)
            print("\n".join(f"  {path}" for path in found) + f"\n{explain(log)}", flush=True)
    begin = time.monotonic()
    found, log = fuzz("rules", CONTROL_SECONDS, "--planted", f"--seed={chosen.seed}")
    taken = time.monotonic() - begin
    if not found or "planted" not in log:
        print(f"a planted bug was not found in {taken:.0f} s: nothing above proves anything", flush=True)
        wrong += 1
    else:
        print(f"control: a planted bug was found in {taken:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
