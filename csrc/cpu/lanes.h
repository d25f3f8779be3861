// Sixteen elements at a time: every instruction set uses sixteen lanes, so that sums have the same bits.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "step/element.h"

#if defined(__GNUC__)
#define SOFIM_NOINLINE __attribute__((noinline))
#else
#define SOFIM_NOINLINE
#endif

namespace sofim {

constexpr int kLanes = 16;

namespace {

using at::BFloat16;
using at::Half;

// Sixteen elements in as many vectors as they need. Loops over the vectors are fold expressions: a vector that is
// indexed by a variable would not be kept in a register.
template <class T>
struct Pack {
  using Part = at::vec::Vectorized<T>;
  static constexpr int kParts = kLanes / Part::size();
  using Indices = std::make_integer_sequence<int, kParts>;

  Part part[kParts];

  Pack() = default;
  SOFIM_HD explicit Pack(T x) : Pack(Indices(), [x](auto) { return Part(x); }) {}
  template <int... i, class F>
  SOFIM_HD Pack(std::integer_sequence<int, i...>, F f) : part{f(std::integral_constant<int, i>())...} {}

  static SOFIM_HD Pack load(const T* from) {
    return Pack(Indices(), [=](auto i) SOFIM_INLINE { return Part::loadu(from + i * Part::size()); });
  }
  SOFIM_HD void store(T* to) const { store(to, Indices()); }

 private:
  template <int... i>
  SOFIM_HD void store(T* to, std::integer_sequence<int, i...>) const {
    (part[i].store(to + i * Part::size()), ...);
  }
};

template <class T>
SOFIM_HD Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
  return Pack<T>(typename Pack<T>::Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] + b.part[i]; });
}
template <class T>
SOFIM_HD Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
  return Pack<T>(typename Pack<T>::Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] - b.part[i]; });
}
template <class T>
SOFIM_HD Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
  return Pack<T>(typename Pack<T>::Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] * b.part[i]; });
}

using Floats = Pack<float>;
using Doubles = Pack<double>;

}  // namespace

template <class T>
struct Ops<Pack<T>> {
  using V = Pack<T>;
  using Part = typename V::Part;
  using Indices = typename V::Indices;
  static SOFIM_HD V multiply_add(const V& a, const V& b, const V& c) {
    return V(Indices(), [&](auto i) SOFIM_INLINE { return at::vec::fmadd(a.part[i], b.part[i], c.part[i]); });
  }
  static SOFIM_HD V magnitude(const V& x) {
    return V(Indices(), [&](auto i) SOFIM_INLINE { return x.part[i].abs(); });
  }
  static SOFIM_HD V where_at_most(const V& a, const V& b, const V& x) {
    return V(Indices(), [&](auto i) SOFIM_INLINE {
      return Part::blendv(Part(T(0)), x.part[i], a.part[i] <= b.part[i]);
    });
  }
  static SOFIM_HD V divide(const V& a, const V& b) {
    return V(Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] / b.part[i]; });
  }
  static SOFIM_HD V root(const V& x) {
    return V(Indices(), [&](auto i) SOFIM_INLINE { return x.part[i].sqrt(); });
  }
  static SOFIM_HD V at_most(const V& x, const V& largest) {
    return V(Indices(), [&](auto i) SOFIM_INLINE { return at::vec::clamp_max(x.part[i], largest.part[i]); });
  }
  static SOFIM_HD V at_least(const V& x, const V& least) {
    return V(Indices(), [&](auto i) SOFIM_INLINE { return at::vec::clamp_min(x.part[i], least.part[i]); });
  }
};

namespace {

// Sixteen 32-bit integers, in vectors as wide as those of floats; the compiler lowers them to the instruction set.
struct Words {
  static constexpr int kParts = Floats::kParts;
  static constexpr int kSize = kLanes / kParts;
  using Indices = Floats::Indices;
  typedef uint32_t Part __attribute__((vector_size(sizeof(Floats::Part))));

  Part part[kParts];

  Words() = default;
  SOFIM_HD explicit Words(uint32_t x) : Words(Indices(), [x](auto) { return Part{} + x; }) {}
  template <int... i, class F>
  SOFIM_HD Words(std::integer_sequence<int, i...>, F f) : part{f(std::integral_constant<int, i>())...} {}
};

#define SOFIM_WORDS_OPERATOR(op)                                                                 \
  SOFIM_HD Words operator op(const Words& a, const Words& b) {                                   \
    return Words(Words::Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] op b.part[i]; }); \
  }                                                                                              \
  SOFIM_HD Words operator op(const Words& a, uint32_t b) {                                       \
    return Words(Words::Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] op b; });         \
  }
SOFIM_WORDS_OPERATOR(+)
SOFIM_WORDS_OPERATOR(*)
SOFIM_WORDS_OPERATOR(&)
SOFIM_WORDS_OPERATOR(^)
SOFIM_WORDS_OPERATOR(>>)
#undef SOFIM_WORDS_OPERATOR

SOFIM_HD Words where_number(const Words& x, const Words& a, const Words& b) {
  typedef float Reals __attribute__((vector_size(sizeof(Words::Part))));
  return Words(Words::Indices(), [&](auto i) SOFIM_INLINE {
    const Reals real = reinterpret_cast<Reals>(x.part[i]);
    return real == real ? a.part[i] : b.part[i];  // NOLINT(misc-redundant-expression): a NaN is not
  });
}

SOFIM_HD Words bits_of(const Floats& x) {
  return Words(Words::Indices(), [&](auto i) SOFIM_INLINE {
    Words::Part part;
    memcpy(&part, &x.part[i], sizeof part);
    return part;
  });
}

SOFIM_HD Floats from_bits(const Words& x) {
  return Floats(Floats::Indices(), [&](auto i) SOFIM_INLINE {
    Floats::Part part;
    memcpy(static_cast<void*>(&part), &x.part[i], sizeof part);
    return part;
  });
}

// 0, kWeyl, 2·kWeyl, ...: what each lane's index adds to `place` (random_bits).
SOFIM_HD Words lane_places() {
  return Words(Words::Indices(), [](auto i) SOFIM_INLINE {
    Words::Part part;
    for (int j = 0; j < Words::kSize; ++j) part[j] = static_cast<uint32_t>(i * Words::kSize + j) * kWeyl;
    return part;
  });
}

// Float64 copies, for products that are exact.

SOFIM_HD const Doubles& widened(const Doubles& x) { return x; }

SOFIM_HD Doubles widened(const Floats& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return Doubles(Doubles::Indices(), [&](auto i) SOFIM_INLINE {
    return Doubles::Part(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.part[0], i)));
  });
#elif defined(CPU_CAPABILITY_AVX2)
  return Doubles(Doubles::Indices(), [&](auto i) SOFIM_INLINE {
    return Doubles::Part(_mm256_cvtps_pd(_mm256_extractf128_ps(x.part[i / 2], i % 2)));
  });
#else
  float from[kLanes];
  double to[kLanes];
  x.store(from);
  for (int i = 0; i < kLanes; ++i) to[i] = from[i];
  return Doubles::load(to);
#endif
}

// Float64 rounded to nearest.
SOFIM_HD Floats narrowed(const Doubles& x) {
#if defined(CPU_CAPABILITY_AVX512)
  Floats result;
  result.part[0] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.part[0])), _mm512_cvtpd_ps(x.part[1]), 1);
  return result;
#elif defined(CPU_CAPABILITY_AVX2)
  return Floats(Floats::Indices(), [&](auto i) SOFIM_INLINE {
    return Floats::Part(_mm256_set_m128(_mm256_cvtpd_ps(x.part[2 * i + 1]), _mm256_cvtpd_ps(x.part[2 * i])));
  });
#else
  double from[kLanes];
  float to[kLanes];
  x.store(from);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<float>(from[i]);
  return Floats::load(to);
#endif
}

// Sixteen elements from memory, and to memory with rounding to nearest.

SOFIM_HD Floats load(const float* from) { return Floats::load(from); }
SOFIM_HD Doubles load(const double* from) { return Doubles::load(from); }
SOFIM_HD void store(float* to, const Floats& x) { x.store(to); }
SOFIM_HD void store(double* to, const Doubles& x) { x.store(to); }
SOFIM_HD void store(float* to, const Doubles& x) { narrowed(x).store(to); }

#if defined(CPU_CAPABILITY_AVX512)

SOFIM_HD __m256i load_bits(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
SOFIM_HD void store_bits(void* to, __m256i bits) { _mm256_storeu_si256(static_cast<__m256i*>(to), bits); }

// One shuffle of 16-bit words, instead of a conversion and a shift.
SOFIM_HD Floats load(const BFloat16* from) {
  const __m512i to_odd_words =
      _mm512_set_epi32(15 << 16, 14 << 16, 13 << 16, 12 << 16, 11 << 16, 10 << 16, 9 << 16, 8 << 16, 7 << 16, 6 << 16,
                       5 << 16, 4 << 16, 3 << 16, 2 << 16, 1 << 16, 0);
  Floats result;
  result.part[0] = _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, to_odd_words, _mm512_castsi256_si512(load_bits(from))));
  return result;
}
SOFIM_HD Floats load(const Half* from) {
  Floats result;
  result.part[0] = _mm512_cvtph_ps(load_bits(from));
  return result;
}
SOFIM_HD void store(BFloat16* to, const Floats& x) { store_bits(to, at::vec::cvtfp32_bf16(x.part[0])); }
SOFIM_HD void store(Half* to, const Floats& x) { store_bits(to, at::vec::cvtfp32_fp16(x.part[0])); }
// The upper halves, which are bfloat16 already.
SOFIM_HD void store_upper(BFloat16* to, const Words& x) {
  const __m512i odd_words = _mm512_set_epi32(31 << 16 | 29, 27 << 16 | 25, 23 << 16 | 21, 19 << 16 | 17, 15 << 16 | 13,
                                             11 << 16 | 9, 7 << 16 | 5, 3 << 16 | 1, 31 << 16 | 29, 27 << 16 | 25,
                                             23 << 16 | 21, 19 << 16 | 17, 15 << 16 | 13, 11 << 16 | 9, 7 << 16 | 5,
                                             3 << 16 | 1);
  store_bits(to, _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd_words, reinterpret_cast<__m512i>(x.part[0]))));
}

#elif defined(CPU_CAPABILITY_AVX2)

SOFIM_HD __m128i load_bits(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

SOFIM_HD Floats load(const BFloat16* from) {
  return Floats(Floats::Indices(), [=](auto i) SOFIM_INLINE {
    const __m256i bits = _mm256_cvtepu16_epi32(load_bits(from + 8 * i));
    return Floats::Part(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  });
}
SOFIM_HD Floats load(const Half* from) {
  return Floats(Floats::Indices(), [=](auto i) SOFIM_INLINE {
    return Floats::Part(_mm256_cvtph_ps(load_bits(from + 8 * i)));
  });
}
SOFIM_HD void store(BFloat16* to, const Floats& x) {
  at::vec::convert_from_float<BFloat16>(x.part[0], x.part[1]).store(to);
}
SOFIM_HD void store(Half* to, const Floats& x) { at::vec::convert_from_float<Half>(x.part[0], x.part[1]).store(to); }
SOFIM_HD void store_upper(BFloat16* to, const Words& x) {
  const __m256i low = _mm256_srli_epi32(reinterpret_cast<__m256i>(x.part[0]), 16);
  const __m256i high = _mm256_srli_epi32(reinterpret_cast<__m256i>(x.part[1]), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}

#else

template <class T>
SOFIM_NOINLINE Floats load_narrow(const T* from) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<float>(from[i]);
  return Floats::load(wide);
}
template <class T>
SOFIM_NOINLINE void store_narrow(T* to, const Floats& x) {
  float wide[kLanes];
  x.store(wide);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<T>(wide[i]);
}
SOFIM_HD Floats load(const BFloat16* from) { return load_narrow(from); }
SOFIM_HD Floats load(const Half* from) { return load_narrow(from); }
SOFIM_HD void store(BFloat16* to, const Floats& x) { store_narrow(to, x); }
SOFIM_HD void store(Half* to, const Floats& x) { store_narrow(to, x); }
SOFIM_HD void store_upper(BFloat16* to, const Words& x) {
  uint32_t word[kLanes];
  memcpy(word, x.part, sizeof word);
  for (int i = 0; i < kLanes; ++i) to[i].x = static_cast<uint16_t>(word[i] >> 16);
}

#endif

// Sixteen signed 16-bit integers, widened; and the lower halves of words, to memory. They are passed as elements of the
// tensor that they stand in for.
#if defined(CPU_CAPABILITY_AVX512)
SOFIM_HD Words load_signed(const BFloat16* from) {
  Words result;
  result.part[0] = reinterpret_cast<Words::Part>(_mm512_cvtepi16_epi32(load_bits(from)));
  return result;
}
#elif defined(CPU_CAPABILITY_AVX2)
SOFIM_HD Words load_signed(const BFloat16* from) {
  return Words(Words::Indices(), [=](auto i) SOFIM_INLINE {
    return reinterpret_cast<Words::Part>(_mm256_cvtepi16_epi32(load_bits(from + 8 * i)));
  });
}
#else
SOFIM_HD Words load_signed(const BFloat16* from) {
  uint32_t word[kLanes];
  for (int i = 0; i < kLanes; ++i) word[i] = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(from[i].x)));
  Words result;
  memcpy(result.part, word, sizeof word);
  return result;
}
#endif
SOFIM_HD void store_lower(BFloat16* to, const Words& x) { store_upper(to, x * 0x10000u); }

// Sixteen signed 8-bit integers in units of 256, widened; and the lowest bytes of words, to memory.
#if defined(CPU_CAPABILITY_AVX512)
SOFIM_HD Words load_signed(const int8_t* from) {
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  Words result;
  result.part[0] = reinterpret_cast<Words::Part>(_mm512_slli_epi32(wide, 8));
  return result;
}
SOFIM_HD void store_bytes(void* to, const Words& x) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x.part[0])));
}
#elif defined(CPU_CAPABILITY_AVX2)
SOFIM_HD Words load_signed(const int8_t* from) {
  return Words(Words::Indices(), [=](auto i) SOFIM_INLINE {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
    return reinterpret_cast<Words::Part>(_mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 8));
  });
}
SOFIM_HD void store_bytes(void* to, const Words& x) {
  const Words bytes = x & 0xFFu;
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(reinterpret_cast<__m256i>(bytes.part[0]), reinterpret_cast<__m256i>(bytes.part[1])), 0xD8);
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
SOFIM_HD Words load_signed(const int8_t* from) {
  uint32_t word[kLanes];
  for (int i = 0; i < kLanes; ++i) word[i] = static_cast<uint32_t>(static_cast<int32_t>(from[i])) << 8;
  Words result;
  memcpy(result.part, word, sizeof word);
  return result;
}
SOFIM_HD void store_bytes(void* to, const Words& x) {
  uint32_t word[kLanes];
  memcpy(word, x.part, sizeof word);
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(word[i]);
}
#endif

// widened(load(from)). A conversion straight from memory needs no shuffle, which would compete with the sums for the same
// unit of the processor.
template <class T>
SOFIM_HD Doubles load_widened(const T* from) {
  return widened(load(from));
}
#if defined(CPU_CAPABILITY_AVX512)
SOFIM_HD Doubles load_widened(const float* from) {
  return Doubles(Doubles::Indices(), [=](auto i) SOFIM_INLINE {
    return Doubles::Part(_mm512_cvtps_pd(_mm256_loadu_ps(from + 8 * i)));
  });
}
#elif defined(CPU_CAPABILITY_AVX2)
SOFIM_HD Doubles load_widened(const float* from) {
  return Doubles(Doubles::Indices(), [=](auto i) SOFIM_INLINE {
    return Doubles::Part(_mm256_cvtps_pd(_mm_loadu_ps(from + 4 * i)));
  });
}
#endif

// A sum of float64 products in sixteen lanes, which are always added up in the same order.
class LaneSums {
 public:
  SOFIM_HD LaneSums() : sums_(0.0) {}
  SOFIM_HD void add(const Doubles& a, const Doubles& b) { sums_ = Ops<Doubles>::multiply_add(a, b, sums_); }
  SOFIM_HD double total() const {
    double lane[kLanes];
    static_assert(kLanes == 16);
    sums_.store(lane);
    add_halves(lane, std::make_integer_sequence<int, 8>());
    add_halves(lane, std::make_integer_sequence<int, 4>());
    add_halves(lane, std::make_integer_sequence<int, 2>());
    return lane[0] + lane[1];
  }

 private:
  // Unrolled: tensors of a few hundred elements notice.
  template <int... i>
  static SOFIM_HD void add_halves(double* lane, std::integer_sequence<int, i...>) {
    ((lane[i] += lane[i + static_cast<int>(sizeof...(i))]), ...);
  }

  Doubles sums_;
};

}  // namespace
}  // namespace sofim
