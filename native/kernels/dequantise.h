#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/layout.h"

namespace numagraft {

// The weights of one unit of a panel as fp32, [64 inputs][32 columns]: the definition of what the packed bytes mean.
// `side` is the side table at the panel's first column.
void dequantise_unit(const Layout& layout, const std::byte* panel, std::int64_t unit, const float* side,
                     std::int64_t side_stride, float* weights);

}  // namespace numagraft
