"""The suite's table of cases, and what it makes of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import experts, linear, suite
from benchmarks.cases import Case, all_cases, peer_cases
from benchmarks.suite import chosen, command, last_json, parser, run_case
from benchmarks.suite_report import markdown, rows_of, write_docs

OURS = {
    "us_median": 100.0,
    "weight_gbps": 25.0,
    "tops": 0.5,
    "fraction_of_limit": 0.9,
    "error_dequantised": 0.01,
    "format": "int8",
}
TORCH = {"peer": "torch grouped_mm bf16", "us_median": 250.0, "error_unquantised": 0.005}


def test_ids_are_unique_and_every_command_parses():
    cases = all_cases()
    assert len({case.id for case in cases}) == len(cases) > 50
    for case in cases:
        if case.module in ("experts", "linear"):
            module = experts if case.module == "experts" else linear
            module.parser().parse_args(list(case.arguments))
        assert case.aim is None or case.stretch is None or case.aim != case.stretch


def test_peers_can_be_made_of_every_id_that_a_case_names():
    wanted = {peer for case in all_cases() for peer in case.peers}
    made = peer_cases(wanted)
    assert {case.id for case in made} == wanted
    sizes = dict(zip(made[0].arguments[::2], made[0].arguments[1::2], strict=False))
    assert sizes["--hidden"] in ("2048", "4096", "7168")


def test_only_and_the_interpreter_of_kt_kernel_choose_cases():
    options = parser().parse_args(["--json", "x", "--only", "experts-A-1-int8"])
    assert [case.id for case in chosen(options)] == ["experts-A-1-int8", "torch-experts-A-1"]
    options.kt_python = "/opt/kt/bin/python"
    ids = [case.id for case in chosen(options)]
    assert ids == ["experts-A-1-int8", "kt-AMXINT8-A-1", "torch-experts-A-1"]
    kt = next(case for case in chosen(options) if case.id.startswith("kt-"))
    options.wrap = "numactl -N 0"
    assert command(kt, options)[:4] == ["numactl", "-N", "0", "/opt/kt/bin/python"]
    options.no_peers = True
    assert len(chosen(options)) == 1


def test_the_last_json_line_counts():
    assert last_json('{"a": 1}\n{"b": 2}\ngoodbye\n') == {"b": 2}
    assert last_json("nothing") is None and last_json("{broken") is None


def test_a_case_that_fails_says_why():
    options = parser().parse_args(["--json", "x"])
    found = run_case(Case("bad", "bad", "experts", ("--topk", "0")), options)
    assert found == {"failed": "--topk is 0: expected at least 1"}


def test_results_become_rows_with_peers_and_failures(tmp_path):
    case, other = (next(c for c in all_cases() if c.id == id) for id in ("experts-A-1-int8", "experts-A-1-int4"))
    results = {case.id: OURS, other.id: {"failed": "no such format"}, "torch-experts-A-1": TORCH}
    rows = rows_of([case, other], results)
    assert rows[0].ratios == {"torch grouped_mm bf16": pytest.approx(2.5)}
    assert rows[0].cells()[4] == 0.9 and rows[1].cells()[-1] == "no such format"
    text = "\n".join(markdown(rows, results))
    assert "2.50x" in text and "no such format" in text and "torch-experts-A-1" in text
    written = write_docs(rows, results, tmp_path)
    assert (tmp_path / "suite.md") in written
    if len(written) > 1:
        assert written[1].read_bytes().startswith(b"\x89PNG")


def test_results_are_kept_with_resume(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"experts-A-1-int8": OURS}))
    ran = []
    monkeypatch.setattr(suite, "run_case", lambda case, options: ran.append(case.id) or dict(TORCH))
    arguments = ["--json", str(out), "--only", "experts-A-1-int8", "--docs", str(tmp_path / "docs"), "--resume"]
    assert suite.main(arguments) == 0
    assert ran == ["torch-experts-A-1"]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["cases"] == 2 and last["failed"] == []
    assert suite.main(["--json", str(out), "--only", "nothing"]) == 2


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (experts, ["--hidden", "128", "--intermediate", "192", "--experts", "8", "--topk", "2"]),
        (linear, ["--in", "192", "--out", "320"]),
    ],
)
def test_operator_benchmarks_print_every_key(module, sizes, format, tokens, capsys):
    arguments = [*sizes, "--tokens", str(tokens), "--format", format, "--memory-gib", "0.002", "--rounds", "1"]
    assert module.main([*arguments, "--seconds", "0.01", "--error", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = "us_median us_p10 us_p90 weight_gbps stream_gbps fraction_of_stream tops peak_tops fraction_of_peak isa "
    assert set((keys + "limit_us fraction_of_limit packing_gb_per_s").split()) <= set(found)
    assert found["us_p10"] <= found["us_median"] <= found["us_p90"]
    assert found["fraction_of_limit"] == pytest.approx(max(found["fraction_of_stream"], found["fraction_of_peak"]))
    if module is linear:
        assert found["error_weights"] < {"bf16": 1e-6, "int8": 0.02, "int4": 0.09}[format]
    # a wrong expert, layout or scale gives an error near 1
    assert found["error_dequantised"] < 0.03


def test_no_case_starts_beyond_the_budget_and_the_rest_can_be_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run_case", lambda case, options: dict(OURS))
    arguments = [
        "--json",
        str(tmp_path / "out.json"),
        "--docs",
        str(tmp_path),
        "--no-peers",
        "--only",
        "experts-A-1-.*",
    ]
    suite.main([*arguments, "--budget", "0"])
    assert json.loads((tmp_path / "out.json").read_text() if (tmp_path / "out.json").exists() else "{}") == {}
    suite.main([*arguments, "--budget", "100", "--resume"])
    assert len(json.loads((tmp_path / "out.json").read_text())) > 3
    assert last_json(capsys.readouterr().out)["left"] == 0


def test_a_share_of_torch_is_met_from_below_and_a_fraction_from_above():
    shared = Case("x", "x", "experts", (), figure="share_of_torch", aim=0.55, peers=("torch",))
    row = rows_of([shared], {"x": {**OURS, "us_median": 50.0}, "torch": {**TORCH, "us_median": 100.0}})[0]
    assert (row.figure, row.met) == (0.5, True)
    row = rows_of([shared], {"x": {**OURS, "us_median": 60.0}, "torch": {**TORCH, "us_median": 100.0}})[0]
    assert row.met is False
    assert rows_of([shared], {"x": OURS})[0].met is None
    fraction = Case("y", "y", "experts", (), aim=0.85)
    assert rows_of([fraction], {"y": OURS})[0].met is True
