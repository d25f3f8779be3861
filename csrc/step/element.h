// The arithmetic of one element. Each formula is written once, as a template: for a scalar, on host or device, and for
// a vector of elements (csrc/cpu/lanes.h). V is a real type, float or double or a vector of them; U is a 32-bit
// unsigned integer or a vector of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SOFIM_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)  // with checks around each access, inlined code is too large
#define SOFIM_HD inline __attribute__((always_inline))
#define SOFIM_INLINE __attribute__((always_inline))  // of a lambda
#else
#define SOFIM_HD inline
#define SOFIM_INLINE
#endif

namespace sofim {

// The operations on V besides + - *, those of a diagonal that adapts last. multiply_add(a, b, c) is a*b + c, rounded once wherever the hardware can.
template <class V>
struct Ops;

template <>
struct Ops<float> {
  static SOFIM_HD float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
  static SOFIM_HD float magnitude(float x) { return fabsf(x); }
  // x where a <= b, else 0; also 0 where a or b is NaN.
  static SOFIM_HD float where_at_most(float a, float b, float x) { return a <= b ? x : 0.0f; }
  static SOFIM_HD float divide(float a, float b) { return a / b; }
  static SOFIM_HD float root(float x) { return sqrtf(x); }
  // A NaN stays one.
  static SOFIM_HD float at_most(float x, float largest) { return x > largest ? largest : x; }
  static SOFIM_HD float at_least(float x, float least) { return x < least ? least : x; }
};

template <>
struct Ops<double> {
  static SOFIM_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }
  static SOFIM_HD double magnitude(double x) { return fabs(x); }
  static SOFIM_HD double where_at_most(double a, double b, double x) { return a <= b ? x : 0.0; }
  static SOFIM_HD double divide(double a, double b) { return a / b; }
  static SOFIM_HD double root(double x) { return sqrt(x); }
  static SOFIM_HD double at_most(double x, double largest) { return x > largest ? largest : x; }
  static SOFIM_HD double at_least(double x, double least) { return x < least ? least : x; }
};

SOFIM_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
SOFIM_HD float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
// a, or b where the bits x are those of a NaN.
SOFIM_HD uint32_t where_number(uint32_t x, uint32_t a, uint32_t b) { return (x & 0x7FFFFFFFu) <= 0x7F800000u ? a : b; }

// The coefficients of the new first moment, decay.m·m + decay.g·v + decay.w·w, each named after what it multiplies.
struct Decay {
  double m, g, w;
};

// The first moment: by_m·m + by_g·g.
template <class V>
SOFIM_HD V blended(V m, V g, V by_m, V by_g) {
  return Ops<V>::multiply_add(by_g, g, by_m * m);
}

// The weight plus `lost`, the part that its 16-bit storage lost (Kahan). A lost part above half an ulp of w,
// |w|·half_eps, cannot be that part (w was replaced from outside) and is ignored.
template <class V>
SOFIM_HD V with_lost_bits(V w, V lost, V half_eps) {
  return w + Ops<V>::where_at_most(Ops<V>::magnitude(lost), Ops<V>::magnitude(w) * half_eps, lost);
}

// The part of a value that is lost when it is stored as `rounded`; 0 if that overflows (largest: the largest finite V).
template <class V>
SOFIM_HD V lost_bits(V value, V rounded, V largest) {
  return Ops<V>::where_at_most(Ops<V>::magnitude(rounded), largest, value - rounded);
}

// A float32 weight in two halves: a bfloat16, rounded to nearest with ties away from zero, and an int16 with the rest of
// its bits. sofim_fused/backends/master_bits.py defines them. All of these are bits of a float32.

// The whole weight: the bfloat16 as a float32 plus the rest, sign extended. A rest that would make a NaN of a number
// cannot belong to it (w was replaced from outside) and is ignored.
template <class U>
SOFIM_HD U joined(U shown, U rest) {
  const U whole = shown + rest;
  return where_number(whole, whole, shown);
}

// The bits of a weight that splits into these halves; a NaN becomes the one whose rest is 0.
template <class U>
SOFIM_HD U splittable(U bits) {
  return where_number(bits, bits, (bits & 0x80000000u) + 0x7FC00000u);
}
// Of such bits: the bfloat16, in the upper half. The rest is the lower half of the bits themselves.
template <class U>
SOFIM_HD U shown_half(U bits) {
  return bits + 0x8000u;
}

// With 24 bits instead of 32: the rest is the upper byte of the lower half alone, a signed number of 8 bits.

// Such bits (of splittable()) rounded stochastically to their upper 24, given 8 random bits. The probability of rounding
// up in magnitude is the part that is cut off. A number that would become infinite is rounded down.
template <class U>
SOFIM_HD U cut_stochastically(U bits, U random) {
  const U raised = (bits + random) & 0xFFFFFF00u;
  return where_number(raised + 1u, raised, bits & 0xFFFFFF00u);  // one more than infinity is a NaN
}

// Random bits: a hash of (seed, ordinal, step, index) and nothing else; sofim_fused/backends/rounding.py defines it.

constexpr uint32_t kSeed = 0x50F1u;
constexpr uint32_t kWeyl = 0x9E3779B9u;

template <class U>
SOFIM_HD U mixed(U x) {
  x = x ^ (x >> 16);
  x = x * 0x7FEB352Du;
  x = x ^ (x >> 15);
  x = x * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The key of one tensor in one update (updates count from 1).
SOFIM_HD uint32_t tensor_key(uint32_t ordinal, int64_t update) {
  return mixed(mixed(kSeed + ordinal * kWeyl) ^ static_cast<uint32_t>(update));
}

// The key of the 2**32 elements that share an index's upper half.
SOFIM_HD uint32_t stretch_key(uint32_t key, int64_t index) {
  return mixed(key ^ static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32));
}

// 16 random bits; `place` is the lower half of the index times kWeyl. They are the upper half of
// mixed(stretch + place), which the last step of mixed() leaves as it is.
template <class U>
SOFIM_HD U random_bits(U stretch, U place) {
  U x = stretch + place;
  x = x ^ (x >> 16);
  x = x * 0x7FEB352Du;
  x = x ^ (x >> 15);
  return (x * 0x846CA68Bu) >> 16;
}

// 8 random bits, likewise: the lowest ones of mixed(stretch + place). Weights are rounded by them, moments by the others.
template <class U>
SOFIM_HD U random_byte(U stretch, U place) {
  return mixed(stretch + place) & 0xFFu;
}

// 16 random bits, likewise, none of which random_bits() has: the lower half of mixed(stretch + place), whose less
// significant byte is random_byte(). Second moments are rounded by them.
template <class U>
SOFIM_HD U other_random_bits(U stretch, U place) {
  return mixed(stretch + place) & 0xFFFFu;
}

// A float32's bits, rounded to those of a bfloat16 (the lower half zero). The probability of rounding up in magnitude
// is the part that is cut off, in units of the last bit that is kept. An infinity has nothing to cut off and is
// unchanged. A NaN that arithmetic produced remains a NaN: it is a quiet one, whose mark is in the upper half.
template <class U>
SOFIM_HD U rounded_stochastically(U value, U random) {
  return where_number(value, value + random, value) & 0xFFFF0000u;
}

}  // namespace sofim
