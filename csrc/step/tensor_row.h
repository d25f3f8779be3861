// What the passes over tensors read and return, on a CPU and on a GPU alike. This needs no header of PyTorch.
#pragma once

#include <cstdint>

#include "step/element.h"
#include "step/solve.h"

namespace sofim {

// How elements are stored. A complex tensor is treated as a real one with twice as many elements.
// Codes are those of step/codes.h, of moments alone.
enum class Type : uint8_t { float32, float64, bfloat16, float16, codes };
SOFIM_HD constexpr int type_size(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : type == Type::codes ? 1 : 2;
}
constexpr bool is_narrow(Type type) { return type == Type::bfloat16 || type == Type::float16; }

// Sums of products per tensor, in this order wherever several are stored. accumulate returns mm, then mg, then mw; dots
// returns all of them, or all but those with w. See Sums in sofim_fused/backends/interface.py.
enum Sum { kMM, kMG, kMW, kGG, kGW, kWW };
constexpr int kSums = kWW + 1;

// One tensor of a step: where its elements are, and how they are stored. The elements of w, g, m and lost have the
// same order in memory, without gaps.
struct TensorRow {
  void* w;
  const void* g;
  void* m;
  // The bits that a 16-bit w lost, of w's type, or int16 if `master`, or int8 if `cut`; nullptr: none are kept.
  void* lost;
  int64_t* step;  // the number of updates that it has received, on the tensors' device; nullptr: not needed
  int64_t numel;
  uint32_t ordinal;  // its place among all parameters, which keys the rounding of a bfloat16 moment, and of w if `cut`
  Type w_type, g_type, m_type;
  bool aligned : 1;  // all four addresses are multiples of 16
  bool master : 1;   // w and `lost` are the two halves of a float32 (joined() in element.h); else w + lost is the weight
  bool cut : 1;      // if `master`: the float32 has 24 bits
};

// The running means of g² of one tensor (Variance in sofim_fused/backends/interface.py), float64 for a float64 tensor,
// else float32, or codes of those of elements. It has `count` rows of `columns` elements; 1 row without row_var. Its memory has `inner` elements of row
// 0, then as many of row 1, ... of the last row, and so on with the rows' next elements: all of a row together where
// dimension 0 is the outermost one in memory, 1 of each where it is the innermost.
struct VarianceRow {
  void* rows = nullptr;     // row_var, without gaps
  void* cols = nullptr;     // col_var, without gaps, in the order of a row's elements in memory
  void* whole = nullptr;    // variance: one number, or one for each element in the order of w's in memory
  bool by_element = false;  // the latter
  int64_t count = 1, columns = 0, inner = 0;
  float* scales = nullptr;  // of a `whole` that is codes: of its blocks, without gaps; else nullptr
};

struct Scale;  // cpu/kernels.h

// The same with the tensor's own coefficients, for passes that run on the host.
struct Row : TensorRow {
  uint32_t key;   // of the random bits that round m and w (tensor_key)
  bool copied;    // some of the addresses are those of copies, which this step alone uses
  Decay decay;    // the first moment
  Update update;  // the weight
  const Scale* scale = nullptr;  // the diagonal, where that adapts
  // Of moments that are codes: their scales, without gaps, and the elements of a row, each of which begins a block.
  float* scales = nullptr;
  int64_t row_size = 0;
  int64_t first = 0;  // the element that m points to
};

}  // namespace sofim
