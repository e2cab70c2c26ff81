"""The linear op on every kernel row this CPU runs, against fp32 with the dequantised weights, and across placements."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_operands import (
    FORMATS,
    ISAS,
    LINEAR_BAR,
    ORDERED_ISAS,
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
from numagraft.native import LinearWeights, WeightFormat


class Layer:
    def __init__(self, out_features, in_features, format, *, isa=None, policy="bind", nodes=1, threads=1, bias=True, seed=0, change=None):
        rng = np.random.default_rng(seed)
        self.weights = LinearWeights(
            runtime(nodes, threads),
            out_features=out_features,
            in_features=in_features,
            format=format,
            parts=parts(policy, nodes, out_features),
            has_bias=bias,
            owner="layer",
            isa=isa,
        )
        values = rng.standard_normal((out_features, in_features)).astype(np.float32)
        self.weights.load_weight(matrix(values if change is None else change(values)))
        self.bias = rng.standard_normal((1, out_features)).astype(np.float32) if bias else np.zeros((1, out_features), np.float32)
        if bias:
            self.weights.load_bias(matrix(self.bias))
        self.dequantised = np.empty((out_features, in_features), dtype=np.float32)
        self.weights.unpack(matrix(self.dequantised))

    def __call__(self, x, dtype=np.float32):
        out = np.full((x.shape[0], self.bias.shape[1]), 77, dtype=dtype)
        self.weights.forward(matrix(x), matrix(out))
        return out

    def expected(self, x):
        return x @ self.dequantised.T + self.bias


@pytest.mark.sweep
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 33, 70, 400])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("isa", ORDERED_ISAS)
def test_every_row_is_near_fp32_and_scalar(isa, format, tokens):
    layer, scalar = Layer(70, 600, format, isa=isa), Layer(70, 600, format, isa="scalar")
    x = np.random.default_rng(tokens).standard_normal((tokens, 600)).astype(np.float32)
    found, expected = layer(x), layer.expected(x)
    assert error(found, expected) <= LINEAR_BAR[format.kind], describe_worst(found, expected)
    reference = scalar(x)
    assert error(found, reference) <= LINEAR_BAR[format.kind] * 1.5, describe_worst(found, reference)


@pytest.mark.parametrize(("tokens", "in_features"), [(20, 300), (70, 1700)])
@pytest.mark.parametrize("activations", ["auto", "bf16"])
def test_integer_rows_agree_exactly_but_for_the_last_rounding(activations, tokens, in_features):
    """With 16 bits whatever the inputs on every ISA; else whole integers are finer than those of two halves (kWideError)."""
    x = np.random.default_rng(0).standard_normal((tokens, in_features)).astype(np.float32)
    x[:, 7] *= 40  # so that the high halves are at work
    x[5, ::90] *= 40  # here in most units, so that blocks differ
    format = WeightFormat("int8", activations=activations)
    outputs = {isa: Layer(50, in_features, format, isa=isa)(x) for isa in ISAS}
    halves = {isa for isa in ISAS if isa in ("avx512_vnni", "amx")}
    for alike in [set(ISAS)] if activations == "bf16" else [halves, set(ISAS) - halves]:
        first = min(alike, key=ISAS.index, default=None)
        for isa in alike:
            assert error(outputs[isa], outputs[first]) <= 1e-6, (isa, first, describe_worst(outputs[isa], outputs[first]))


@pytest.mark.sweep
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("isa", ORDERED_ISAS)
def test_outlier_channels(isa, format, tokens):
    """0.2 % of the channels 20 times larger: one scale per token alone would cost 5 % here."""
    rng = np.random.default_rng(1)
    layer = Layer(64, 1536, format, isa=isa)
    x = rng.standard_normal((tokens, 1536)).astype(np.float32)
    x[:, rng.choice(1536, 3, replace=False)] *= 20
    found, expected = layer(x), layer.expected(x)
    assert error(found, expected) <= LINEAR_BAR[format.kind], describe_worst(found, expected)
    # the control: what one int8 scale per token would have cost
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    assert error(layer.expected(np.round(x / scale) * scale), expected) > 0.03


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_one_half_are_untouched_by_a_neighbour_of_two(isa, kind, threads):
    """Where a row has a high half, those of its block that have none must have zeros, whatever calls before left there."""
    layer = Layer(64, 1024, WeightFormat(kind), isa=isa, threads=threads)
    plain = np.random.default_rng(6).standard_normal((90, 1024)).astype(np.float32)
    mixed, wide = plain.copy(), plain.copy()
    mixed[5::32, ::40] *= 40  # one row of each block, in nearly every unit
    wide[:, ::40] *= 40
    others = np.arange(90) % 32 != 5
    before = layer(plain)
    layer(wide)  # every row of every block
    found = layer(mixed)
    assert (found[others] == before[others]).all(), describe_worst(found[others], before[others])
    assert error(found[~others], layer.expected(mixed)[~others]) <= LINEAR_BAR[kind]
    assert error(found[~others], before[~others]) > 0.5  # the control: the neighbour's own results did change


@pytest.mark.parametrize("kind", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("isa", ISAS)
def test_sixteen_bit_activations(isa, kind):
    layer = Layer(64, 1024, WeightFormat(kind, activations="bf16"), isa=isa)
    for tokens in (1, 20):
        x = np.random.default_rng(2).standard_normal((tokens, 1024)).astype(np.float32)
        # tiles re-round nibbles to int8, which is then what remains
        assert error(layer(x), layer.expected(x)) <= (9e-3 if isa == "amx" and kind != "int8" and tokens > 1 else 1e-3)


#: inputs under one int8 scale of the tile kernels
SPAN = {"int4": 1024, "mxfp4": 512}


def rerounding(weights, span):
    """What int8 weights with a scale per channel and `span` inputs cost of the output (Frobenius), from the weights alone."""
    steps = np.abs(weights.reshape(len(weights), -1, span)).max(axis=2) / 127
    return np.sqrt((steps**2 / 12).sum() * span / (weights**2).sum())


def on_grids(values):
    """The nearest values on grids of 16 levels, whose scales and minima are bfloat16 and no multiples of anything in common."""
    groups = values.reshape(len(values), -1, 32)
    low = groups.min(axis=2, keepdims=True)
    scale = from_bf16(bf16((groups.max(axis=2, keepdims=True) - low) / 15))
    low = from_bf16(bf16(low))
    return (np.clip(np.round((groups - low) / scale), 0, 15) * scale + low).astype(np.float32).reshape(values.shape)


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no int8 tiles")
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_multiply_whole_grids_as_they_are(symmetric, group):
    """All but for rounding scales and minima to bfloat16; weights that have a grid of their own keep that and are re-rounded."""
    format = WeightFormat("int4", group=group, symmetric=symmetric, activations="bf16")
    x = np.random.default_rng(7).standard_normal((40, 2048)).astype(np.float32)
    whole = Layer(96, 2048, format, isa="amx", bias=False)
    assert error(whole(x), whole.expected(x)) <= 0.0047 < 0.0065 < rerounding(whole.dequantised, SPAN[format.kind])


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no int8 tiles")
@pytest.mark.parametrize("every", [1, 2, 16])
def test_columns_with_a_grid_of_their_own_keep_it_beside_whole_ones(every):
    """`every`: a column of so many; with 16, half of the tiles have but one."""
    x = np.random.default_rng(8).standard_normal((40, 2048)).astype(np.float32)

    def some_on_grids(values):
        values[::every] = on_grids(values[::every])
        return values

    values = some_on_grids(np.random.default_rng(0).standard_normal((96, 2048)).astype(np.float32))
    layer = Layer(96, 2048, WeightFormat("int4", activations="bf16"), isa="amx", bias=False, change=some_on_grids)
    assert np.array_equal(layer.dequantised[::every], values[::every])
    others = np.delete(np.arange(96), np.s_[::every])
    assert all(0.06 < error(layer.dequantised[row], values[row]) < 0.085 for row in others)
    found, expected = layer(x), layer.expected(x)
    assert 0.0055 < error(found[:, ::every], expected[:, ::every]) <= 0.0085  # re-rounded
    assert error(found, expected) <= 0.0085


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no int8 tiles")
@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_tiles_keep_inputs_as_exact_as_the_weights_need(kind):
    """Rounded inputs take what the bar leaves beside re-rounded weights; where those take it all, inputs keep 15 bits.

    Of int4 those are re-rounded that lie on a grid of their own.
    """

    def plain_weights(values):
        return on_grids(values) if kind == "int4" else values

    def stand_out(values):
        values = plain_weights(values)
        values[:, ::512] = 4.5  # one input of each 512 decides the step: 1.5 times as large as a normal distribution's
        return values

    x = np.random.default_rng(4).standard_normal((96, 2048)).astype(np.float32)
    plain = Layer(256, 2048, WeightFormat(kind), isa="amx", bias=False, change=plain_weights)
    heavy = Layer(256, 2048, WeightFormat(kind), isa="amx", bias=False, change=stand_out)
    costs = {layer: rerounding(layer.dequantised, SPAN[kind]) for layer in (plain, heavy)}
    assert costs[plain] < 0.0085 < costs[heavy]
    found = {layer: error(layer(x), layer.expected(x)) for layer in costs}
    assert costs[plain] * 1.1 < found[plain] <= LINEAR_BAR[kind]  # its inputs are rounded
    assert found[heavy] <= np.hypot(costs[heavy], 0.0010) * 1.05  # these hardly: 0.1 %
    # the control: the heavy layer with the plain one's inputs would miss the bar
    assert np.hypot(costs[heavy], np.sqrt(found[plain] ** 2 - costs[plain] ** 2)) > LINEAR_BAR[kind]


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no int8 tiles")
def test_rows_with_channels_that_stand_out_keep_15_bits_on_tiles():
    layer = Layer(256, 2048, WeightFormat("int4"), isa="amx", bias=False)
    x = np.random.default_rng(5).standard_normal((96, 2048)).astype(np.float32)
    rounded = error(layer(x), layer.expected(x))
    x[:, ::256] *= 12
    assert error(layer(x), layer.expected(x)) < 0.0085 < rounded


def few_free_columns(values):
    """Some columns with weights far out, so that tiles are whole, free and of both kinds."""
    changed = values.copy()
    changed[3, ::70] *= 5
    changed[32:48, ::90] *= 5
    return changed


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no int8 tiles")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("in_features", [768, 1000, 2600])
@pytest.mark.parametrize("format", [WeightFormat("int4"), WeightFormat("int4", group=128, symmetric=True), WeightFormat("mxfp4")], ids=name_of)
def test_a_row_does_not_depend_on_how_many_share_the_expanded_weights(format, in_features, threads):
    """Rings of other sizes, chunks of other lengths, blocks of one tile and of two, with high halves and without."""
    layer = Layer(150, in_features, format, isa="amx", threads=threads, change=few_free_columns)
    x = np.random.default_rng(4).standard_normal((130, in_features)).astype(np.float32)
    x[5::24, ::200] *= 12  # some rows have high halves, in some units
    whole = layer(x)
    assert error(whole, layer.expected(x)) <= LINEAR_BAR[format.kind], describe_worst(whole, layer.expected(x))
    for rows in (8, 16, 17, 32, 33, 48, 64, 70, 100):
        for first in (0, 20):
            found = layer(x[first : first + rows])
            assert error(found, whole[first : first + rows]) <= 2e-6, (rows, first, describe_worst(found, whole[first : first + rows]))
    x[:, -64:] = 0  # the control: the last unit alone is seen
    assert error(layer(x[:64]), whole[:64]) > 0.05


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no int8 tiles")
@pytest.mark.parametrize("policy", ["shard", "mirror"])
def test_the_inputs_bits_do_not_depend_on_placement_or_on_pieces(policy):
    x = np.random.default_rng(6).standard_normal((40, 1024)).astype(np.float32)
    layer = Layer(128, 1024, WeightFormat("int4"), isa="amx", bias=False)
    split = Layer(128, 1024, WeightFormat("int4"), isa="amx", bias=False, policy=policy, nodes=2)
    assert np.array_equal(split(x), layer(x))
    pieces = LinearWeights(
        runtime(2, 1),
        out_features=128,
        in_features=1024,
        format=WeightFormat("int4"),
        parts=parts(policy, 2, 128),
        has_bias=False,
        owner="layer",
        isa="amx",
    )
    values = np.random.default_rng(0).standard_normal((128, 1024)).astype(np.float32)
    for first, last in ((0, 50), (50, 51), (51, 128)):
        pieces.load_weight(matrix(values[first:last]), first_row=first)
    out = np.empty((40, 128), np.float32)
    pieces.forward(matrix(x), matrix(out))
    assert np.array_equal(out, layer(x))


@pytest.mark.parametrize("isa", ORDERED_ISAS)
def test_the_largest_inputs_and_weights_do_not_overflow(isa):
    layer = Layer(33, 8192, WeightFormat("int8", activations="bf16"), isa=isa)
    rows = np.sign(layer.dequantised[:4]) * 3.0
    for tokens in (1, 4):
        x = np.ascontiguousarray(rows[:tokens], dtype=np.float32)
        assert error(layer(x), layer.expected(x)) <= 2e-3


@pytest.mark.parametrize("in_features", [256, 40960])
@pytest.mark.parametrize("format", [WeightFormat("int4"), WeightFormat("mxfp4")], ids=name_of)
@pytest.mark.parametrize("isa", ORDERED_ISAS)
def test_sums_of_the_largest_four_bit_weights_do_not_overflow(isa, format, in_features):
    """Each row of weights has one sign and the largest code; AVX2 adds products up in 16 bits, which may wrap on the way."""
    signs = np.where(np.arange(34) % 2 == 0, 1, -1)[:, None]

    def largest(values):
        values = (signs * np.full_like(values, 6.0)).astype(np.float32)
        values[:, ::32] = 0.5 * signs  # so that int4's groups have a range
        return values

    layer = Layer(34, in_features, format, isa=isa, bias=False, change=largest)
    for inputs in (np.full(in_features, 3.0), np.where(np.arange(in_features) % 4 < 2, 3.0, 0.0), np.full(in_features, -3.0)):
        x = np.repeat(inputs[None], 3, axis=0).astype(np.float32)
        x[2, 5] *= 60  # a high half
        expected = layer.expected(x)
        for tokens in (slice(0, 1), slice(2, 3), slice(0, 3)):
            found = layer(x[tokens])
            assert error(found, expected[tokens]) <= 1e-2, describe_worst(found, expected[tokens])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_dtypes_and_strides_of_inputs_and_outputs(isa, kind):
    layer = Layer(40, 100, WeightFormat(kind), isa=isa)
    values = from_bf16(bf16(np.random.default_rng(3).standard_normal((6, 100))))
    plain = layer(values)
    for x in (bf16(values), values.astype(np.float16), np.asfortranarray(values), np.repeat(values, 2, axis=1)[:, ::2]):
        assert error(layer(x), plain) <= (1e-3 if x.dtype == np.float16 else 1e-6)
    half = layer(values, np.float16).astype(np.float32)
    assert error(half, plain) <= 1e-3
    assert error(from_bf16(layer(values, np.uint16)), plain) <= 4e-3
    wide = np.full((6, 64), 77, dtype=np.float32)
    layer.weights.forward(matrix(values), matrix(wide[:, :40]))
    assert np.array_equal(wide[:, :40], plain) and (wide[:, 40:] == 77).all()


def test_outputs_in_fp16_are_rounded_as_numpy_does():
    """Subnormals, ties and overflow, through the conversion that ISAs without F16C use too."""
    values = np.concatenate(
        [np.float32(2.0) ** np.arange(-30, 18, dtype=np.float32), np.linspace(0.9, 1.1, 500, dtype=np.float32) * 2.0**-14]
    )
    values = np.concatenate([values, -values, [65504, 65519, 65520, 1e9]]).astype(np.float32)[:, None]
    for isa in ISAS:
        identity = LinearWeights(
            runtime(), out_features=1, in_features=1, format=WeightFormat("bf16"), parts=parts("bind", 1, 1), has_bias=True, owner="m", isa=isa
        )
        identity.load_weight(matrix(np.zeros((1, 1), np.float32)))
        x = np.zeros((1, 1), np.float32)
        for value in values[::7]:
            del identity
            identity = LinearWeights(
                runtime(), out_features=1, in_features=1, format=WeightFormat("bf16"), parts=parts("bind", 1, 1), has_bias=True, owner="m", isa=isa
            )
            identity.load_weight(matrix(np.zeros((1, 1), np.float32)))
            identity.load_bias(matrix(value[None, :].copy()))
            out = np.empty((1, 1), np.float16)
            identity.forward(matrix(x), matrix(out))
            with np.errstate(over="ignore"):
                assert out[0, 0] == value.astype(np.float16)[0], (isa, value)


@pytest.mark.sweep
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_row_stays_in_its_row(isa, format, bad):
    layer = Layer(40, 100, format, isa=isa)
    for tokens in (2, 20):
        x = np.random.default_rng(4).standard_normal((tokens, 100)).astype(np.float32)
        clean = layer(x)
        x[1, 50] = bad
        found = layer(x)
        assert not np.isfinite(found[1]).all()
        others = np.arange(tokens) != 1
        assert np.array_equal(found[others], clean[others])


def test_no_rows_and_wrong_shapes():
    layer = Layer(40, 100, WeightFormat("int8"))
    assert layer(np.empty((0, 100), np.float32)).shape == (0, 40)
    with pytest.raises(WeightError, match=r"found input \[2, 99\] and output \[2, 40\], expected \[T, 100\] and \[T, 40\]"):
        layer(np.ones((2, 99), np.float32))
    with pytest.raises(WeightError, match="contiguous"):
        layer.weights.forward(matrix(np.ones((2, 100), np.float32)), matrix(np.empty((2, 80), np.float32)[:, ::2]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(ORDERED_ISAS),
    st.sampled_from(["shard", "mirror", "interleave", "bind"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.tuples(st.integers(1, 150), st.integers(1, 200), st.integers(1, 140)),
    st.booleans(),
)
def test_every_placement_gives_what_one_node_gives(format, isa, policy, nodes, threads, shape, bias):
    out_features, in_features, tokens = shape
    x = np.random.default_rng(5).standard_normal((tokens, in_features)).astype(np.float32)
    one = Layer(out_features, in_features, format, isa=isa, bias=bias)
    placed = Layer(out_features, in_features, format, isa=isa, policy=policy, nodes=nodes, threads=threads, bias=bias)
    tolerance = 1e-5 if format.kind != "fp8" or policy != "shard" else 0.05
    # a replica's few rows may meet other kernels than all rows do
    if isa == "amx" and format.kind not in ("bf16", "int8"):
        tolerance = max(tolerance, 0.03)
    elif isa == "amx":
        tolerance = max(tolerance, 5e-3)
    scale = np.linalg.norm(one(x)) + 0.1 * np.linalg.norm(x)
    assert np.linalg.norm(placed(x) - one(x)) / scale <= tolerance


def test_many_threads_may_call_at_once():
    layer = Layer(128, 256, WeightFormat("int8"), threads=2)
    x = np.random.default_rng(6).standard_normal((9, 256)).astype(np.float32)
    expected, failures = layer(x), []

    def work():
        for _ in range(50):
            if not np.array_equal(layer(x), expected):
                failures.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_counts():
    layer = Layer(128, 256, WeightFormat("int8"), policy="shard", nodes=2)
    before = layer.weights.stats()
    layer(np.ones((3, 256), np.float32))
    after = layer.weights.stats()
    assert after.calls == before.calls + 1 and after.seconds > before.seconds
    assert after.bytes_read - before.bytes_read == 128 * 256 and after.remote_bytes == 0
