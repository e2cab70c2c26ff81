"""What packed bytes mean: errors of quantising, shapes that do not divide, sources of any strides, each row exactly once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from native_operands import FORMATS, ISAS, bf16, error, from_bf16, matrix, name_of, parts, runtime

from numagraft.errors import ConfigurationError, PlacementError, WeightError
from numagraft.native import LinearWeights, WeightFormat, linear_packed_bytes

#: relative Frobenius error on Gaussian weights
GAUSSIAN = {
    "bf16": 2e-3,
    "int8": 1e-2,
    "int4-g32": 0.072,
    "int4-g32-symmetric": 0.085,
    "int4-g64": 0.084,
    "int4-g128": 0.094,
    "int4-g128-symmetric": 0.099,
    "fp8": 0.028,
    "mxfp4": 0.115,
}


def packed(weight, format, *, isa=None, policy="bind", nodes=1, threads=1, pieces=None, has_bias=False):
    out_features, in_features = weight.shape
    made = LinearWeights(
        runtime(nodes, threads),
        out_features=out_features,
        in_features=in_features,
        format=format,
        parts=parts(policy, nodes, out_features),
        has_bias=has_bias,
        owner="layer",
        isa=isa,
    )
    edges = [0, *(pieces or ()), out_features]
    for begin, end in itertools.pairwise(edges):
        made.load_weight(matrix(weight[begin:end]), first_row=begin)
    return made


def unpacked(made, shape, **which):
    out = np.full(shape, np.nan, dtype=np.float32)
    made.unpack(matrix(out), **which)
    return out


@pytest.mark.sweep
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_gaussian_weights_lose_little(format, isa):
    weight = np.random.default_rng(0).standard_normal((256, 4096)).astype(np.float32)  # fewer differ by 0.0001
    assert error(unpacked(packed(weight, format, isa=isa), weight.shape), weight) <= GAUSSIAN[name_of(format)]


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_every_isa_packs_the_same_weights(format):
    """To one step of the grid: compilers may contract the search's arithmetic differently."""
    weight = np.random.default_rng(1).standard_normal((40, 200)).astype(np.float32)
    scalar = unpacked(packed(weight, format, isa="scalar"), weight.shape)
    for isa in ISAS:
        assert error(unpacked(packed(weight, format, isa=isa), weight.shape), scalar) <= 0.02, isa


def test_weights_on_a_grid_are_kept():
    rng = np.random.default_rng(2)
    steps = rng.integers(0, 16, (32, 8, 32))
    steps[..., 0], steps[..., 1] = 0, 15
    scale = 2.0 ** rng.integers(-8, -2, (32, 8, 1))
    weight = (scale * steps - 4 * scale).reshape(32, 256).astype(np.float32)
    assert np.array_equal(unpacked(packed(weight, WeightFormat("int4")), weight.shape), weight)


def test_int8_weights_on_a_grid_are_kept():
    rng = np.random.default_rng(2)
    steps = np.round(rng.standard_normal((32, 4096)) * 20).clip(-120, 120)
    steps[:, 7] = 127
    weight = (steps * 2.0 ** rng.integers(-8, -2, (32, 1))).astype(np.float32)
    assert np.array_equal(unpacked(packed(weight, WeightFormat("int8")), weight.shape), weight)


def test_mxfp4_keeps_values_of_its_own():
    rng = np.random.default_rng(3)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    weight = (
        (rng.choice(values, (32, 8, 32)) * 2.0 ** rng.integers(-20, 10, (32, 8, 1))).reshape(32, 256).astype(np.float32)
    )
    assert np.array_equal(unpacked(packed(weight, WeightFormat("mxfp4")), weight.shape), weight)


@pytest.mark.sweep
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_zeros_and_extremes(format, isa):
    weight = np.zeros((33, 130), dtype=np.float32)
    assert np.array_equal(unpacked(packed(weight, format, isa=isa), weight.shape), weight)
    weight[5] = 1e-30
    weight[6] = 1e15
    found = unpacked(packed(weight, format, isa=isa), weight.shape)
    assert np.isfinite(found).all()
    if format.kind != "fp8":  # there a block's scale is that of its largest row
        assert error(found[6], weight[6]) < 0.2


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [(1, 1), (31, 63), (32, 64), (33, 65), (70, 100), (5, 513)])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_shapes_that_do_not_divide(format, shape):
    weight = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    assert error(unpacked(packed(weight, format), shape), weight) <= 0.2


@pytest.mark.parametrize("isa", ISAS)
def test_sources_of_every_dtype_and_stride(isa):
    rng = np.random.default_rng(5)
    values = from_bf16(bf16(rng.standard_normal((45, 77)))) * 0.25
    format = WeightFormat("int8")
    expected = unpacked(packed(values, format, isa=isa), values.shape)
    spaced = np.full((90, 231), np.nan, dtype=np.float32)
    spaced[::2, ::3] = values
    for source in (
        bf16(values),
        values.astype(np.float16),
        np.asfortranarray(values),
        np.asfortranarray(bf16(values)),
        spaced[::2, ::3],
        np.ascontiguousarray(spaced[::2, ::3].T).T,
        values[::-1][::-1],
    ):
        same = packed(source, format, isa=isa)
        assert error(unpacked(same, values.shape), expected) <= (1e-3 if source.dtype == np.float16 else 0)


@pytest.mark.parametrize("policy", ["shard", "mirror", "interleave", "bind"])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_pieces_and_placements_pack_the_same(policy, format):
    weight = np.random.default_rng(6).standard_normal((100, 96)).astype(np.float32)
    whole = unpacked(packed(weight, format), weight.shape)
    placed = packed(weight, format, policy=policy, nodes=3, threads=2, pieces=(1, 20, 64, 99))
    assert placed.missing() == []
    for replica in range(3 if policy == "mirror" else 1):
        found = unpacked(placed, weight.shape, replica=replica)
        if format.kind == "fp8" and policy == "shard":  # its blocks are those of a shard's panels
            assert error(found, weight) <= 0.03
        else:
            assert np.array_equal(found, whole)


def test_each_row_comes_once_and_fits():
    weight = np.ones((10, 8), dtype=np.float32)
    made = packed(weight[:6], WeightFormat("int8"))
    assert made.missing() == []
    made = LinearWeights(
        runtime(),
        out_features=10,
        in_features=8,
        format=WeightFormat("int8"),
        parts=parts("bind", 1, 10),
        has_bias=True,
        owner="m",
    )
    assert made.missing() == ["weight", "bias"]
    made.load_weight(matrix(weight[:6]))
    with pytest.raises(WeightError, match=r"2 rows were loaded before, the first of them row 4"):
        made.load_weight(matrix(weight[:3]), first_row=4)
    with pytest.raises(WeightError, match=r"found rows 6 to 16"):
        made.load_weight(matrix(weight), first_row=6)
    with pytest.raises(WeightError, match=r"found 7 input features, expected 8"):
        made.load_weight(matrix(weight[6:, :7]), first_row=6)
    assert made.missing() == ["weight (4 rows, the first of them row 6)", "bias"]
    with pytest.raises(WeightError, match=r"never arrived"):
        made.forward(matrix(np.ones((1, 8), np.float32)), matrix(np.ones((1, 10), np.float32)))
    with pytest.raises(WeightError, match=r"found a bias \[1, 9\], expected \[1, 10\]"):
        made.load_bias(matrix(np.ones((1, 9), np.float32)))
    made.load_bias(matrix(np.ones((1, 10), np.float32)))
    with pytest.raises(WeightError, match="loaded before"):
        made.load_bias(matrix(np.ones((1, 10), np.float32)))
    made.load_weight(matrix(weight[6:]), first_row=6)
    assert made.missing() == []


def test_formats_and_parts_that_make_no_sense():
    with pytest.raises(ConfigurationError, match="groups hold 32, 64 or 128"):
        packed(np.ones((2, 2), np.float32), WeightFormat("int4", group=48))
    with pytest.raises(ConfigurationError, match="need integer weights"):
        packed(np.ones((2, 2), np.float32), WeightFormat("bf16", activations="int8"))
    from numagraft.placement import Part

    two = [Part((0,), False, (0,), 0, 6), Part((0,), False, (0,), 5, 9), Part((7,), False, (0,), 11, 12)]
    with pytest.raises(PlacementError) as caught:
        LinearWeights(
            runtime(), out_features=12, in_features=8, format=WeightFormat("int8"), parts=two, has_bias=False, owner="m"
        )
    for text in ("[5, 6) lie in parts that are not replicas", "[9, 11) lie in no part", "names node 7"):
        assert text in str(caught.value)


def test_packed_bytes_are_what_is_allocated():
    for format in FORMATS:
        placed = packed(np.ones((100, 96), np.float32), format, policy="shard", nodes=3, has_bias=True)
        asked = linear_packed_bytes(100, 96, format, True, parts("shard", 3, 100))
        assert sum(asked) == placed.packed_bytes
        for bytes_, buffer in zip(asked, placed.buffers(), strict=True):
            assert bytes_ <= buffer.bytes < bytes_ + 2 * 2**20 and buffer.owner == "layer"
