// See cuda_runtime.h.
#pragma once

#include <c10/util/Half.h>

inline c10::Half __ushort_as_half(unsigned short bits) { return c10::Half(bits, c10::Half::from_bits()); }
inline unsigned short __half_as_ushort(c10::Half x) { return x.x; }
inline float __half2float(c10::Half x) { return static_cast<float>(x); }
inline c10::Half __float2half_rn(float x) { return c10::Half(x); }
