from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from numagraft import native
from numagraft.cli import doctor_command
from numagraft.doctor import Circumstances, Measurement, diagnose, measure, measurement
from numagraft.doctor.measurement import fingerprint, saved_at
from numagraft.errors import ConfigurationError
from numagraft.native import limits
from numagraft.platform import Platform
from numagraft.runtime import RuntimeLayout

MIB = 1 << 20
DUMP = Path(__file__).resolve().parent / "topologies" / "lab" / "2n2c.tar.xz"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def planted(platform: Platform, *rates: tuple[float, ...]) -> Measurement:
    count = len(rates)
    return Measurement(
        fingerprint(platform), tuple(range(count)), tuple(range(count)), (1,) * count, rates, rates, MIB, 1, 1.0
    )


def test_this_machine_has_a_bandwidth_and_a_latency():
    here = Platform.detect()
    found = measure(here, buffer_bytes=32 * MIB)
    assert found.compute_nodes == here.usable_nodes
    assert set(found.memory_nodes) == {*here.usable_nodes, *here.memory_only_nodes}
    assert all(rate > 0.1 for row in found.read_gb_per_s for rate in row)
    assert all(0.5 < delay < 100_000 for row in found.latency_ns for delay in row)
    assert found.local_gb_per_s(found.compute_nodes[0]) == found.read_gb_per_s[0][0]
    assert found.local_gb_per_s(999) is None


def test_a_chase_in_the_cache_is_faster_than_one_that_leaves_it():
    """The control: a probe that a prefetcher could follow would show no difference."""
    runtime = native.Runtime(RuntimeLayout.from_platform(Platform.detect()))
    seconds = []
    for size in (16 << 10, 256 * MIB):
        buffer = runtime.allocate(size, [0], owner="test")
        region = limits.Region(buffer.address, buffer.bytes, (0,))
        limits.make_chase(runtime, region)
        seconds.append(min(limits.load_seconds(runtime, region, steps=50_000) for _ in range(3)))
        runtime.release(buffer)
    assert seconds[1] > 3 * seconds[0]


def test_a_chase_visits_every_line_once():
    runtime = native.Runtime(RuntimeLayout.virtual(1))
    buffer = runtime.allocate(64 << 10, [0], owner="test")
    limits.make_chase(runtime, limits.Region(buffer.address, buffer.bytes, (0,)))
    import ctypes

    at, seen = buffer.address, set()
    while at not in seen:
        seen.add(at)
        at = ctypes.c_uint64.from_address(at).value
    assert at == buffer.address
    assert seen == set(range(buffer.address, buffer.address + buffer.bytes, 64))


@pytest.mark.parametrize(
    ("offset", "size", "nodes"), [(8, 4096, (0,)), (0, 64, (0,)), (0, 4096, (1,)), (0, 4096, (-1,))]
)
def test_a_chase_that_cannot_be_is_refused(offset, size, nodes):
    runtime = native.Runtime(RuntimeLayout.virtual(1))
    buffer = runtime.allocate(8192, [0], owner="test")
    with pytest.raises(ConfigurationError):
        limits.make_chase(runtime, limits.Region(buffer.address + offset, size, nodes))


def test_it_is_kept_for_the_same_machine_only():
    here = Platform.detect()
    assert Measurement.load(here) is None
    found = planted(here, (30.0,))
    path = found.save()
    assert path == saved_at(found.fingerprint)
    assert Measurement.load(here) == found
    assert Measurement.load(replace(here, allowed_cpus=here.allowed_cpus[:-1])) is None
    assert Measurement.load(Platform.from_dump(DUMP)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "fingerprint": 5}'])
def test_a_file_of_something_else_is_no_measurement(text):
    here = Platform.detect()
    path = saved_at(fingerprint(here))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert Measurement.load(here) is None


def test_a_dump_cannot_be_measured():
    with pytest.raises(ConfigurationError, match="is a dump"):
        measure(Platform.from_dump(DUMP))


@pytest.mark.parametrize("columns", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("slow", [1, 10, 100, 1000])
def test_the_buffer_and_the_passes_are_what_the_time_allows(columns, slow):
    """From a server (0.5 ns to fill a byte, 10 GB/s) to a machine that is emulated."""
    speed = measurement._Speed(prepare=5e-10 * slow, read=1e-10 * slow, chase=0.02, variants=12)
    size = speed.affordable(1 << 30, columns=columns, rows=columns)
    passes = speed.passes(size, columns=columns, rows=columns)
    seconds = columns * (speed.prepare * size + columns * passes * (speed.read * size + speed.chase))
    seconds += speed.variants * speed.read * min(size, measurement._LEAST_BYTES)
    least = size == measurement._TRIAL_BYTES and passes == 1
    assert seconds < 16 or least
    assert passes % 2 == 1
    if columns == 2 and slow == 1:
        assert (size, passes) == (1 << 30, 5)


def test_a_slow_machine_is_measured_in_time(monkeypatch):
    """The control is the same machine with time enough: there the buffer is not cut."""
    here = Platform.detect()
    monkeypatch.setattr(measurement, "_MOST_BYTES", 64 * MIB)
    monkeypatch.setattr(measurement, "_LEAST_BYTES", 64 * MIB)
    assert measure(here).buffer_bytes == 64 * MIB
    hurried = measure(here, budget_seconds=0.05)
    assert hurried.buffer_bytes < 64 * MIB and hurried.passes == 1


def test_nodes_of_unequal_speed_are_told():
    platform = Platform.from_dump(DUMP)
    slow = diagnose(Circumstances(platform), measurement=planted(platform, (200.0, 90.0), (90.0, 100.0)))
    (finding,) = [finding for finding in slow.findings if finding.topic == "uneven-bandwidth"]
    assert "node 1 reads its own memory at 100 GB/s, node 0 at 200" in finding.found
    even = diagnose(Circumstances(platform), measurement=planted(platform, (200.0, 90.0), (90.0, 190.0)))
    assert not [finding for finding in even.findings if finding.topic == "uneven-bandwidth"]
    assert json.loads(even.to_json())["measurement"]["read_gb_per_s"] == [[200.0, 90.0], [90.0, 190.0]]


def test_command(monkeypatch):
    monkeypatch.setattr("numagraft.doctor.measurement._LEAST_BYTES", 16 * MIB)
    monkeypatch.setattr("numagraft.doctor.measurement._MOST_BYTES", 16 * MIB)
    app = typer.Typer()
    doctor_command.register(app)
    app.command("other")(lambda: None)
    result = CliRunner().invoke(app, ["doctor", "--measure"], env={"COLUMNS": "300"})
    assert "latency ns" in result.stdout
    assert "kept for planning in" in result.stderr
    assert Measurement.load(Platform.detect()) is not None
