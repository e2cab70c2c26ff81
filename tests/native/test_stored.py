"""Weights packed straight out of a file, and weights that are quantised there already."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from native_operands import FORMATS, ISAS, bf16, matrix, name_of, parts, runtime

from numagraft import native
from numagraft.errors import CheckpointError, WeightError
from numagraft.native import ExpertsWeights, FileMatrix, Gate, LinearWeights, WeightFormat

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
POLICIES = [("bind", 1, 1), ("bind", 1, 2), ("shard", 2, 1), ("mirror", 2, 1)]


class Stored:
    """A file of which each matrix is appended; keeps scales alive."""

    def __init__(self, path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._scales: list[np.ndarray] = []

    def add(self, bytes_: bytes, dtype: str, rows: int, columns: int, scales: np.ndarray | None = None) -> FileMatrix:
        self._file.seek(0, 2)
        self._file.write(b"\x7f" * 13)  # nothing is aligned
        offset = self._file.tell()
        self._file.write(bytes_)
        scaling = (0, 0)
        if scales is not None:
            self._scales.append(scales)
            scaling = (scales.ctypes.data, scales.shape[1])
        return FileMatrix(self._file.fileno(), offset, self._file.tell(), dtype, rows, columns, columns, *scaling)

    def floats(self, weight: np.ndarray, dtype: str) -> FileMatrix:
        kept = {"f32": weight.astype(np.float32), "f16": weight.astype(np.float16), "bf16": bf16(weight)}[dtype]
        return self.add(kept.tobytes(), dtype, *weight.shape)

    def cut(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def stored(tmp_path) -> Iterator[Stored]:
    file = Stored(tmp_path / "weights")
    yield file
    native.set_fault("pread", None)
    file.close()


def linear(source, format, *, policy="bind", nodes=1, threads=1, isa=None) -> LinearWeights:
    made = LinearWeights(
        runtime(nodes, threads),
        out_features=source.rows,
        in_features=source.columns,
        format=format,
        parts=parts(policy, nodes, source.rows),
        has_bias=False,
        owner="layer",
        isa=isa,
    )
    made.load_weight(source)
    return made


def unpacked(made, shape, method="unpack", *which) -> np.ndarray:
    out = np.full(shape, np.nan, dtype=np.float32)
    getattr(made, method)(*which, matrix(out))
    return out


def fp8(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, block scales, and the values they stand for: every code but NaN occurs."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 0x7F, (rows, columns)).astype(np.uint8) | (rng.integers(0, 2, (rows, columns)) << 7).astype(np.uint8)
    scales = np.exp(rng.standard_normal((-(-rows // 128), -(-columns // 128)))).astype(np.float32) * 1e-3
    magnitude = codes & 0x7F
    exponent, mantissa = (magnitude >> 3).astype(np.int32), (magnitude & 7).astype(np.float32)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7)).astype(np.float32)
    value = np.where(codes & 0x80, -value, value).astype(np.float32)
    return codes, scales, value * np.repeat(np.repeat(scales, 128, 0), 128, 1)[:rows, :columns]


def mxfp4(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of two codes, exponents, and the values they stand for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    exponents = rng.integers(110, 130, (rows, columns // 32)).astype(np.uint8)
    values = E2M1[codes] * np.ldexp(np.float32(1), np.repeat(exponents, 32, 1).astype(np.int32) - 127)
    return codes[:, ::2] | codes[:, 1::2] << 4, exponents, values.astype(np.float32)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_a_file_is_packed_as_memory_is(stored, format, dtype):
    weight = np.random.default_rng(3).standard_normal((75, 200)).astype(np.float32)
    kept = {"f32": weight, "f16": weight.astype(np.float16), "bf16": bf16(weight)}[dtype]
    for policy, nodes, threads in POLICIES:
        placed = {"policy": policy, "nodes": nodes, "threads": threads}
        from_memory = linear(matrix(kept), format, **placed)
        from_file = linear(stored.floats(weight, dtype), format, **placed)
        assert np.array_equal(unpacked(from_file, weight.shape), unpacked(from_memory, weight.shape)), policy


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (130, 200), (1, 128), (31, 20)])
def test_fp8_keeps_its_codes_and_scales(stored, rows, columns, isa):
    codes, scales, values = fp8(rows, columns)
    source = stored.add(codes.tobytes(), "e4m3", rows, columns, scales)
    for policy, nodes, threads in POLICIES:
        made = linear(source, WeightFormat("fp8"), policy=policy, nodes=nodes, threads=threads, isa=isa)
        assert np.array_equal(unpacked(made, values.shape), values), policy


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (75, 96), (1, 32)])
def test_mxfp4_keeps_its_codes_and_exponents(stored, rows, columns, isa):
    codes, exponents, values = mxfp4(rows, columns)
    source = stored.add(codes.tobytes(), "e2m1", rows, columns, exponents)
    for policy, nodes, threads in POLICIES:
        made = linear(source, WeightFormat("mxfp4"), policy=policy, nodes=nodes, threads=threads, isa=isa)
        assert np.array_equal(unpacked(made, values.shape), values), policy


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_quantised_weights_become_other_formats_as_their_values_would(stored, format):
    for dtype, made in (("e4m3", fp8(130, 256)), ("e2m1", mxfp4(75, 256))):
        codes, scales, values = made
        if (dtype, format.kind) in {("e4m3", "fp8"), ("e2m1", "mxfp4")}:
            continue
        source = stored.add(codes.tobytes(), dtype, *values.shape, scales)
        expected = unpacked(linear(matrix(values), format), values.shape)
        assert np.array_equal(unpacked(linear(source, format), values.shape), expected), dtype


def test_a_nan_in_fp8_stays_one(stored):
    codes, scales, values = fp8(64, 128)
    codes[5, 7], values[5, 7] = 0x7F, np.nan
    found = unpacked(linear(stored.add(codes.tobytes(), "e4m3", 64, 128, scales), WeightFormat("fp8")), values.shape)
    assert np.array_equal(found, values, equal_nan=True)


@pytest.mark.parametrize(("policy", "nodes", "threads"), POLICIES)
def test_experts_out_of_a_file(stored, policy, nodes, threads):
    """fp8 in its own bytes, several experts by one call, features shared out between nodes."""
    experts, hidden, inner = 3, 256, 384
    made = ExpertsWeights(
        runtime(nodes, threads),
        experts=experts,
        hidden=hidden,
        intermediate=inner,
        format=WeightFormat("fp8"),
        gate=Gate(),
        parts=parts(policy, nodes, inner, 128),
        has_bias=False,
        owner="experts",
    )
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    weights = {name: [fp8(*shape, seed=i + 10 * len(name)) for i in range(experts)] for name, shape in shapes.items()}
    made.load_experts(
        **{
            name: [stored.add(codes.tobytes(), "e4m3", *shapes[name], scales) for codes, scales, _ in listed]
            for name, listed in weights.items()
        }
    )
    assert made.missing() == []
    for name, listed in weights.items():
        for expert, (_, _, values) in enumerate(listed):
            assert np.array_equal(unpacked(made, shapes[name], f"unpack_{name}", expert), values)


def test_interleaved_rows(stored):
    """gpt-oss stores gate and up row by row in turn."""
    codes, exponents, values = mxfp4(128, 64)
    both = stored.add(codes.tobytes(), "e2m1", 128, 64, exponents)
    for half in (0, 1):
        one = replace(
            both,
            offset=both.offset + half * 32,
            rows=64,
            row_stride=128,
            scales=both.scales + half * both.scale_stride,
            scale_stride=2 * both.scale_stride,
        )
        assert np.array_equal(unpacked(linear(one, WeightFormat("mxfp4")), (64, 64)), values[half::2])


def test_a_file_that_cannot_be_read(stored):
    weight = np.ones((64, 64), np.float32)
    source = stored.floats(weight, "f32")
    native.set_fault("pread", errno.EIO)
    with pytest.raises(CheckpointError, match=r"reading \d+ bytes at \d+ failed: pread says EIO"):
        linear(source, WeightFormat("int8"))
    native.set_fault("pread", None)
    linear(source, WeightFormat("int8"))
    stored.cut(source.offset + 64 * 64 * 4 - 1)
    with pytest.raises(CheckpointError, match=rf"ends at byte {source.file_bytes - 1}, but had {source.file_bytes}"):
        linear(source, WeightFormat("int8"))


def test_what_cannot_be_packed(stored):
    codes, scales, _ = fp8(64, 128)
    with pytest.raises(WeightError, match="quantised and has no scales"):
        linear(stored.add(codes.tobytes(), "e4m3", 64, 128), WeightFormat("fp8"))
    with pytest.raises(WeightError, match="no multiple of the 32 that share an exponent"):
        linear(stored.add(codes.tobytes(), "e2m1", 64, 48, scales), WeightFormat("mxfp4"))
    made = LinearWeights(
        runtime(), out_features=64, in_features=128, format=WeightFormat("int8"), parts=parts("bind", 1, 64), has_bias=False, owner="m"
    )
    with pytest.raises(WeightError, match="come whole, found 32 of 64 rows"):
        made.load_weight(stored.floats(np.ones((32, 128), np.float32), "bf16"), first_row=32)
    assert made.missing() == ["weight"]
