// What the passes take and give, without a torch header: a record per tensor, a mode per pass, sums per tile.
#pragma once

#include <cstdint>

#include "step/element.h"

namespace sofim {

// Elements that are summed in one go. A tile never crosses a tensor, and its place in a tensor never changes, so that
// sums do not depend on the number of threads.
constexpr int64_t kTile = 32768;

enum class Type : uint8_t { float32, float64, bfloat16, float16 };
constexpr bool is_narrow(Type type) { return type == Type::bfloat16 || type == Type::float16; }

// One tensor of a step. Its w, g, m and kahan lie in memory in one and the same order, without gaps.
struct Row {
  void* w;
  const void* g;
  void* m;
  void* kahan;  // nullptr: none is kept
  int64_t numel;
  Type w_type, g_type, m_type;
  uint32_t key;  // of the random bits that round m (tensor_key)
  Decay decay;
  struct {
    double w, g, m;
  } update;  // w' = update.w·w + update.g·v + update.m·m'
};

// What holds for every tensor of a pass.
struct Mode {
  bool weights = false;   // some decay.w is not zero: accumulate and dots read w
  bool cross = false;     // accumulate also sums m·g, and m·w if `weights`
  bool gradient = false;  // w takes the term update.g·v (in accumulate: and no other)
  bool scaled = false;    // commit: v = gain·g, else v = g
  double gain = 1.0;
  bool prefetch = false;        // too many elements for a core's caches
  bool backwards = false;  // the order in which a thread takes its tiles
};

// Sums of a tile, in this order. accumulate writes as many as the mode asks for: mm, then mg, then mw; dots all but
// mw, or with `weights` all. What lies behind the last one is left alone.
enum Sum { kMM, kMG, kMW, kGG, kGW, kWW };
constexpr int sums_of_accumulate(const Mode& mode) { return mode.cross ? mode.weights ? kMW + 1 : kMG + 1 : kMM + 1; }
constexpr int sums_of_dots(const Mode& mode) { return mode.weights ? kWW + 1 : kGG + 1; }

// One pass over elements [begin, begin + size) of a tensor, begin a multiple of kTile and size at most kTile. apply and
// commit write no sums.
using Kernel = void (*)(const Row& record, const Mode& mode, int64_t begin, int64_t size, double* sums);

// The passes for one instruction set.
struct Kernels {
  Kernel accumulate, apply, dots, commit;
};

// Those of the instruction set that kernels.cpp was compiled for.
const Kernels& kernels();

}  // namespace sofim
