#include "kernels/dequantise.h"

#include <cstring>

namespace numagraft {
namespace {

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float bf16_at(const std::byte* data, int index) {
  std::uint16_t half;
  std::memcpy(&half, data + 2 * index, sizeof half);
  return from_bits(std::uint32_t{half} << 16);
}

float fp8_value(unsigned code) {
  const unsigned exponent = (code >> 3) & 15;
  const unsigned mantissa = code & 7;
  const float magnitude = exponent == 0                      ? static_cast<float>(mantissa) * 0x1p-9f
                          : exponent == 15 && mantissa == 7 ? from_bits(0x7FC00000)
                                                            : from_bits(((exponent + 120) << 23) | (mantissa << 20));
  return code & 0x80 ? -magnitude : magnitude;
}

constexpr float kMxfp4[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

}  // namespace

void dequantise_unit(const Layout& layout, const std::byte* panel, std::int64_t unit, const float* side,
                     std::int64_t side_stride, float* weights) {
  const std::byte* data = panel + unit * layout.unit_bytes;
  const std::byte* scales = data + layout.data_bytes;
  for (int k = 0; k < kUnitInputs; ++k) {
    for (int column = 0; column < kPanelColumns; ++column) {
      const int tile = column / kTileColumns;
      const int lane = column % kTileColumns;
      float value = 0;
      switch (layout.kind) {
        case WeightKind::bf16:
          value = bf16_at(data + (k / 32) * 2048 + tile * 1024 + (k % 32) / 2 * 64, lane * 2 + k % 2);
          break;
        case WeightKind::fp8: {
          const auto code = std::to_integer<unsigned>(data[(k / 32) * 1024 + tile * 512 + (k % 32) / 2 * 32 + lane * 2 + k % 2]);
          value = fp8_value(code) * side[(unit * kUnitInputs + k) / kFp8Block * side_stride + column];
          break;
        }
        case WeightKind::int8: {
          const int code = std::to_integer<int>(data[tile * 1024 + k / 4 * 64 + lane * 4 + k % 4]);
          value = static_cast<float>(code - kInt8Offset) * side[column];
          break;
        }
        case WeightKind::int4:
        case WeightKind::mxfp4: {
          const auto pair = std::to_integer<unsigned>(data[tile * 512 + k % 32 / 4 * 64 + lane * 4 + k % 4]);
          const unsigned code = k < 32 ? pair & 15 : pair >> 4;
          if (layout.kind == WeightKind::mxfp4) {
            const auto exponent = std::to_integer<std::uint32_t>(scales[(k / 32) * kPanelColumns + column]);
            value = kMxfp4[code] * from_bits(exponent << 23);
          } else {
            const int group = layout.unit_groups == 2 ? k / 32 : 0;
            const float scale = bf16_at(scales, group * kPanelColumns + column);
            const float minimum = layout.symmetric
                                      ? -8.0f * scale
                                      : bf16_at(scales + layout.unit_groups * kPanelColumns * 2, group * kPanelColumns + column);
            value = scale * static_cast<float>(code) + minimum;
          }
          break;
        }
      }
      weights[k * kPanelColumns + column] = value;
    }
  }
}

}  // namespace numagraft
