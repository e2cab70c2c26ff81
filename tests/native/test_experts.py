"""The experts op on every kernel row this CPU runs, against fp32 with the dequantised weights, and across placements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_operands import (
    EXPERTS_BAR,
    FORMATS,
    ISAS,
    ORDERED_ISAS,
    apply_gate,
    bf16,
    describe_worst,
    error,
    from_bf16,
    matrix,
    name_of,
    parts,
    runtime,
)

from numagraft.errors import WeightError
from numagraft.native import ExpertsWeights, Gate, WeightFormat, experts_packed_bytes

GATES = [Gate("silu"), Gate("gelu"), Gate("gelu_tanh"), Gate("relu"), Gate("clamped_swiglu", 1.702, 7.0)]


class Mixture:
    def __init__(
        self, experts, hidden, intermediate, format, *, gate=GATES[0], isa=None, policy="bind", nodes=1, threads=1, bias=False, source=()
    ):
        rng = np.random.default_rng(0)
        self.experts, self.hidden, self.intermediate, self.gate = experts, hidden, intermediate, gate
        self.weights = ExpertsWeights(
            runtime(nodes, threads),
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            format=format,
            gate=gate,
            parts=parts(policy, nodes, intermediate),
            has_bias=bias,
            owner="mixture",
            isa=isa,
        )
        scale = 1 / np.sqrt(hidden), 1 / np.sqrt(hidden), 1 / np.sqrt(intermediate)
        shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        self.source = {
            name: [(rng.standard_normal(shape) * by).astype(np.float32) for _ in range(experts)]
            for (name, shape), by in zip(shapes.items(), scale, strict=True)
        } | dict(source)
        self.weights.load_experts(**{name: [matrix(m) for m in listed] for name, listed in self.source.items()})
        self.bias = {name: rng.standard_normal((experts, shape[0])).astype(np.float32) * bias for name, shape in shapes.items()}
        if bias:
            for expert in range(experts):
                for name in shapes:
                    getattr(self.weights, f"load_{name}_bias")(expert, matrix(self.bias[name][expert : expert + 1]))
        self.dequantised = {name: np.empty((experts, *shape), np.float32) for name, shape in shapes.items()}
        for expert in range(experts):
            for name in shapes:
                getattr(self.weights, f"unpack_{name}")(expert, matrix(self.dequantised[name][expert]))

    def __call__(self, x, ids, weights, dtype=np.float32):
        out = np.full((x.shape[0], self.hidden), 77, dtype=dtype)
        self.weights.forward(matrix(x), matrix(ids), matrix(weights), matrix(out))
        return out

    def expected(self, x, ids, weights):
        out = np.zeros((x.shape[0], self.hidden), np.float64)
        for expert in range(self.experts):
            token, slot = np.nonzero(ids == expert)
            g = x[token] @ self.dequantised["gate"][expert].T + self.bias["gate"][expert]
            u = x[token] @ self.dequantised["up"][expert].T + self.bias["up"][expert]
            y = apply_gate(self.gate, g, u) @ self.dequantised["down"][expert].T + self.bias["down"][expert]
            np.add.at(out, token, weights[token, slot][:, None] * y)
        return out.astype(np.float32)


def routed(tokens, experts, topk, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:topk] for _ in range(tokens)]).astype(np.int64).reshape(tokens, topk)
    return ids, rng.random((tokens, topk), dtype=np.float32) + 0.1


@pytest.mark.sweep
@pytest.mark.parametrize("tokens", [1, 2, 7, 60])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("isa", ORDERED_ISAS)
def test_every_row_is_near_fp32(isa, format, tokens):
    mixture = Mixture(5, 320, 200, format, isa=isa, threads=2)
    x = np.random.default_rng(tokens).standard_normal((tokens, 320)).astype(np.float32)
    ids, weights = routed(tokens, 5, 2)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    bar = EXPERTS_BAR[format.kind]
    assert error(found, expected) <= bar, describe_worst(found, expected)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("isa", ISAS[-1:])
def test_experts_with_more_rows_than_a_pass_takes(isa, format):
    """321 rows are two passes, 655 three; each expert has tokens of its own, so that a lost row shows."""
    rows = [321, 655, 24]
    mixture = Mixture(3, 320, 200, format, isa=isa, threads=2)
    x = np.random.default_rng(8).standard_normal((sum(rows), 320)).astype(np.float32)
    ids = np.repeat(np.arange(3), rows).reshape(-1, 1)
    np.random.default_rng(9).shuffle(ids)
    weights = np.ones(ids.shape, np.float32)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    for row in range(sum(rows)):
        assert error(found[row], expected[row]) <= 3 * EXPERTS_BAR[format.kind], (row, ids[row], describe_worst(found, expected))
    # the control: what another token's row looks like
    assert error(found, np.roll(expected, 1, axis=0)) > 1


@pytest.mark.parametrize("isa", ISAS[-1:])
def test_inner_rows_that_go_past_the_caches_are_the_same(isa):
    """Beyond 16 MiB of quantised inner rows; the same tokens in a small call go through the caches."""
    mixture = Mixture(2, 64, 8192, WeightFormat("int8"), isa=isa, threads=2)
    x = np.random.default_rng(10).standard_normal((1100, 64)).astype(np.float32)
    ids, weights = routed(1100, 2, 2)
    found = mixture(x, ids, weights)
    few = [mixture(x[at : at + 100], ids[at : at + 100], weights[at : at + 100]) for at in range(0, 1100, 100)]
    assert (found == np.concatenate(few)).all(), describe_worst(found, np.concatenate(few))
    assert error(found, mixture.expected(x, ids, weights)) <= EXPERTS_BAR["int8"]
    assert (found != np.roll(found, 1, axis=0)).any(axis=1).all()  # the control: no row is like another


@pytest.mark.sweep
@pytest.mark.parametrize(("hidden", "intermediate"), [(70, 15000), (15000, 70)])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("isa", ORDERED_ISAS)
def test_inputs_beyond_the_cache_are_taken_in_pieces(isa, format, hidden, intermediate):
    mixture = Mixture(1, hidden, intermediate, format, isa=isa, threads=2)
    x = np.random.default_rng(5).standard_normal((70, hidden)).astype(np.float32)
    ids, weights = routed(70, 1, 1)
    bar = EXPERTS_BAR[format.kind]
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert error(found, expected) <= bar, describe_worst(found, expected)
    for name in ("gate", "up") if hidden > intermediate else ("down",):  # control: a chunk left out would be seen
        mixture.dequantised[name][:, :, -512:] = 0
    assert error(found, mixture.expected(x, ids, weights)) > bar


@pytest.mark.sweep
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@pytest.mark.parametrize("isa", ISAS)
def test_gates_and_biases(isa, gate, bias):
    mixture = Mixture(4, 96, 70, WeightFormat("bf16"), gate=gate, isa=isa, bias=bias)
    x = 4 * np.random.default_rng(1).standard_normal((30, 96)).astype(np.float32)  # far enough for the clamp
    ids, weights = routed(30, 4, 3)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert error(found, expected) <= EXPERTS_BAR["bf16"], describe_worst(found, expected)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(ORDERED_ISAS),
    st.sampled_from(["shard", "mirror", "interleave", "bind"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 130), st.integers(1, 300), st.integers(1, 100)),
    st.booleans(),
)
def test_every_placement_gives_what_one_node_gives(format, isa, policy, nodes, threads, shape, bias):
    experts, hidden, intermediate, tokens = shape
    placed = Mixture(experts, hidden, intermediate, format, isa=isa, policy=policy, nodes=nodes, threads=threads, bias=bias)
    one = Mixture(experts, hidden, intermediate, format, isa=isa, bias=bias)
    if format.kind != "fp8":  # its blocks are those of a shard's panels
        for name, weight in one.dequantised.items():
            assert np.array_equal(placed.dequantised[name], weight), name
    x = np.random.default_rng(2).standard_normal((tokens, hidden)).astype(np.float32)
    ids, weights = routed(tokens, experts, min(2, experts))
    found, expected = placed(x, ids, weights), one(x, ids, weights)
    exact = one.expected(x, ids, weights)
    # shards take their own scale for the inner activation, and few terms do not average its rounding out
    scale = np.linalg.norm(expected) + 0.3 * np.linalg.norm(x) + 0.1
    assert np.linalg.norm(found - expected) / scale <= 2.5 * EXPERTS_BAR[format.kind] + (0.05 if format.kind == "fp8" else 0)
    assert np.linalg.norm(placed.expected(x, ids, weights) - found) / scale <= 2.5 * EXPERTS_BAR[format.kind]
    assert np.isfinite(exact).all()


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("nodes", [2, 3])
def test_int4_shards_have_the_chunks_of_one_node(nodes, group):
    """Chunks of 512 features begin where they do in the whole matrix; a shard's first and last may be parts of one."""
    format = WeightFormat("int4", group=group)
    one = Mixture(2, 64, 1400, format)
    placed = Mixture(2, 64, 1400, format, policy="shard", nodes=nodes)
    for name, weight in one.dequantised.items():
        assert np.array_equal(placed.dequantised[name], weight), name
    x = np.random.default_rng(4).standard_normal((40, 64)).astype(np.float32)
    ids, weights = routed(40, 2, 2)
    found, expected = placed(x, ids, weights), one.expected(x, ids, weights)
    assert error(found, expected) <= EXPERTS_BAR["int4"], describe_worst(found, expected)


def test_bf16_shards_add_up_to_one_node():
    x = np.random.default_rng(3).standard_normal((9, 64)).astype(np.float32)
    ids, weights = routed(9, 5, 2)
    one = Mixture(5, 64, 320, WeightFormat("bf16"), bias=True)(x, ids, weights)
    for policy in ("shard", "mirror", "interleave", "bind"):
        placed = Mixture(5, 64, 320, WeightFormat("bf16"), bias=True, policy=policy, nodes=3, threads=2)
        assert error(placed(x, ids, weights), one) <= 1e-5, policy


@pytest.mark.parametrize("isa", ISAS)
def test_skipped_slots_and_idle_experts(isa):
    mixture = Mixture(6, 64, 64, WeightFormat("int8"), isa=isa, bias=True)
    x = np.random.default_rng(4).standard_normal((20, 64)).astype(np.float32)
    ids, weights = routed(20, 3, 2)  # experts 3 to 5 are idle
    ids[::3, 0] = 6
    ids[5] = 6
    assert error(mixture(x, ids, weights), mixture.expected(x, ids, weights)) <= EXPERTS_BAR["int8"]
    assert (mixture(x, ids, weights)[5] == 0).all()
    assert (mixture(x, np.full_like(ids, 6), weights) == 0).all()
    assert mixture(x[:0], ids[:0], weights[:0]).shape == (0, 64)
    same = np.zeros_like(ids)  # one expert twice in a row, and every row
    assert error(mixture(x, same, weights), mixture.expected(x, same, weights)) <= EXPERTS_BAR["int8"]


def test_ids_out_of_range_are_named_before_anything_is_computed():
    mixture = Mixture(6, 64, 64, WeightFormat("int8"))
    x, (ids, weights) = np.ones((20, 64), np.float32), routed(20, 6, 2)
    ids[3, 1], ids[7, 0] = 7, -1
    out = np.full((20, 64), 77, np.float32)
    with pytest.raises(IndexError, match=r"mixture: token 3 chose expert 7, token 7 chose expert -1; expected 0 to 5, or 6"):
        mixture.weights.forward(matrix(x), matrix(ids), matrix(weights), matrix(out))
    assert (out == 77).all()


@pytest.mark.sweep
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_row_stays_in_its_row(isa, kind, bad):
    mixture = Mixture(3, 64, 96, WeightFormat(kind), isa=isa)
    for tokens in (2, 50):
        x = np.random.default_rng(5).standard_normal((tokens, 64)).astype(np.float32)
        ids, weights = routed(tokens, 3, 2)
        clean = mixture(x, ids, weights)
        x[1, 20] = bad
        found = mixture(x, ids, weights)
        assert not np.isfinite(found[1]).all()
        others = np.arange(tokens) != 1
        assert np.array_equal(found[others], clean[others])


@pytest.mark.parametrize("isa", ISAS)
def test_high_halves_of_many_heavy_tailed_rows(isa):
    mixture = Mixture(2, 96, 700, WeightFormat("int8"), isa=isa, threads=2)
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((150, 96)) * np.exp(rng.standard_normal((150, 1)))).astype(np.float32)
    x[3] = 0
    ids, weights = routed(150, 2, 1)
    found, expected = mixture(x, ids, weights), mixture.expected(x, ids, weights)
    assert error(found, expected) <= EXPERTS_BAR["int8"], describe_worst(found, expected)
    assert (found[3] == 0).all()
    # Control: one half alone, of the step that the other half makes possible.
    clipped = expected.copy()
    for expert in range(2):
        token = np.nonzero(ids[:, 0] == expert)[0]
        g, u = (x[token] @ mixture.dequantised[name][expert].T for name in ("gate", "up"))
        inner = apply_gate(mixture.gate, g, u)
        most = 127 * 0.015 * np.sqrt(12) * np.minimum(np.sqrt((inner**2).mean(1)), 1.2533 * np.abs(inner).mean(1))[:, None]
        clipped[token] = weights[token] * (np.clip(inner, -most, most) @ mixture.dequantised["down"][expert].T)
    assert error(found, clipped) > 5 * EXPERTS_BAR["int8"]
    # Replicas take other rows together, and must come to the same bits.
    placed = Mixture(2, 96, 700, WeightFormat("int8"), isa=isa, policy="mirror", nodes=2)
    np.testing.assert_array_equal(placed(x, ids, weights), found)


@pytest.mark.parametrize("share", [0.118, 0.13], ids=["just two halves", "just one"])
@pytest.mark.parametrize("isa", ISAS)
def test_as_many_high_halves_as_a_row_can_have(isa, share):
    """As few inner values other than zero, all alike, as a scale with two halves is chosen for: any fewer have fewer of them."""
    chosen = np.linspace(0, 639, int(share * 640)).round().astype(int)
    gate = np.zeros((640, 64), np.float32)
    gate[chosen, 0] = 1
    up = np.zeros((640, 64), np.float32)
    up[:, 0] = 1
    mixture = Mixture(1, 64, 640, WeightFormat("int8"), gate=Gate("relu"), isa=isa, source={"gate": [gate], "up": [up]})
    x = np.zeros((64, 64), np.float32)
    x[:, 0] = np.linspace(1, 2, 64)
    ids, weights = routed(64, 1, 1)
    exact = weights * x[:, :1] ** 2 * mixture.dequantised["down"][0][:, chosen].sum(1)
    found = mixture(x, ids, weights)
    assert error(found, exact) <= EXPERTS_BAR["int8"], describe_worst(found, exact)
    assert error(found, exact * 127 / 130) > EXPERTS_BAR["int8"]  # control: their low halves alone are nearly nothing


def test_dtypes_and_strides():
    mixture = Mixture(5, 64, 64, WeightFormat("int8"))
    values = from_bf16(bf16(np.random.default_rng(6).standard_normal((9, 64))))
    ids, weights = routed(9, 5, 2)
    plain = mixture(values, ids, weights)
    for x in (bf16(values), values.astype(np.float16), np.asfortranarray(values)):
        assert error(mixture(x, ids, weights), plain) <= (2e-3 if x.dtype == np.float16 else 1e-6)
    assert error(mixture(values, np.asfortranarray(ids), np.asfortranarray(weights)), plain) == 0
    assert error(mixture(values, ids, weights, np.float16).astype(np.float32), plain) <= 1e-3
    assert error(from_bf16(mixture(values, ids, weights, np.uint16)), plain) <= 4e-3


def test_every_piece_comes_once_and_fits():
    shape = {"experts": 3, "hidden": 64, "intermediate": 32}
    made = ExpertsWeights(
        runtime(), **shape, format=WeightFormat("int8"), gate=Gate(), parts=parts("bind", 1, 32), has_bias=True, owner="m"
    )
    assert made.missing() == ["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]
    wide, tall, bias = np.ones((32, 64), np.float32), np.ones((64, 32), np.float32), np.ones((1, 32), np.float32)
    made.load_gate(1, matrix(wide))
    with pytest.raises(WeightError) as caught:
        made.load_experts(gate=[matrix(wide), matrix(wide), matrix(tall), matrix(wide)], down=[matrix(tall)])
    for text in (
        "gate of expert 1: it was loaded before",
        "gate of expert 2: found [64, 32], expected [32, 64]",
        "gate of expert 3: there are 3 experts",
    ):
        assert text in str(caught.value)
    assert made.missing()[:4] == ["gate of expert 0", "gate of expert 2", "up", "down"]  # nothing was changed
    with pytest.raises(WeightError, match="never arrived: gate of expert 0"):
        made.forward(matrix(wide), matrix(np.zeros((32, 1), np.int64)), matrix(np.ones((32, 1), np.float32)), matrix(wide.copy()))
    made.load_gate_bias(0, matrix(bias))
    with pytest.raises(WeightError, match="gate_bias of expert 0: it was loaded before"):
        made.load_gate_bias(0, matrix(bias))
    with pytest.raises(WeightError, match=r"down_bias of expert 0: found \[1, 32\], expected \[1, 64\]"):
        made.load_down_bias(0, matrix(bias))


def test_packed_bytes_are_what_is_allocated():
    for format in FORMATS:
        mixture = Mixture(3, 96, 200, format, policy="shard", nodes=2, bias=True)
        asked = experts_packed_bytes(3, 96, 200, format, True, parts("shard", 2, 200))
        assert sum(asked) == mixture.weights.packed_bytes
        assert [buffer.bytes >= bytes_ for bytes_, buffer in zip(asked, mixture.weights.buffers(), strict=True)] == [True] * 2


def test_counts():
    mixture = Mixture(4, 128, 64, WeightFormat("int8"), policy="shard", nodes=1)
    ids, weights = routed(3, 2, 2)  # both of two experts
    mixture(np.ones((3, 128), np.float32), ids, weights)
    stats = mixture.weights.stats()
    assert stats.calls == 1 and stats.bytes_read == 2 * 3 * 128 * 64 and stats.remote_bytes == 0
