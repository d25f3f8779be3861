// Moments in 8 bits: codes of torch.float8_e4m3fn with one scale per block of a row.
// sofim_fused/blockwise.py defines them. Each formula is written once, for a scalar and for a vector of elements, as in
// element.h; V is float or a vector of them.
#pragma once

#include "step/element.h"

namespace sofim {

constexpr int64_t kBlockSize = 128;  // elements with one scale; the last block of a row may have fewer

// 2 to an integer power from -149 to 127.
SOFIM_HD float power_of_two(int exponent) {
  return from_bits(exponent < -126 ? 1u << (exponent + 149) : static_cast<uint32_t>(exponent + 127) << 23);
}

// How a block is stored: code = rounded((m·lift)·inverse), unless it has a number that is not finite; then codes are 0.
// `lift` is 1, or a power of two where the block's numbers are near float32's least.
struct BlockScale {
  float scale, lift, inverse;
  bool finite;
};

// From the bits of the block's largest magnitude; those of a NaN are larger than all others.
SOFIM_HD BlockScale block_scale(uint32_t largest) {
  if (largest >= 0x7F800000u) return {from_bits(0x7FC00000u), 1.0f, 0.0f, false};
  const int lifted = largest < 0x21800000u ? 64 : 0;  // less than 2^-60
  const float lift = power_of_two(lifted);
  // The exponent of the largest; 1 more if its fraction is above that of 448 = 1.75·2^8.
  const int of_largest = static_cast<int>((bits_of(from_bits(largest) * lift) + 0x1FFFFFu) >> 23) - 127 - lifted;
  const int least = of_largest - 8;
  const int exponent = least < -140 ? -140 : least > 119 ? 119 : least;
  return {largest == 0 ? 0.0f : power_of_two(exponent), lift, power_of_two(-exponent - lifted), true};
}

// The same of a block of roots of second moments; from the bits of the largest. They need no lift.
SOFIM_HD BlockScale root_scale(uint32_t largest) {
  if (largest >= 0x7F800000u) return {from_bits(0x7FC00000u), 1.0f, 0.0f, false};
  const int least = static_cast<int>((largest + 0x1FFFFFu) >> 23) - 127 - 8;
  const int exponent = least < -65 ? -65 : least > 119 ? 119 : least;
  return {largest == 0 ? 0.0f : power_of_two(exponent), 1.0f, power_of_two(-exponent), true};
}

// a where x < limit, else b; all are below 2^31.
SOFIM_HD uint32_t where_below(uint32_t x, uint32_t limit, uint32_t a, uint32_t b) { return x < limit ? a : b; }
SOFIM_HD uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
SOFIM_HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The code of a number of at most 448 in magnitude, or limited to that; `random`: 16 bits for its stochastic rounding.
template <class V, class U>
SOFIM_HD U code_of(V x, U random) {
  const U bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  const U small = bits_of(from_bits(magnitude) + V(0x1p-6f)) + (0u - (8u << 20));
  const U shown = where_below(magnitude, 0x3C800000u, small, magnitude);  // 2^-6
  const U code = ((shown + random * 16u) >> 20) + (0u - 960u);
  return smaller(code, 0x7Eu) + ((bits >> 24) & 0x80u);
}

// The code of a root that is not negative and at most 448 times the scale; `inverse`: of the scale. Of its two neighbours
// that one is chosen whose square has the root's square as its mean over `random`, 16 bits.
template <class V, class U>
SOFIM_HD U code_of_root(V root, V inverse, U random) {
  const V x = root * inverse;
  const U bits = bits_of(x);
  // Below 2^-6, 2^-6 is added: then numbers have the distance that they have above.
  const V shift = from_bits(where_below(bits, 0x3C800000u, U(0x3C800000u), U(0u)));
  const U below = bits_of(x + shift) & 0xFFF00000u;
  const V a = from_bits(below) - shift;
  const V q = from_bits((below & 0x7F800000u) + (0u - (3u << 23)));  // from a to the next code's number
  const V chance = from_bits(random * 128u + 0x3F800000u) - V(1.0f - 0x1p-17f);  // (random + 1/2)/2^16
  const U up = bits_of(q * (a + a + q) * chance - (x - a) * (x + a)) >> 31;
  const U code = (below >> 20) + where_below(bits, 0x3C800000u, U(0u - 968u), U(0u - 960u)) + up;
  return larger(smaller(code, 0x7Eu), smaller(bits_of(root), 1u));
}

// The number of a code, as a float16 that is 256 times too small; a NaN for the codes that are none.
SOFIM_HD uint16_t half_of_code(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu, sign = static_cast<uint32_t>(code & 0x80u) << 8;
  return static_cast<uint16_t>(sign | (magnitude == 0x7Fu ? 0x7E00u : magnitude << 7));
}

}  // namespace sofim
