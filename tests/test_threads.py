"""How many threads of a process with a grafted model run at once, torch's counted; two models and two callers. Each case in
a process of its own, watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))

PRELUDE = """
import os, threading, time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; it must be set before torch loads
import torch
from numagraft import optimize
from tests import models
torch.manual_seed(0)
RULES = {"extends": "auto", "vars": {"format": "int8"}}
def graft(**changes):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    model = models.build(models.llama(**{**sizes, **changes}), dtype=torch.float32).eval()
    return optimize(model, RULES)
def decode(model, tokens, ids=(1, 5, 9)):
    out = model.generate(torch.tensor([list(ids)]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return out[0].tolist()
"""


def start(body: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def outcome(body: str, *, code: int = 0) -> str:
    process = start(body)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, err
    return out


def running(pid: int) -> int:
    """Threads of a process that run or could."""
    count = 0
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            count += stat.read_text().rpartition(")")[2].split()[0] == "R"
        except (FileNotFoundError, ProcessLookupError):
            continue
    return count


def watch(body: str) -> list[int]:
    """Samples while the body prints "begin" to when it prints "end"."""
    process = start(body)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "begin\n", process.communicate()[1]
    os.set_blocking(process.stdout.fileno(), False)
    samples = []
    while process.stdout.readline() != "end\n":
        samples.append(running(process.pid))
        time.sleep(0.002)
        assert process.poll() is None
    process.communicate()
    return samples


DECODE = """
model = graft()
decode(model, 8)
print("begin", flush=True)
stop = time.monotonic() + 3
while time.monotonic() < stop: decode(model, 16)
print("end", flush=True)
"""


@pytest.mark.slow
def test_no_more_threads_run_than_there_are_cores():
    samples = watch(DECODE)
    assert len(samples) > 100
    above = sum(count > CORES for count in samples) / len(samples)
    assert above < 0.02, sorted(samples)[-20:]


@pytest.mark.slow
def test_the_control_one_busy_thread_more_is_seen():
    busy = """
    def spin():
        data = torch.ones(64, 64)
        while True: torch.mm(data, data)
    for _ in range(os.cpu_count() + 1): threading.Thread(target=spin, daemon=True).start()
    """
    samples = watch(textwrap.dedent(busy).strip() + "\n" + DECODE.strip() + "\nos._exit(0)")
    assert sum(count > CORES for count in samples) / len(samples) > 0.5


@pytest.mark.slow
def test_two_models_and_two_threads_at_once_give_what_each_gives_alone():
    body = """
    mask = os.sched_getaffinity(0)
    one, two = graft(), graft(hidden_size=512, num_hidden_layers=3)
    prompts = [(1, 5, 9), (7, 3), (2, 2, 8, 11)]
    alone = {(m, p): decode(model, 12, p) for m, model in enumerate((one, two)) for p in prompts}
    wrong = []
    def caller(first):
        for turn in range(4):
            for m, p in list(alone)[first:] + list(alone)[:first]:
                if decode((one, two)[m], 12, p) != alone[m, p]: wrong.append((m, p))
        if os.sched_getaffinity(0) != mask: wrong.append("affinity")
    threads = [threading.Thread(target=caller, args=(first,)) for first in (0, 3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(wrong, os.sched_getaffinity(0) == mask)
    """
    assert outcome(body) == "[] True\n"


@pytest.mark.slow
def test_an_idle_model_uses_no_cpu():
    body = """
    model = graft()
    decode(model, 16)
    time.sleep(0.05)
    begin = time.process_time()
    time.sleep(5)
    print(time.process_time() - begin)
    """
    assert float(outcome(body)) < 0.05
