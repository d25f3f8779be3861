// How the elements of a tensor are stored: the storage types, their conversion to and from the type of computation, and
// loads and stores of one element or of 16 bytes. Nothing else accesses the elements of a tensor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "cuda/kernels.h"
#include "step/element.h"

namespace sofim::cuda {

// Types. Each has widened(), which converts to the type of computation, and narrow(), which rounds back to nearest. All
// of these are given a sofim::Type, which only Loose uses.

template <Type type>
struct Bits16 {
  uint16_t bits;
};
using BFloat16 = Bits16<Type::bfloat16>;
using Float16 = Bits16<Type::float16>;
// Gets its dtype at run time, any but float64: a float32 or, in the lower half, a bfloat16 or float16.
struct Loose {
  uint32_t bits;
};

__device__ __forceinline__ float widened(float x, Type) { return x; }
__device__ __forceinline__ double widened(double x, Type) { return x; }
__device__ __forceinline__ float widened(BFloat16 x, Type) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widened(Float16 x, Type) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widened(Loose x, Type type) {
  if (type == Type::float32) return from_bits(x.bits);
  const auto bits = static_cast<uint16_t>(x.bits);
  return type == Type::bfloat16 ? widened(BFloat16{bits}, type) : widened(Float16{bits}, type);
}

__device__ __forceinline__ void narrow(float x, float& to, Type) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to, Type) { to = x; }
__device__ __forceinline__ void narrow(float x, BFloat16& to, Type) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void narrow(float x, Float16& to, Type) { to.bits = __half_as_ushort(__float2half_rn(x)); }
template <class To>
__device__ __forceinline__ uint32_t narrowed(float x) {
  To to;
  narrow(x, to, Type());
  return to.bits;
}
__device__ __forceinline__ void narrow(float x, Loose& to, Type type) {
  to.bits = type == Type::float32    ? bits_of(x)
            : type == Type::bfloat16 ? narrowed<BFloat16>(x)
                                     : narrowed<Float16>(x);
}

// Stores the bits of a float32 whose lower half is zero as a bfloat16.
template <class To>
__device__ __forceinline__ void keep_upper(uint32_t bits, To& to) {
  if constexpr (std::is_same_v<To, BFloat16> || std::is_same_v<To, Loose>) to.bits = static_cast<uint16_t>(bits >> 16);
}

// A float32 weight from the bits of its halves (joined() in step/element.h), and the halves of one. Of weights of 24
// bits the lower byte of the rest is 0; load_rest() and store_rest() leave it out.
__device__ __forceinline__ float whole(uint32_t shown, uint32_t rest) {
  const auto extended = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(rest)));
  return from_bits(joined(shown << 16, extended));
}
template <class To>
__device__ __forceinline__ void split(float weight, To& shown, To& rest, bool cut, uint32_t stretch, uint32_t place) {
  uint32_t bits = splittable(bits_of(weight));
  if (cut) bits = cut_stochastically(bits, random_byte(stretch, place));
  shown.bits = static_cast<uint16_t>(shown_half(bits) >> 16);
  rest.bits = static_cast<uint16_t>(bits);
}

constexpr int least(int a, int b) { return a < b ? a : b; }

// The storage types of weight, gradient and moment.
template <class Weight, class Gradient, class Moment>
struct Storage {
  using W = Weight;
  using G = Gradient;
  using M = Moment;
  using T = decltype(widened(W(), Type()));  // the type of computation
  static constexpr bool kLoose = std::is_same_v<W, Loose>;
  static constexpr bool kNarrow = sizeof(W) == 2 || kLoose;  // it may have lost bits
  static constexpr bool kSplits = std::is_same_v<W, BFloat16> || kLoose;  // it may be half of a float32 (Row::master)
  static constexpr bool kCuts = kLoose;  // it may be, and the float32 has 24 bits (Row::cut)
  static constexpr bool kRounds = sizeof(M) == 2 || kLoose;  // the moment may be bfloat16
  static constexpr int kSmallest = least(sizeof(W), least(sizeof(G), sizeof(M)));
  static constexpr int kVector = kLoose ? 1 : 16 / kSmallest;  // elements: the smallest of the types fills 16 bytes
  static constexpr int kBatch = least(2, kTile / kThreads / kVector);  // vectors that are loaded before one is computed
};

template <class T, int size>
struct Elements {
  T at[size];
};

// 16 bytes. Not uint4 for float64, for which the compiler would split the accesses.
template <class T>
using Piece16 = std::conditional_t<std::is_same_v<T, double>, double2, uint4>;

// bench/kernels_cuda.py finds load and store by their names.

// Tensors are in global memory. The compiler cannot know that of an address that the kernel reads from a table.
#define SOFIM_IN_MEMORY(pointer) __builtin_assume(__isGlobal(pointer))

template <int size, class T>
__device__ __forceinline__ void load(Elements<T, size>& x, const void* from, int64_t at, Type type) {
  SOFIM_IN_MEMORY(from);
  if constexpr (std::is_same_v<T, Loose>) {
    x.at[0].bits =
        type == Type::float32 ? static_cast<const uint32_t*>(from)[at] : static_cast<const uint16_t*>(from)[at];
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

// The rest of one weight in two parts, as 16 bits. Weights of 24 bits are read and written one by one: in vectors, they
// would need code beside that of all other 16-bit weights, and registers there.
template <class T>
__device__ __forceinline__ void load_rest(Elements<T, 1>& x, const void* from, int64_t at, Type type, bool cut) {
  if (!cut) return load(x, from, at, type);
  SOFIM_IN_MEMORY(from);
  x.at[0].bits = static_cast<uint16_t>(static_cast<const uint8_t*>(from)[at] << 8);
}

template <class T>
__device__ __forceinline__ void store_rest(void* to, int64_t at, const Elements<T, 1>& x, Type type, bool cut) {
  if (!cut) return store(to, at, x, type);
  SOFIM_IN_MEMORY(to);
  static_cast<uint8_t*>(to)[at] = static_cast<uint8_t>(x.at[0].bits >> 8);
}

}  // namespace sofim::cuda
