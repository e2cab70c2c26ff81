"""Files that want time or memory are refused in less than two seconds, without taking it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
import tracemalloc

import pytest

from numagraft.errors import RuleError
from numagraft.rulefile import load_rules

from .writing import ONE_NODE, write

RULE = "rules:\n  - {id: a, match: {role: linear}, replace: {class: linear}}\n"


def refused(path) -> str:
    """What is said about `path`, which must come in time and in 64 MiB."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(RuleError) as caught:
            load_rules(path, platform=ONE_NODE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.process_time() - begin < 2 * 4, "tracemalloc slows this fourfold"
    return str(caught.value)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    assert "has 100,000,000 bytes" in refused(path)


def test_an_alias_bomb(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "anchors are not allowed" in refused(write(tmp_path, "schema: 1\nvars:\n  " + "\n  ".join(lines)))


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "!!x ", "&a ", "'", '"', "|\n ", "%"])
def test_endless_nesting(tmp_path, opening):
    refused(write(tmp_path, "vars: " + opening * (900_000 // len(opening))))


def test_many_values(tmp_path):
    assert "more than 50,000 values" in refused(
        write(tmp_path, "schema: 1\nvars: {l: [" + "1," * 200_000 + "]}\n" + RULE)
    )


def test_many_problems_are_counted_not_listed(tmp_path):
    text = "schema: 1\nrules:\n" + "  - {match: {nam: x}, replace: {class: x}}\n" * 3_000
    assert "more" in refused(write(tmp_path, text)).splitlines()[-1]


def test_many_long_lines_of_numbers(tmp_path):
    refused(write(tmp_path, "schema: 1\nvars: {a: " + "9" * 900_000 + "e9, b: 1." + "0" * 90_000 + "}\nx: 1\n" + RULE))


def test_vars_that_double(tmp_path):
    lines = [f"  a{i}: '${{vars.a{i - 1}}}${{vars.a{i - 1}}}'" for i in range(1, 60)]
    assert "expands too far" in refused(write(tmp_path, "schema: 1\nvars:\n  a0: x\n" + "\n".join(lines) + "\n" + RULE))


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"schema: 1\n\xe9", b"\x00" * 100, bytes(range(256))])
def test_bytes_that_are_no_text(tmp_path, data):
    path = tmp_path / "bytes.yaml"
    path.write_bytes(data)
    assert "bytes.yaml:" in refused(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    assert "is not a regular file" in refused(path)


def test_a_directory_and_a_missing_file(tmp_path):
    assert "is a directory" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "missing.yaml")


def test_an_unreadable_preset_name_is_no_path(tmp_path):
    for name in ("platform/../../../etc/passwd", "family/generic.yaml/..", "\x00", "x" * 10_000):
        with pytest.raises(RuleError, match="neither a rule file nor a preset"):
            load_rules(name, platform=ONE_NODE)


def test_a_fresh_process_refuses_within_little_memory(tmp_path):
    path = write(tmp_path, "schema: 1\nvars: " + "[" * 900_000)
    code = f"import numagraft.rulefile as r\ntry: r.load_rules({str(path)!r})\nexcept ValueError: print('refused')"
    limit = 600 << 20
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert shown.stdout.strip() == "refused", shown.stderr


#: what is hostile, by the name of its file; the bars are those of one fresh process that reads all of them
HOSTILE = {
    "alias-bomb.yaml": "schema: 1\nvars:\n  a: &a [x]\n" + "".join(f"  b{i}: &b{i} [*a, *a]\n" for i in range(40)),
    "deep.yaml": "schema: 1\nvars: " + "[" * 900_000,
    "duplicate.yaml": "schema: 1\nschema: 1\n" + RULE,
    "tabs.yaml": "schema: 1\nrules:\n\t- {id: a}\n",
    "merge.yaml": "schema: 1\nvars: {<<: {a: 1}}\n" + RULE,
    "latin.yaml": b"schema: 1\ndescription: \xe9\n",
    "self.yaml": "schema: 1\nextends: ./self.yaml\n" + RULE,
    "ping.yaml": "schema: 1\nextends: ./pong.yaml\n" + RULE,
    "pong.yaml": "schema: 1\nextends: ./ping.yaml\n",
    "traversal.yaml": "schema: 1\nextends: [../../../etc/passwd.yaml, /etc/passwd.yaml]\n" + RULE,
    "dotted.yaml": "schema: 1\nrules:\n  - {id: a, match: {role: linear}, replace: {class: os.system}}\n",
    "resolver.yaml": "schema: 1\nvars: {a: '${oc.env:HOME}'}\n" + RULE,
    "doubling.yaml": "schema: 1\nvars:\n  a0: x\n" + "".join(f"  a{i}: '${{vars.a{i - 1}}}${{vars.a{i - 1}}}'\n" for i in range(1, 60)) + RULE,
    "pattern.yaml": "schema: 1\nrules:\n  - {id: a, match: {name: '" + "(" * 900 + "a" + ")" * 900 + "+"
    + "'}, replace: {class: linear}}\n  - {id: b, match: {name: '((((a{1,900}){1,900}){1,900}){1,900}'}, replace: {class: linear}}\n",
    "escape.yaml.j2": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "time.yaml.j2": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory.yaml.j2": "{{ 'a' * 9000000000 }}",
    "power.yaml.j2": "{{ 9 ** (9 ** 9) }}",
}  # fmt: skip
READ_ALL = """
import json, resource, sys, time
from numagraft.platform import Platform
from numagraft.rulefile import load_rules
def spent():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
here, found = Platform.virtual(1), {}
load_rules("family/generic", platform=here)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    begin = spent()
    try:
        load_rules(path, platform=here)
        said = ""
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    found[path] = (said, spent() - begin, grown / 1024)
print(json.dumps(found))
"""


def test_each_hostile_file_costs_less_than_two_seconds_and_little_memory(tmp_path):
    """Processor time with that of the child that renders templates; memory is the peak over all files so far."""
    import json

    paths = []
    for name, text in HOSTILE.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        paths.append(str(path))
    huge = tmp_path / "files" / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(100_000_000)
    shown = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths, str(huge)], capture_output=True, text=True, timeout=120, check=False
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert len(found) == len(HOSTILE) + 1
    wrong = {path: result for path, result in found.items() if not result[0].startswith("RuleError: ")}
    assert not wrong, "not refused"
    assert max(seconds for _, seconds, _ in found.values()) < 2, found
    assert max(mib for _, _, mib in found.values()) < 200, found
