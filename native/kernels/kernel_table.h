#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format.h"
#include "kernels/layout.h"

namespace numagraft {

// What inputs look like to a kernel. `wide`: int16 integers, the second and third of every four swapped; `halves`: the same
// integers q as two int8 halves, q = 128 * high + low, the high half only where some |q| exceeds 127; `f32` and `bf16`: as
// they are; `bf16_f16`: as bf16, and as fp16 whose largest lies between 512 and 1024.
enum class RowForm : std::uint8_t { wide, halves, f32, bf16, bf16_f16 };

inline constexpr int kBlockRows = 32;
static inline std::int64_t element_bytes(RowForm form) {
  return form == RowForm::f32 ? 4 : form == RowForm::halves ? 1 : 2;
}

// High halves as lists: of each row, the groups of four inputs that have one, in order. A list holds at most kListedPerUnit of
// a unit's 16 groups in the mean, which the row's scale sees to: values beyond int8 are beyond 127 kListedError sqrt(12) of
// the row's typical size, and of no row are more than one in 8.3.
inline constexpr float kListedError = 0.015f;
inline constexpr std::int64_t kListedPerUnit = 8;
static_assert(127 * kListedError * 3.4641f * 1.2533f * kListedPerUnit >= kUnitInputs);  // typical size: at most 1.2533 of the mean magnitude
inline constexpr std::int64_t kInt8UnitBytes = kUnitInputs * kPanelColumns;
struct ListedFour {
  std::uint32_t at;    // of their weights for the first 16 columns, in bytes of an int8 panel
  std::uint32_t high;  // four high halves
};
struct RowLists {
  ListedFour* fours = nullptr;     // [rows][stride]; null: the high halves are not listed
  std::uint16_t* begin = nullptr;  // [units + 1][rows]: the first of a unit
  std::int64_t stride = 0;
  std::int64_t rows = 0;
};
inline constexpr std::int64_t kMostListedUnits = 65535 / kListedPerUnit;

// Up to 32 prepared input rows. Element (row, k) lies at low + ((k / 64) * stride_rows + row) * 64 + k % 64, in elements:
// with 16 or 32 rows a unit is then one or two tile operands.
struct RowBlock {
  const std::byte* low = nullptr;
  const std::byte* high = nullptr;        // as low; meaningful only in units whose flag is set. bf16_f16: the fp16 values
  const float* scale = nullptr;           // [rows]; of bf16_f16's fp16 values
  const std::int32_t* sum = nullptr;      // [rows] sum of the row's integers
  const float* group_sum = nullptr;       // [unit][stride_rows][2] sums of the integers over 32 inputs each; null: nobody reads them
  const std::uint8_t* flags = nullptr;    // [unit]; bit t: rows 16t .. 16t+15 have a high half here
  RowLists lists;                         // instead of `high` and `flags`
  int rows = 0;
  int stride_rows = 0;
};

// One row on its way in: `k` contiguous elements at x. Its integers are x / scale, where scale makes the rounding error
// at most `target_error` of the row's typical size (0: 16 bits whatever the data). Rows with a NaN or an infinity get
// scale NaN, and so an output of NaN.
struct PrepareArgs {
  const void* x;
  const void* next;             // the row that will be prepared after it, which memory is asked for; or null
  DType dtype;
  std::int64_t k;
  std::int64_t units;
  RowForm form;
  float target_error;
  float normal_error;           // the same where the row is normally distributed, if larger
  std::byte* low;
  std::byte* high;              // halves and bf16_f16
  std::int64_t unit_stride;     // elements between units of low (and high)
  float* scale;
  std::int32_t* sum;
  float* group_sum;             // halves; null: not wanted
  std::int64_t group_stride;    // floats between units
  std::uint8_t* flags;          // halves only; [unit], the bit is or-ed in
  std::uint8_t flag_bit;
  bool* has_high;               // halves: of the row; if it has none, `high` is left as it is (null: zeros are stored)
  bool streamed;                // halves: past the caches, where there is a way; units lie on whole cache lines
  RowLists lists;               // of the row; instead of `high` and `flags`. Needs a target_error of kListedError or more
};

// c[panel][row][32] = inputs x weights, scaled, without bias, for consecutive panels; `rows` counts over all blocks. A
// panel of c must have room for the stride_rows of the last block.
struct GemmArgs {
  const Layout* layout;
  const std::byte* panel;       // the first panel
  const float* side;            // the first panel's rows of the side table; see panel_side
  std::int64_t panels;
  // Units [first_unit, last_unit), whole spans but for the last: a panel may be worked through in several calls, in
  // order; c then holds what is so far (integers until the last call).
  std::int64_t first_unit;
  std::int64_t last_unit;
  const RowBlock* blocks;
  int block_count;
  float* c;
  std::int64_t c_panel_stride;  // floats
  bool in_order;                // see KernelTable
};

// The side table of a panel, `panel` counted from the call's first; row r is at + r * kPanelColumns.
static inline const float* panel_side(const GemmArgs& a, std::int64_t panel) { return a.side + panel * panel_side_floats(*a.layout); }

// out[row] = dtype(c[panel][row] + bias[panel]), row by row; `columns` of all panels together, the last of which may have fewer than 32
struct StoreArgs {
  const float* c;
  std::int64_t c_panel_stride;  // floats
  const float* bias;            // [panels][32] or null
  std::int64_t rows;
  int columns;
  void* out;
  DType dtype;
  std::int64_t row_stride;      // elements
};

// inner[row][32] = gate(c_gate + bias) * (c_up + bias) as bf16
struct GateArgs {
  const float* gate;
  const float* up;
  const float* gate_bias;       // [32] or null
  const float* up_bias;
  std::int64_t rows;
  Gate kind;
  std::uint16_t* inner;         // `streamed`: its rows lie on whole cache lines
  std::int64_t row_stride;
  bool streamed;                // past the caches, where there is a way: the rows are not read again soon
};

// acc[index[row]][panel * 32 ...] += weight[row] * (c[panel][row] + bias[panel]), row by row: a row of acc lies together
struct AccumulateArgs {
  const float* c;
  std::int64_t c_panel_stride;  // floats
  const float* bias;            // [panels][32] or null
  std::int64_t panels;
  std::int64_t rows;
  const std::int32_t* index;
  const float* weight;
  float* acc;
  std::int64_t acc_stride;      // floats
};

// out = dtype(sum of `count` fp32 sources), `columns` values
struct ReduceArgs {
  const float* const* sources;
  int count;
  std::int64_t columns;
  void* out;
  DType dtype;
};

// Packs the 32 (or fewer) source rows of one panel, inputs [first_input, first_input + k) of which only those inside the
// source exist. `staged` is scratch of stage_bytes(layout).
struct PackArgs {
  const Layout* layout;
  const MatrixView* source;     // all output channels
  std::int64_t first_row;       // the panel's first row in the source; may be negative
  std::int64_t row_begin;       // rows outside [row_begin, row_end) are packed as zeros
  std::int64_t row_end;
  std::int64_t first_input;     // the packed matrix's input 0 in the source
  std::byte* panel;
  float* side;                  // of the panel
  std::int64_t side_stride;     // floats between its rows
  std::byte* staged;
  double* power;                // int4 and mxfp4: the packed weights' squares are added to it; null: not wanted
};

// From how many rows of a block, and of an expert in the mean of a call, high halves of inner rows come as lists; 0: never. What they save
// is multiplications, and fewer rows wait for memory.
struct ListsFrom {
  int block_rows;
  int mean_rows;
};

struct KernelTable {
  const char* isa;
  RowForm quantised_form;       // of inputs for int8
  RowForm grouped_form;         // for int4 and mxfp4
  RowForm float_form;           // for bf16
  RowForm fp8_form;
  int reround_rows_from;        // rows from which int4 and mxfp4 are re-rounded to int8 per column and chunk; 0: never
  int tile_rows_from;           // rows from which blocks are padded to 16 or 32; 0: never
  // Memory wants the lines of a page in order (AMD): one row reads two panels side by side, not a panel's two tiles, and few rows
  // go over short chunks. Kernels with VNNI or tiles know one order only, but for bf16 and fp8 without tiles. Workers of few rows then
  // also take the last panels as they come, for which a Xeon's prefetchers made them pay.
  bool in_order;
  ListsFrom int8_lists;
  ListsFrom grouped_lists;
  void (*prepare)(const PrepareArgs&);
  void (*gemm)(const GemmArgs&);
  void (*store)(const StoreArgs&);
  void (*gate)(const GateArgs&);
  void (*accumulate)(const AccumulateArgs&);
  void (*reduce)(const ReduceArgs&);
  void (*pack)(const PackArgs&);
};

static inline RowForm row_form(const KernelTable& table, WeightKind kind) {
  switch (kind) {
    case WeightKind::int8:
      return table.quantised_form;
    case WeightKind::int4:
    case WeightKind::mxfp4:
      return table.grouped_form;
    case WeightKind::fp8:
      return table.fp8_form;
    default:
      return table.float_form;
  }
}

static inline ListsFrom lists_from(const KernelTable& table, WeightKind kind) {
  return kind == WeightKind::int8 ? table.int8_lists : is_grouped(kind) ? table.grouped_lists : ListsFrom{};
}

// Scratch for packing one panel: its weights as fp32, inputs by columns, whole units; of int4 whole spans.
static inline std::int64_t stage_units(const Layout& layout) {
  if (layout.kind != WeightKind::int4) return layout.units;
  return layout.scale_rows * layout.span_units;
}
static inline std::int64_t stage_bytes(const Layout& layout) {
  return (stage_units(layout) + 1) * kUnitInputs * kPanelColumns * std::int64_t{sizeof(float)};
}

// The rows of the table this build has and this CPU (with its operating system) can run, slowest first, each with the order
// of reading that this CPU's memory likes.
int supported_kernels(const KernelTable* const** tables);
// The row in use: the best one, or the one named by NUMAGRAFT_ISA; throws std::invalid_argument naming the supported.
const KernelTable& active_kernels();
bool kernels_forced();
// By name, for tests; "avx2:in-order" and "avx2:in-turn" also say how weights are read, see `in_order`. Throws std::invalid_argument.
const KernelTable& kernels_by_name(const char* isa);

}  // namespace numagraft
