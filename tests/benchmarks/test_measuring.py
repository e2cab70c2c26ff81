"""The arithmetic and the probes that the figures rest on; no native code and no model."""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import experts, linear, rotation
from benchmarks.bf16 import from_bf16, to_bf16
from benchmarks.machine import PEAKS, Percentiles, Work, against_limits, parts
from benchmarks.memory import PeakMemory, cached_bytes, evict, warm
from benchmarks.operands import WeightSource, experts_in_fp32, relative_error, silu, view
from benchmarks.report import Table, emit, number
from numagraft.errors import ConfigurationError
from numagraft.runtime import RuntimeLayout

MIB = 2**20


def test_fractions_of_a_memory_bound_and_of_a_compute_bound_call():
    us = Percentiles(median=200, p10=190, p90=220)
    memory = against_limits(us, Work(weight_bytes=3e6, operations=2e6), stream_gbps=30, peak_tops=1)
    assert memory["weight_gbps"] == pytest.approx(15)
    assert memory["fraction_of_stream"] == pytest.approx(0.5)
    assert memory["limit_us"] == pytest.approx(100)
    assert memory["fraction_of_limit"] == pytest.approx(0.5)
    compute = against_limits(us, Work(weight_bytes=3e6, operations=1.6e8), stream_gbps=30, peak_tops=1)
    assert compute["limit_us"] == pytest.approx(160)
    assert compute["tops"] == pytest.approx(0.8)
    assert compute["fraction_of_peak"] == compute["fraction_of_limit"] == pytest.approx(0.8)


def test_percentiles():
    found = Percentiles.of([float(i) for i in range(101)])
    assert (found.p10, found.median, found.p90) == pytest.approx((10, 50, 90))
    assert Percentiles.of([5.0]) == Percentiles(5, 5, 5)


def test_every_kind_has_a_peak_on_every_row():
    rows = {"scalar", "avx2", "avx512", "avx512_vnni", "amx"}
    assert all(set(of_kind) == rows for of_kind in PEAKS.values())
    assert set(PEAKS) == {"bf16", "int8", "int4", "fp8", "mxfp4"}


@given(
    experts=st.integers(1, 40),
    tokens=st.integers(1, 9),
    layers=st.integers(1, 3),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_routing_is_legal_and_comes_back_to_an_expert_last(experts, tokens, layers, data, seed):
    topk = data.draw(st.integers(1, experts))
    made = list(
        itertools.islice(
            rotation.calls(layers=layers, experts=experts, topk=topk, tokens=tokens, seed=seed), 4 * layers
        )
    )
    assert [call.layer for call in made] == [i % layers for i in range(4 * layers)]
    for call in made:
        assert call.ids.shape == call.weights.shape == (tokens, topk)
        assert call.ids.dtype == np.int64 and call.ids.min() >= 0 and call.ids.max() < experts
        assert all(len(set(row)) == topk for row in call.ids.tolist())
        assert np.allclose(call.weights.sum(axis=1), 1)
        assert call.distinct == len(np.unique(call.ids))
    for layer in range(layers):
        used = [set(call.ids.ravel().tolist()) for call in made if call.layer == layer]
        for before, after in itertools.pairwise(used):
            # what repeats at once is only what the others no longer suffice for
            assert len(before & after) == max(0, len(before) + len(after) - experts)


def test_one_token_sweeps_all_experts_before_one_repeats():
    made = itertools.islice(rotation.calls(layers=1, experts=128, topk=8, tokens=1), 16)
    assert sorted(np.concatenate([call.ids.ravel() for call in made]).tolist()) == list(range(128))


def test_layers_for():
    assert rotation.layers_for(100, at_least=250) == 3
    assert rotation.layers_for(300, at_least=250) == 1


def test_parts_come_from_the_placement_policies():
    layout = RuntimeLayout.virtual(2)
    assert [(p.begin, p.end, p.worker_nodes) for p in parts("shard", 768, layout)] == [(0, 384, (0,)), (384, 768, (1,))]
    assert len(parts("mirror", 768, layout)) == 2
    with pytest.raises(ConfigurationError, match="did you mean shard"):
        parts("shrad", 768, layout)


def test_bf16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 3.0e38], dtype=np.float32)
    assert from_bf16(to_bf16(values))[:4].tolist() == [1.0, 1.0, 1.015625, -2.5]
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal(1000, dtype=np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    assert (from_bf16(to_bf16(x)) == expected).all()


def test_the_reference_of_experts_is_the_sum_over_the_chosen():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 4), dtype=np.float32)
    gate, up = ({e: generator.standard_normal((5, 4), dtype=np.float32) for e in range(3)} for _ in range(2))
    down = {e: generator.standard_normal((4, 5), dtype=np.float32) for e in range(3)}
    ids, weights = np.array([[0, 2], [1, 0], [2, 1]]), np.array([[0.25, 0.75]] * 3, dtype=np.float32)
    found = experts_in_fp32(x, ids, weights, gate, up, down)
    for token in range(3):
        expected = sum(
            w * (down[e] @ (silu(gate[e] @ x[token]) * (up[e] @ x[token])))
            for e, w in zip(ids[token], weights[token], strict=True)
        )
        assert np.allclose(found[token], expected, atol=1e-5)
    assert relative_error(found * 1.01, found) == pytest.approx(0.01, rel=1e-3)


def test_weight_sources_differ_from_matrix_to_matrix():
    source = WeightSource(64 * 32)
    first, second = source.matrix(64, 32), source.matrix(32, 64)
    assert first.shape == (64, 32) and not (first.ravel() == second.ravel()).all()


def test_a_view_of_the_wrong_type_is_refused():
    with pytest.raises((ValueError, ImportError)):
        view(np.zeros((2, 2), dtype=np.float64), dtype="f32")


def test_peak_memory_sees_what_was_there_only_for_a_while():
    with PeakMemory() as quiet:
        pass
    part = bytes(MIB)
    # not from the heap, which may hold as much that an earlier test gave back
    with PeakMemory() as peak, mmap.mmap(-1, 64 * MIB) as block:
        for at in range(0, 20 * len(block), MIB):
            block[at % len(block) : at % len(block) + MIB] = part
    assert peak.bytes - quiet.bytes > 48 * MIB
    assert quiet.bytes > MIB


def test_cached_bytes_follow_the_page_cache(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(8 * MIB))
    warm([file])
    assert cached_bytes([file]) == 8 * MIB
    evict([file])
    if cached_bytes([file]):
        pytest.skip("this file system keeps its pages whatever it is told")
    with file.open("rb") as opened:
        opened.seek(2 * MIB)
        opened.read(1)
    assert 0 < cached_bytes([file]) < 8 * MIB


@pytest.mark.parametrize(
    ("module", "arguments", "found"),
    [
        (experts, ["--topk", "9", "--experts", "4", "--tokens", "0"], ["--topk is 9", "--tokens is 0"]),
        (linear, ["--in", "0", "--out", "-1"], ["--in is 0", "--out is -1"]),
    ],
)
def test_impossible_sizes_are_named_at_once(module, arguments, found, capsys):
    assert module.main(arguments) == 2
    message = capsys.readouterr().err
    assert all(text in message for text in found)


def test_a_shape_letter_fills_in_what_was_not_given():
    options = experts.parser().parse_args(["--shape", "C", "--topk", "3"])
    assert experts.prepare(options) == []
    assert (options.hidden, options.intermediate, options.experts, options.topk) == (4096, 14336, 8, 3)
    assert isinstance(options, argparse.Namespace)


def test_json_is_the_last_line_with_and_without_tables(capsys):
    emit({"a": 1.5}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1.5}
    emit({"a": 1.5}, [Table("t", ("x", "y"), [("one", 12345.6)])], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "12,346" in "".join(lines[:-1]) and json.loads(lines[-1]) == {"a": 1.5}
    assert [number(v) for v in (True, None, 1234567, 0.123456)] == ["yes", "-", "1,234,567", "0.1235"]
    with pytest.raises(ValueError):
        emit({"a": float("nan")}, as_json=True)
