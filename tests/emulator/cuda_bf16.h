// See cuda_runtime.h.
#pragma once

#include <c10/util/BFloat16.h>

inline unsigned short __bfloat16_as_ushort(c10::BFloat16 x) { return x.x; }
inline c10::BFloat16 __float2bfloat16_rn(float x) { return c10::BFloat16(x); }
