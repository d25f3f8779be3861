// The passes in CUDA: one launch per pass, or one per step, over all tensors of a device. The protocol is in
// sofim_fused/backends/interface.py, the arithmetic of an element in element.h, that of the coefficients in scalars.h.
//
// A block works on one tile, kTile elements of one tensor. A pass that sums leaves one float64 per tile and sum in a
// slot. The block that ends a tensor's last tile adds up that tensor's slots, in their order; the one that ends the last
// tensor goes on to the step's coefficients. Which block that is makes no difference to a bit of the result, and the
// host has nothing to wait for.
#include "cuda/kernels.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "step/element.h"

namespace sofim::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kMost = kLarge;
#else
constexpr int kMost = kSmall;
#endif

// Storage types, and how they are computed with. A type that says less than sofim::Type is told the rest.

// bfloat16 or float16.
template <Type type>
struct Narrow {
  uint16_t bits;
};
using Brain = Narrow<Type::bfloat16>;
using Half = Narrow<Type::float16>;
// Any but float64: the value or, in the lower half, that of a narrow type.
struct Loose {
  uint32_t bits;
};

__device__ __forceinline__ float widened(float x, Type) { return x; }
__device__ __forceinline__ double widened(double x, Type) { return x; }
__device__ __forceinline__ float widened(Brain x, Type) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widened(Half x, Type) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widened(Loose x, Type type) {
  if (type == Type::float32) return from_bits(x.bits);
  const auto bits = static_cast<uint16_t>(x.bits);
  return type == Type::bfloat16 ? widened(Brain{bits}, type) : widened(Half{bits}, type);
}

// To nearest.
__device__ __forceinline__ void narrow(float x, float& to, Type) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to, Type) { to = x; }
__device__ __forceinline__ void narrow(float x, Brain& to, Type) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, Half& to, Type) { to.bits = __half_as_ushort(__float2half_rn(x)); }
template <class To>
__device__ __forceinline__ uint32_t narrowed(float x) {
  To to;
  narrow(x, to, Type());
  return to.bits;
}
__device__ __forceinline__ void narrow(float x, Loose& to, Type type) {
  to.bits = type == Type::float32 ? bits_of(x) : type == Type::bfloat16 ? narrowed<Brain>(x) : narrowed<Half>(x);
}

// A float32 whose lower half is zero, as a bfloat16.
template <class To>
__device__ __forceinline__ void keep_upper(uint32_t bits, To& to) {
  if constexpr (std::is_same_v<To, Brain> || std::is_same_v<To, Loose>) to.bits = static_cast<uint16_t>(bits >> 16);
}

constexpr int least(int a, int b) { return a < b ? a : b; }

// Storage types of weight, gradient and moment.
template <class Weight, class Gradient, class Moment>
struct Storage {
  using W = Weight;
  using G = Gradient;
  using M = Moment;
  using T = decltype(widened(W(), Type()));
  static constexpr bool kLoose = std::is_same_v<W, Loose>;
  static constexpr bool kNarrow = sizeof(W) == 2 || kLoose;  // bits of a weight may be kept
  static constexpr bool kRounds = sizeof(M) == 2 || kLoose;  // the moment may be bfloat16
  static constexpr int kSmallest = least(sizeof(W), least(sizeof(G), sizeof(M)));
  static constexpr int kVector = kLoose ? 1 : 16 / kSmallest;  // elements: none is read in less than 16 bytes
  static constexpr int kBatch = least(2, kTile / kThreads / kVector);  // vectors that are read before one is worked on
};

template <class T, int size>
struct Elements {
  T at[size];
};

// 16 bytes. Of float64 the compiler would take integers apart again.
template <class T>
using Piece16 = std::conditional_t<std::is_same_v<T, double>, double2, uint4>;

// A vector from memory and to it. Nothing else touches the elements of a tensor; bench/kernels_cuda.py finds
// these by name.

// Tensors are in the GPU's memory, which the compiler cannot know of an address that it finds in a table.
#define SOFIM_IN_MEMORY(pointer) __builtin_assume(__isGlobal(pointer))

template <int size, class T>
__device__ __forceinline__ void load(Elements<T, size>& x, const void* from, int64_t at, Type type) {
  SOFIM_IN_MEMORY(from);
  if constexpr (std::is_same_v<T, Loose>) {
    x.at[0].bits = type == Type::float32 ? static_cast<const uint32_t*>(from)[at] : static_cast<const uint16_t*>(from)[at];
  } else if constexpr (size == 1) {
    x.at[0] = static_cast<const T*>(from)[at];
  } else {
    const auto* const vector = reinterpret_cast<const Piece16<T>*>(static_cast<const T*>(from) + at);
    Piece16<T> piece[sizeof x / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof x / 16); ++i) piece[i] = vector[i];
    memcpy(&x, piece, sizeof x);
  }
}

template <int size, class T>
__device__ __forceinline__ void store(void* to, int64_t at, const Elements<T, size>& x, Type type) {
  SOFIM_IN_MEMORY(to);
  if constexpr (std::is_same_v<T, Loose>) {
    if (type == Type::float32) {
      static_cast<uint32_t*>(to)[at] = x.at[0].bits;
    } else {
      static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(x.at[0].bits);
    }
  } else if constexpr (size == 1) {
    static_cast<T*>(to)[at] = x.at[0];
  } else {
    auto* const vector = reinterpret_cast<Piece16<T>*>(static_cast<T*>(to) + at);
    Piece16<T> piece[sizeof x / 16];
    memcpy(piece, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof x / 16); ++i) vector[i] = piece[i];
  }
}

// What a kernel is compiled for; see Form.
template <Pass pass_, bool l2_, bool gradient_, bool step_ = false>
struct Kind {
  static constexpr Pass pass = pass_;
  static constexpr bool l2 = l2_, gradient = gradient_;
  static constexpr bool sums = pass == Pass::accumulate || pass == Pass::dots;
  static constexpr bool writes_m = pass == Pass::accumulate || pass == Pass::commit;
  static constexpr bool writes_w = pass == Pass::apply || pass == Pass::commit || step_;
  static constexpr bool reads_w = writes_w || (l2 && sums);
  static constexpr bool reads_g = pass != Pass::apply || gradient;

  // Whether it takes a sum.
  static SOFIM_HD constexpr bool takes(int sum) {
    if (!sums) return false;
    if (pass == Pass::accumulate) return sum == kMM || (gradient && (sum == kMG || (l2 && sum == kMW)));
    return l2 || sum == kMM || sum == kMG || sum == kGG;
  }
};

constexpr int kFolded = 9;  // the numbers of a GuardedBlock, which are more than the sums

// What blocks share.
struct Shared {
  double warp[kFolded][kWarps];
  double gain;
  bool last, skip;
};

// A tensor's factors in the type that is computed with.
template <class S>
struct Factors {
  using T = typename S::T;
  T decay_m = 1, decay_g = 0, decay_w = 0, by_weight = 1, by_gradient = 0, by_moment = 0, gain = 1;
  uint32_t stretch = 0;  // of the random bits
};

// What other blocks wrote in this launch is not taken from a cache that they do not share.
__device__ __forceinline__ double load_cg(const double* from) { return __ldcg(from); }

template <class S, class K>
__device__ __forceinline__ Factors<S> factors_of(
    const Task& task, const Row& row, const Group* groups, uint32_t tensor, int64_t begin) {
  using T = typename S::T;
  Factors<S> f;
  if constexpr (K::writes_m) {
    const Group& group = groups[row.group];
    f.decay_m = static_cast<T>(group.decay.m);
    f.decay_g = static_cast<T>(group.decay.g);
    if constexpr (K::l2) f.decay_w = static_cast<T>(group.decay.w);
    if constexpr (S::kRounds) {
      const int64_t update = *row.step + (K::pass == Pass::accumulate ? 1 : 0);
      f.stretch = stretch_key(tensor_key(row.ordinal, update), begin);
    }
  }
  if constexpr (K::writes_w) {
    if (task.by_weight != nullptr) f.by_weight = static_cast<T>(load_cg(task.by_weight + tensor));
    if (K::gradient && task.by_gradient != nullptr) f.by_gradient = static_cast<T>(load_cg(task.by_gradient + tensor));
    if (task.by_moment != nullptr) f.by_moment = static_cast<T>(load_cg(task.by_moment + tensor));
  }
  if constexpr (K::pass == Pass::commit) {
    if (task.gain != nullptr) f.gain = static_cast<T>(load_cg(task.gain));
  }
  return f;
}

// Sums of one thread.
template <class K>
struct Sums {
  double at[kSums] = {};

  // Products of float32 are exact in float64.
  __device__ __forceinline__ void add(Sum sum, double a, double b) {
    if (K::takes(sum)) at[sum] = fma(a, b, at[sum]);
  }
};

// A tile of which `left` elements are there; `size` elements at a time, as many as 16 bytes hold, or one.
template <class S, class K, int size>
__device__ __forceinline__ void sweep(const Row& row, const Factors<S>& f, int64_t begin, int left, Sums<K>& sums) {
  using T = typename S::T;
  constexpr bool kFull = size > 1;
  constexpr int kBatch = kFull ? S::kBatch : 4;
  const bool keeps = S::kNarrow && row.kahan != nullptr;
  const bool rounds = S::kLoose ? row.m_type == Type::bfloat16 : S::kRounds;
  const bool decays = K::l2 && f.decay_w != 0;  // a zero factor adds no term: zero times an infinite weight is NaN
  const bool half = S::kLoose ? row.w_type == Type::float16 : std::is_same_v<typename S::W, Half>;
  const float half_eps = half ? 1.0f / 2048 : 1.0f / 256;

#pragma unroll 1
  for (int start = 0; start < (kFull ? static_cast<int>(kTile) : left); start += kThreads * size * kBatch) {
    Elements<typename S::W, size> ws[kBatch], kahans[kBatch];
    Elements<typename S::G, size> gs[kBatch];
    Elements<typename S::M, size> ms[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = start + (i * kThreads + static_cast<int>(threadIdx.x)) * size;
      if (!kFull && at >= left) continue;
      load(ms[i], row.m, begin + at, row.m_type);
      if constexpr (K::reads_g) load(gs[i], row.g, begin + at, row.g_type);
      if constexpr (K::reads_w) load(ws[i], row.w, begin + at, row.w_type);
      if constexpr (K::writes_w && S::kNarrow) {
        if (keeps) load(kahans[i], row.kahan, begin + at, row.w_type);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = start + (i * kThreads + static_cast<int>(threadIdx.x)) * size;
      if (!kFull && at >= left) continue;
#pragma unroll
      for (int j = 0; j < size; ++j) {
        T moment = widened(ms[i].at[j], row.m_type), v = 0, weight = 0;
        if constexpr (K::reads_g) v = widened(gs[i].at[j], row.g_type);
        if constexpr (K::reads_w) weight = widened(ws[i].at[j], row.w_type);
        if constexpr (K::pass == Pass::dots) {
          sums.add(kMM, moment, moment);
          sums.add(kMG, moment, v);
          sums.add(kGG, v, v);
          sums.add(kMW, moment, weight);
          sums.add(kGW, v, weight);
          sums.add(kWW, weight, weight);
        }
        if constexpr (K::writes_m) {
          if constexpr (K::pass == Pass::commit) v = v * f.gain;
          moment = blended(moment, v, f.decay_m, f.decay_g);
          if (decays) moment = Ops<T>::multiply_add(f.decay_w, weight, moment);
          T kept = moment;
          if (S::kRounds && rounds) {
            const uint32_t place = (static_cast<uint32_t>(begin) + static_cast<uint32_t>(at + j)) * kWeyl;
            const float value = static_cast<float>(moment);
            const uint32_t bits = rounded_stochastically(bits_of(value), random_bits(f.stretch, place));
            keep_upper(bits, ms[i].at[j]);
            kept = from_bits(bits);
          } else {
            narrow(moment, ms[i].at[j], Type::float32);
          }
          if constexpr (K::pass == Pass::accumulate) {
            sums.add(kMM, kept, kept);
            sums.add(kMG, kept, v);
            sums.add(kMW, kept, weight);
          }
        }
        if constexpr (K::writes_w) {
          if constexpr (S::kNarrow) {
            if (keeps) weight = with_lost_bits(weight, widened(kahans[i].at[j], row.w_type), half_eps);
          }
          weight = weight * f.by_weight;
          if constexpr (K::gradient) weight = Ops<T>::multiply_add(f.by_gradient, v, weight);
          if constexpr (!K::sums) weight = Ops<T>::multiply_add(f.by_moment, moment, weight);
          narrow(weight, ws[i].at[j], row.w_type);
          if constexpr (S::kNarrow) {
            if (keeps) {
              narrow(lost_bits(weight, widened(ws[i].at[j], row.w_type), FLT_MAX), kahans[i].at[j], row.w_type);
            }
          }
        }
      }
      if constexpr (K::writes_m) store(row.m, begin + at, ms[i], row.m_type);
      if constexpr (K::writes_w) store(row.w, begin + at, ws[i], row.w_type);
      if constexpr (K::writes_w && S::kNarrow) {
        if (keeps) store(row.kahan, begin + at, kahans[i], row.w_type);
      }
    }
  }
}

// What it takes to work on a tile.
struct Tile {
  const Task& task;
  const Row& row;
  const Group* groups;
  uint32_t tensor;
  int64_t begin;

  // Whether it is full, and in its place in memory.
  __device__ __forceinline__ bool full() const { return row.aligned && row.numel - begin >= kTile; }

  // All of it in vectors (size: of one), or what there is of it element by element (1).
  template <class S, class K, int size>
  __device__ __forceinline__ void swept(Sums<K>& sums) const {
    const Factors<S> f = factors_of<S, K>(task, row, groups, tensor, begin);
    const int64_t left = row.numel - begin;
    sweep<S, K, size>(row, f, begin, static_cast<int>(left < kTile ? left : kTile), sums);
  }
};

// The storage types that a kernel is compiled for (Types).

struct Float32 {
  template <class K>
  static __device__ __forceinline__ void sweep(const Tile& tile, Sums<K>& sums) {
    if (tile.row.m_type == Type::float32) return swept<Storage<float, float, float>>(tile, sums);
    return swept<Storage<float, float, Brain>>(tile, sums);
  }

  template <class S, class K>
  static __device__ __forceinline__ void swept(const Tile& tile, Sums<K>& sums) {
    return tile.full() ? tile.swept<S, K, S::kVector>(sums) : tile.swept<S, K, 1>(sums);
  }
};

struct Alike {
  template <class K>
  static __device__ __forceinline__ void sweep(const Tile& tile, Sums<K>& sums) {
    if (!tile.full()) return tile.swept<Storage<Loose, Loose, Loose>, K, 1>(sums);
    if (tile.row.w_type == Type::bfloat16) return full<Brain, Brain>(tile, sums);
    return full<Half, Half>(tile, sums);
  }

  template <class W, class G, class K>
  static __device__ __forceinline__ void full(const Tile& tile, Sums<K>& sums) {
    if (tile.row.m_type == Type::float32) return in_vectors<Storage<W, G, float>>(tile, sums);
    return in_vectors<Storage<W, G, Brain>>(tile, sums);
  }

  template <class S, class K>
  static __device__ __forceinline__ void in_vectors(const Tile& tile, Sums<K>& sums) {
    return tile.swept<S, K, S::kVector>(sums);
  }
};

struct Any {
  template <class K>
  static __device__ __forceinline__ void sweep(const Tile& tile, Sums<K>& sums) {
    const Row& row = tile.row;
    if (row.w_type == Type::float64) return Float32::swept<Storage<double, double, double>>(tile, sums);
    if (!tile.full()) return tile.swept<Storage<Loose, Loose, Loose>, K, 1>(sums);
    if (row.w_type == Type::float32) return Float32::sweep(tile, sums);
    if (row.g_type != Type::float32) return Alike::sweep(tile, sums);
    if (row.w_type == Type::bfloat16) return Alike::full<Brain, float>(tile, sums);
    return Alike::full<Half, float>(tile, sums);
  }
};

// Between the sweeps

__device__ __forceinline__ double warp_total(double x) {
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, width);
  return x;
}

// The sums of all threads; thread i has the i-th. To be followed by a barrier before the next.
template <class K>
__device__ __forceinline__ double block_total(const Sums<K>& sums, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    if (!K::takes(sum)) continue;
    const double total = warp_total(sums.at[sum]);
    if (lane == 0) shared.warp[sum][warp] = total;
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x < kSums && K::takes(static_cast<int>(threadIdx.x))) {
    for (int i = 0; i < kWarps; ++i) total += shared.warp[threadIdx.x][i];
  }
  return total;
}

// atomicInc() for one thread of a block: others see what the block wrote before, and it what they wrote before theirs.
// The fences around would each order all memory accesses of the GPU; an atomic operation that does both takes one.
__device__ __forceinline__ uint32_t atomic_inc_acq_rel(uint32_t* counter, uint32_t most) {
#ifdef SOFIM_EMULATED
  __threadfence();
  const uint32_t before = atomicInc(counter, most);
  __threadfence();
#else
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most) : "memory");
#endif
  return before;
}

// Whether all but this block have come here; what they wrote before can then be read.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t all, Shared& shared) {
  __syncthreads();
  // And starts from zero for the next launch.
  if (threadIdx.x == 0) shared.last = atomic_inc_acq_rel(counter, all - 1) == all - 1;
  __syncthreads();
  return shared.last;
}

__device__ double number(const void* from, bool wide) {
  return wide ? *static_cast<const double*>(from) : static_cast<double>(*static_cast<const float*>(from));
}

__device__ Hyper hyper_of(const Group& group) {
  Hyper hyper = group.hyper;
  if (group.lr != nullptr) hyper.lr = number(group.lr, group.lr_double);
  if (group.rho != nullptr) hyper.rho = number(group.rho, group.rho_double);
  return hyper;
}

__device__ Products products_of(const Task& task, uint32_t tensor, bool l2) {
  const auto sum = [&](Sum which) { return load_cg(task.sums + static_cast<size_t>(which) * task.tensors + tensor); };
  const bool guarded = task.finish == Finish::guarded;
  Products p;
  p.mm = sum(kMM);
  if (guarded || task.gradient_form) p.mg = sum(kMG);
  if (l2 && (guarded || task.gradient_form)) p.mw = sum(kMW);
  if (guarded) p.gg = sum(kGG);
  if (guarded && l2) p.gw = sum(kGW);
  if (guarded && l2) p.ww = sum(kWW);
  return p;
}

// The first of the tensors, which are in the order of their groups, whose group is not before `group`.
__device__ uint32_t first_of_group(const Row* rows, uint32_t tensors, uint32_t group) {
  uint32_t low = 0, high = tensors;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (rows[middle].group < group) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The true gradients' norm, what makes clipped true gradients of those that are there, and whether to skip the step.
__device__ void guard(const Task& task, Shared& shared) {
  using Square = Kind<Pass::accumulate, false, false>;  // one sum
  Sums<Square> square;
  for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
    square.at[kMM] += load_cg(task.sums + static_cast<size_t>(kGG) * task.tensors + i);
  }
  const double total = block_total(square, shared);
  if (threadIdx.x == 0) {
    const double unscale = task.grad_scale == nullptr ? 1.0 : 1.0 / number(task.grad_scale, task.scale_double);
    const double norm = sqrt(total) * unscale;
    shared.gain = (norm > task.limit ? task.limit / norm : 1.0) * unscale;
    const bool found = task.found_inf != nullptr && number(task.found_inf, task.found_double) != 0.0;
    shared.skip = found || (task.skip_nonfinite && !isfinite(norm));
    *task.gain = shared.gain;
    *task.skip = shared.skip;
    *task.norm = norm;
    if (shared.skip) *task.skipped += 1;
  }
  __syncthreads();
}

// Calls f with each number of a Fisher block, always in the same order.
template <class F>
__device__ __forceinline__ void each(PlainBlock& block, F f) {
  f(block.norm);
  f(block.cross);
}
template <class F>
__device__ __forceinline__ void each(GuardedBlock& block, F f) {
#pragma unroll
  for (int power = 0; power < 3; ++power) {
    f(block.norm[power]);
    f(block.scale[power]);
    f(block.cross[power]);
  }
}

// Adds up what the threads of a team have, which is `warps` neighbouring warps: each thread gets the sums. All threads
// of the block come here together, each in its own team. The order of the additions depends on `warps` alone.
template <class Block>
__device__ void fold(Block& block, uint32_t warps, Shared& shared) {
  static_assert(sizeof(Block) <= kFolded * sizeof(double), "there is room for its numbers");
  each(block, [](double& x) { x = warp_total(x); });
  if (warps == 1) return;
  const uint32_t warp = threadIdx.x / kWarp, first = warp / warps * warps;
  if (threadIdx.x % kWarp == 0) {
    int at = 0;
    each(block, [&](double& x) { shared.warp[at++][warp] = x; });
  }
  __syncthreads();
  int at = 0;
  each(block, [&](double& x) {
    x = 0.0;
    for (uint32_t i = 0; i < warps; ++i) x += shared.warp[at][first + i];
    ++at;
  });
  __syncthreads();  // before the next Fisher block's numbers take their place
}
__device__ PlainBlock known(const PlainBlock& block, double) { return block; }
__device__ PlainBlock known(const GuardedBlock& block, double gain) { return block.at_gain(gain); }

__device__ void set_update(
    const Task& task, const Row& row, const Hyper& hyper, uint32_t tensor, const PlainBlock& block, bool skip) {
  const Update update = sherman_morrison(hyper, task.corrections[tensor], block, task.gradient_form);
  task.by_weight[tensor] = update.weight;
  task.by_gradient[tensor] = update.gradient;
  task.by_moment[tensor] = update.moment;
  if (!skip) *row.step += 1;
}

// How many warps work together on a Fisher block, a power of two: as many as there are for each, but not many that would
// find no tensor.
__device__ uint32_t team_of(uint32_t tensors, uint32_t blocks) {
  uint32_t warps = 1;
  while (warps * kWarp < tensors && 2 * warps * blocks <= kWarps) warps *= 2;
  return warps;
}

// Coefficients of every tensor from the sums of all, and one more update is atomic_inc_acq_rel.
template <class Block>
__device__ void set_updates(
    const Task& task, const Row* rows, const Group* groups, bool l2, double gain, bool skip, Shared& shared) {
  for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
    task.corrections[i] = bias_correction(groups[rows[i].group].hyper.momentum, *rows[i].step + 1);
  }
  __syncthreads();
  if (task.fisher == Fisher::parameter) {
    for (uint32_t i = threadIdx.x; i < task.tensors; i += kThreads) {
      const Hyper hyper = hyper_of(groups[rows[i].group]);
      Block block;
      block.add(hyper, task.corrections[i], products_of(task, i, l2));
      set_update(task, rows[i], hyper, i, known(block, gain), skip);
    }
    return;
  }
  // Each tensor is a chain of loads and divisions, of which a warp waits for one at a time: one warp alone took half of
  // the step of a model of 1,000 small tensors.
  const uint32_t blocks = task.fisher == Fisher::group ? task.group_count : 1;
  const uint32_t warps = team_of(task.tensors, blocks), teams = kWarps / warps, threads = warps * kWarp;
  const uint32_t team = threadIdx.x / threads, mine = threadIdx.x % threads;
  for (uint32_t first = 0; first < blocks; first += teams) {
    const uint32_t at = first + team;
    uint32_t begin = 0, end = 0;  // none for a team without a Fisher block, which has to come along to the barriers
    if (team < teams && at < blocks) {
      begin = blocks == 1 ? 0 : first_of_group(rows, task.tensors, at);
      end = blocks == 1 ? task.tensors : first_of_group(rows, task.tensors, at + 1);
    }
    Block block;
    for (uint32_t i = begin + mine; i < end; i += threads) {
      block.add(hyper_of(groups[rows[i].group]), task.corrections[i], products_of(task, i, l2));
    }
    fold(block, warps, shared);
    const PlainBlock whole = known(block, gain);
    for (uint32_t i = begin + mine; i < end; i += threads) {
      set_update(task, rows[i], hyper_of(groups[rows[i].group]), i, whole, skip);
    }
  }
}

// Out of line: it is done once per step, and must not take registers from the sweeps.
__device__ __noinline__ void finish(
    const Task& task, const Row* rows, const Group* groups, bool l2, Shared& shared) {
  if (task.finish == Finish::plain) return set_updates<PlainBlock>(task, rows, groups, l2, 1.0, false, shared);
  guard(task, shared);
  set_updates<GuardedBlock>(task, rows, groups, l2, shared.gain, shared.skip, shared);
}

// The sweeps

// The tensor that a tile belongs to. As each tensor has a tile at least, its number is not above the tile's, and likewise
// from behind: where all have one each, there is nothing to search, and every look at a row costs a trip to memory.
__device__ __forceinline__ uint32_t tensor_of(const Task& task, const Row* rows, uint32_t tile) {
  const uint32_t more = task.tiles - task.tensors;
  uint32_t low = tile > more ? tile - more : 0, high = tile < task.tensors ? tile + 1 : task.tensors;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (rows[middle].first <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A tile of a pass that sums, and what is to be done once the last tile is.
template <class Set, class K>
__device__ __forceinline__ void first_sweep(
    const Task& task, const Row* rows, const Group* groups, uint32_t tile, Shared& shared) {
  const uint32_t tensor = tensor_of(task, rows, tile);
  const Row row = rows[tensor];  // a copy, which no store can change
  Sums<K> sums;
  Set::sweep(Tile{task, row, groups, tensor, static_cast<int64_t>(tile - row.first) * kTile}, sums);
  const uint32_t tiles = tiles_of(row.numel);
  double* const place = tiles == 1 ? task.sums + tensor : task.slots + tile;
  const size_t stride = tiles == 1 ? task.tensors : task.tiles;
  double total = block_total(sums, shared);
  if (threadIdx.x < kSums && K::takes(static_cast<int>(threadIdx.x))) place[threadIdx.x * stride] = total;
  if (tiles > 1) {
    if (!is_last_block(task.counters + tensor, tiles, shared)) return;
    Sums<K> slots;
    for (uint32_t i = threadIdx.x; i < tiles; i += kThreads) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        if (!K::takes(sum)) continue;
        slots.at[sum] += load_cg(task.slots + static_cast<size_t>(sum) * task.tiles + row.first + i);
      }
    }
    total = block_total(slots, shared);
    if (threadIdx.x < kSums && K::takes(static_cast<int>(threadIdx.x))) {
      task.sums[static_cast<size_t>(threadIdx.x) * task.tensors + tensor] = total;
    }
  }
  if (task.finish == Finish::none) {
    __syncthreads();
    return;
  }
  if (is_last_block(task.counters + task.tensors, task.tensors, shared)) finish(task, rows, groups, K::l2, shared);
}

// A tile of a pass that updates.
template <class Set, class K>
__device__ __forceinline__ void second_sweep(const Task& task, const Row* rows, const Group* groups, uint32_t tile) {
  const uint32_t tensor = tensor_of(task, rows, tile);
  const Row row = rows[tensor];
  Sums<K> none;
  Set::sweep(Tile{task, row, groups, tensor, static_cast<int64_t>(tile - row.first) * kTile}, none);
}

__device__ __forceinline__ bool skipped(const Task& task) {
  return task.skip != nullptr && __ldcg(reinterpret_cast<const unsigned char*>(task.skip)) != 0;
}

// Kernels

template <int size>
__device__ __forceinline__ const Row* rows_of(const Arguments<size>& a) {
  return a.task.rows != nullptr ? a.task.rows : reinterpret_cast<const Row*>(a.more);
}
template <int size>
__device__ __forceinline__ const Group* groups_of(const Arguments<size>& a) {
  return a.task.rows != nullptr ? a.task.groups
                                : reinterpret_cast<const Group*>(a.more + a.task.tensors * sizeof(Row));
}

// How many blocks of a pass a multiprocessor is to have room for, which limits their registers. While one waits for its
// first elements or hands over its sums, the others keep the memory busy: on an H200 that was worth more than reading
// twice as many vectors ahead, or than the few registers that kernels for many types spill.
template <class K>
constexpr int blocks_of() {
  if (!K::sums) return 4;
  if (K::l2 || K::writes_w) return kBlocks;
  return K::gradient ? 4 : 5;
}

template <class Set, class K, int size>
__global__ void __launch_bounds__(kThreads, blocks_of<K>()) first(const __grid_constant__ Arguments<size> a) {
  __shared__ Shared shared;
  first_sweep<Set, K>(a.task, rows_of(a), groups_of(a), blockIdx.x, shared);
}

// The last tile comes first, as the sweep before left it in the cache.
template <class Set, class K, int size>
__global__ void __launch_bounds__(kThreads, blocks_of<K>()) second(const __grid_constant__ Arguments<size> a) {
  if (skipped(a.task)) return;
  second_sweep<Set, K>(a.task, rows_of(a), groups_of(a), a.task.tiles - 1 - blockIdx.x);
}

// Both sweeps, and between them a barrier that every block has to reach: all of them have to run at once. A block takes
// the same tiles in both, in the second one backwards.
template <class Set, class First, class Second, int size>
__global__ void __launch_bounds__(kThreads, kBlocks) both(const __grid_constant__ Arguments<size> a) {
  __shared__ Shared shared;
  const Row* const rows = rows_of(a);
  const Group* const groups = groups_of(a);
  uint32_t tile = blockIdx.x;
  for (; tile < a.task.tiles; tile += gridDim.x) {
    first_sweep<Set, First>(a.task, rows, groups, tile, shared);
    __syncthreads();
  }
  cooperative_groups::this_grid().sync();
  if (skipped(a.task)) return;
  while (tile >= gridDim.x) {
    tile -= gridDim.x;
    second_sweep<Set, Second>(a.task, rows, groups, tile);
  }
}

// Arguments on their way to a table.
template <int size>
struct Piece {
  unsigned long long* to;
  uint32_t words;
  unsigned long long word[size / 8 - 2];
};

template <int size>
__global__ void __launch_bounds__(kThreads) copy(const __grid_constant__ Piece<size> piece) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  if (at < piece.words) piece.to[at] = piece.word[at];
}

// Launches

template <class F>
int with(bool x, F f) {
  return x ? f(std::true_type()) : f(std::false_type());
}

int outcome(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or it would be found again by whoever asks next
  return static_cast<int>(error);
}

template <int size>
int launch_with(void (*kernel)(Arguments<size>), bool waits, uint32_t blocks, const Task& task, const Row* rows,
                const Group* groups, void* stream) {
  static thread_local Arguments<size> arguments;
  arguments.task = task;
  if (task.rows == nullptr) {
    memcpy(arguments.more, rows, task.tensors * sizeof(Row));
    memcpy(arguments.more + task.tensors * sizeof(Row), groups, task.group_count * sizeof(Group));
  }
  void* pointers[] = {&arguments};
  const auto on = static_cast<cudaStream_t>(stream);
  return outcome((waits ? cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, on)
                        : cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, on)));
}

// Calls run(kernel) with the kernel of a whole step, of which there is one for float32 and narrow weights.
template <class F>
int with_step(const Form& form, const Task& task, F run) {
  return with(form.types == Types::float32, [&](auto float32) {
    return with(form.l2, [&](auto l2) {
      return with(form.gradient, [&](auto gradient) {
        using Set = std::conditional_t<float32, Float32, Alike>;
        const auto sized = [&](auto first, auto second) {
          using First = decltype(first);
          using Second = decltype(second);
          if constexpr (float32 && kMost != kSmall) {
            if (is_small(task)) return run(&both<Set, First, Second, kSmall>);
          }
          return run(&both<Set, First, Second, kMost>);
        };
        if (task.finish == Finish::plain) {
          return sized(Kind<Pass::accumulate, l2, gradient>(), Kind<Pass::apply, false, gradient>());
        }
        return sized(Kind<Pass::dots, l2, false>(), Kind<Pass::commit, l2, gradient>());
      });
    });
  });
}

}  // namespace

int largest_arguments() { return kMost; }

int launch(Pass pass, const Form& form, const Task& task, const Row* rows, const Group* groups, void* stream) {
  return with(form.types == Types::float32, [&](auto float32) {
    using Set = std::conditional_t<float32, Float32, Any>;
    return with(form.l2, [&](auto l2) {
      return with(form.gradient || form.step, [&](auto gradient) {
        const auto run = [&](auto kernel) {
          return launch_with<kMost>(kernel, false, task.tiles, task, rows, groups, stream);
        };
        switch (pass) {
          case Pass::accumulate:
            if constexpr (gradient) {
              if (form.step) return run(&first<Set, Kind<Pass::accumulate, l2, true, true>, kMost>);
            }
            return run(&first<Set, Kind<Pass::accumulate, l2, gradient>, kMost>);
          case Pass::apply:
            return run(&second<Set, Kind<Pass::apply, false, gradient>, kMost>);
          case Pass::dots:
            return run(&first<Set, Kind<Pass::dots, l2, false>, kMost>);
          case Pass::commit:
            return run(&second<Set, Kind<Pass::commit, l2, gradient>, kMost>);
        }
        return static_cast<int>(cudaErrorInvalidValue);
      });
    });
  });
}

int launch_step(const Form& form, const Task& task, const Row* rows, const Group* groups, int blocks, void* stream) {
  const uint32_t some = task.tiles < static_cast<uint32_t>(blocks) ? task.tiles : static_cast<uint32_t>(blocks);
  return with_step(form, task, [&](auto kernel) {
    return launch_with(kernel, true, some, task, rows, groups, stream);
  });
}

int step_blocks(const Form& form, const Task& task, int* blocks) {
  *blocks = 0;
  if (form.types == Types::any) return 0;
  int device, possible, multiprocessors, each;
  if (const auto error = cudaGetDevice(&device)) return outcome(error);
  if (const auto error = cudaDeviceGetAttribute(&possible, cudaDevAttrCooperativeLaunch, device)) return outcome(error);
  if (possible == 0) return 0;
  if (const auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return outcome(error);
  }
  return with_step(form, task, [&](auto kernel) {
    const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    if (error == cudaSuccess) *blocks = multiprocessors * each;
    return outcome(error);
  });
}

int fill(void* table, const Row* rows, size_t row_count, const Group* groups, size_t group_count, void* stream) {
  using Filled = Piece<kMost>;
  constexpr size_t most = sizeof(Filled::word);
  static thread_local Filled piece;
  const size_t row_bytes = row_count * sizeof(Row), bytes = row_bytes + group_count * sizeof(Group);
  const auto copied = [&](size_t begin, size_t end, const void* from, size_t from_begin, size_t from_end) {
    const size_t first = begin > from_begin ? begin : from_begin, last = end < from_end ? end : from_end;
    if (first < last) {
      memcpy(reinterpret_cast<unsigned char*>(piece.word) + (first - begin),
             static_cast<const unsigned char*>(from) + (first - from_begin), last - first);
    }
  };
  for (size_t begin = 0; begin < bytes; begin += most) {
    const size_t end = bytes - begin < most ? bytes : begin + most;
    copied(begin, end, rows, 0, row_bytes);
    copied(begin, end, groups, row_bytes, bytes);
    piece.to = reinterpret_cast<unsigned long long*>(static_cast<unsigned char*>(table) + begin);
    piece.words = static_cast<uint32_t>((end - begin) / 8);
    void* pointers[] = {&piece};
    const dim3 blocks((piece.words + kThreads - 1) / kThreads);
    const auto error = cudaLaunchKernel(&copy<kMost>, blocks, dim3(kThreads), pointers, 0,
                                        static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return outcome(error);
  }
  return 0;
}

bool refused(int error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace sofim::cuda
