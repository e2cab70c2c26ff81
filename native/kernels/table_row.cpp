// One row of the kernel table. Compiled once per ISA.
#include "kernels/kernel_table.h"

namespace numagraft::NUMAGRAFT_ISA {

void prepare(const PrepareArgs&);
void gemm(const GemmArgs&);
void store_rows(const StoreArgs&);
void gate(const GateArgs&);
void accumulate(const AccumulateArgs&);
void reduce(const ReduceArgs&);
void pack(const PackArgs&);

#define NUMAGRAFT_TEXT_(x) #x
#define NUMAGRAFT_TEXT(x) NUMAGRAFT_TEXT_(x)

namespace {

constexpr bool kVnni = NUMAGRAFT_QUANTISED_FORM == RowForm::halves;
// Few rows of int8 with VNNI meet both halves in one pass, and so does one row of nibbles; tiles have lists for two of them and for int8.
constexpr ListsFrom kInt8Lists = NUMAGRAFT_TILES ? ListsFrom{17, 32} : kVnni ? ListsFrom{7, 8} : ListsFrom{};
constexpr ListsFrom kGroupedLists =
    NUMAGRAFT_TILES || NUMAGRAFT_GROUPED_FORM != RowForm::halves ? ListsFrom{} : kVnni ? ListsFrom{2, 4} : ListsFrom{2, 2};

constexpr KernelTable row(bool in_order) {
  return {
      NUMAGRAFT_TEXT(NUMAGRAFT_ISA),
      NUMAGRAFT_QUANTISED_FORM,
      NUMAGRAFT_GROUPED_FORM,
      NUMAGRAFT_FLOAT_FORM,
      NUMAGRAFT_FP8_FORM,
      NUMAGRAFT_TILES ? kReroundRowsFrom : 0,
      NUMAGRAFT_TILES ? 2 : 0,
      in_order,
      kInt8Lists,
      kGroupedLists,
      &prepare,
      &gemm,
      &store_rows,
      &gate,
      &accumulate,
      &reduce,
      &pack,
  };
}

}  // namespace

extern const KernelTable kernels[2];
const KernelTable kernels[2] = {row(false), row(true)};  // [in_order]

}  // namespace numagraft::NUMAGRAFT_ISA
