// Moments in 8 bits on a CPU: elements of a tensor are decoded into memory that stays in the cache, go through the same
// passes as moments in float32, and are encoded again. step/codes.h has the arithmetic of one element.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "step/codes.h"

namespace sofim {
namespace {

// Elements that are decoded at a time, up to a block more or less; a few thousand bytes for each tensor of the pass.
constexpr int64_t kDecoded = 2048 - kBlockSize;
// How far ahead codes are prefetched.
constexpr ptrdiff_t kCodesAhead = 2048;

SOFIM_HD Words larger(const Words& a, const Words& b) {
  return Words(Words::Indices(), [&](auto i) SOFIM_INLINE { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}
SOFIM_HD Words where_below(const Words& x, uint32_t limit, const Words& a, const Words& b) {
  return Words(Words::Indices(), [&](auto i) SOFIM_INLINE {
    typedef int32_t Signed __attribute__((vector_size(sizeof(Words::Part))));  // compared faster than unsigned ones
    return reinterpret_cast<Signed>(x.part[i]) < static_cast<int32_t>(limit) ? a.part[i] : b.part[i];
  });
}
SOFIM_HD Words smaller(const Words& a, uint32_t b) {
  return Words(Words::Indices(), [&](auto i) SOFIM_INLINE {
    const Words::Part all = Words::Part{} + b;
    return a.part[i] < all ? a.part[i] : all;
  });
}
SOFIM_HD uint32_t largest_lane(const Words& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_max_epu32(reinterpret_cast<__m512i>(x.part[0]));
#else
  uint32_t lane[kLanes];
  memcpy(lane, x.part, sizeof lane);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  }
  return lane[0];
#endif
}

// Sixteen codes from memory, as the numbers they stand for.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
SOFIM_HD Floats load_codes(const uint8_t* from) {
  const __m256i extended = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  __m256i half = _mm256_and_si256(_mm256_slli_epi16(extended, 7), _mm256_set1_epi16(static_cast<int16_t>(0xBF80)));
  const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x3F80));
  const __m256i none = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3F80));
  half = _mm256_or_si256(half, _mm256_and_si256(none, _mm256_set1_epi16(0x7E00)));
#if defined(CPU_CAPABILITY_AVX512)
  Floats result;
  result.part[0] = _mm512_cvtph_ps(half);
#else
  const auto part = [](__m128i x) { return Floats::Part(_mm256_cvtph_ps(x)); };
  Floats result;
  result.part[0] = part(_mm256_castsi256_si128(half));
  result.part[1] = part(_mm256_extracti128_si256(half, 1));
#endif
  return result * Floats(256.0f);
}
#else
SOFIM_NOINLINE Floats load_codes(const uint8_t* from) {
  Half half[kLanes];
  for (int i = 0; i < kLanes; ++i) half[i] = Half(half_of_code(from[i]), Half::from_bits());
  return load(half) * Floats(256.0f);
}
#endif

// What the random bits of sixteen elements are a hash of, wherever they begin.
SOFIM_NOINLINE Words places_from(uint32_t key, int64_t index) {
  uint32_t place[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    place[i] = stretch_key(key, index + i) + static_cast<uint32_t>(index + i) * kWeyl;
  }
  Words places;
  memcpy(places.part, place, sizeof place);
  return places;
}

// The codes of a tensor and its scales.
struct Coded {
  uint8_t* codes;
  float* scales;
};

// Whole blocks of a tensor, a part of it that is decoded at a time.
class Blocks {
 public:
  // The first block that begins at element `begin` or after it.
  Blocks(const Row& r, int64_t begin) : r_(r), row_(begin / r.row_size), column_(begin % r.row_size), begin_(begin) {
    const int64_t ahead = (kBlockSize - column_ % kBlockSize) % kBlockSize;
    if (column_ + ahead < r.row_size) {
      skip(ahead);
    } else if (column_ > 0) {
      skip(r.row_size - column_);
    }
    end_ = begin_;
  }

  int64_t begin() const { return begin_; }
  int64_t size() const { return end_ - begin_; }

  // Goes on to the next blocks of about kDecoded elements, of those that begin before element `limit`. False: there are
  // none.
  bool next(int64_t limit) {
    skip(end_ - begin_);
    if (begin_ >= limit) return false;
    end_ = each(limit, [](int64_t, int64_t, int64_t) {});
    return true;
  }

  // Decodes them: to `to`, with room for kDecoded + kBlockSize + kLanes elements.
  void decode(const Coded& from, float* to) const {
    each(end_, [&](int64_t at, int64_t size, int64_t block) SOFIM_INLINE {
      const Floats factor(from.scales[block]);
      float* here = to + (at - begin_);
      for (int64_t i = 0; i < size; i += kLanes) {
        // Behind the block's end are codes of the next one; behind the tensor's are none.
        if (at + i + kLanes <= r_.numel) {
          (load_codes(from.codes + at + i) * factor).store(here + i);
        } else {
          uint8_t few[kLanes] = {};
          memcpy(few, from.codes + at + i, static_cast<size_t>(r_.numel - at - i));
          (load_codes(few) * factor).store(here + i);
        }
      }
    });
  }

  // Asks for the codes of the blocks after these.
  void prefetch(const Coded& of) const {
    for (int64_t i = 0; i < size(); i += 64) ask_for(of.codes + begin_ + kCodesAhead, i);
  }

  // Encodes the moments, which are changed to what is stored if `as_stored`.
  void encode(const Coded& to, float* moments, bool as_stored) const {
    each(end_, [&](int64_t at, int64_t size, int64_t number) SOFIM_INLINE {
      const Target<1> target{{to.codes + at}, {moments + (at - begin_)}};
      const BlockScale scale[] = {block_scale(largest_of(target.values[0], size))};
      to.scales[number] = scale[0].scale;
      encode(target, scale, at, size, as_stored, [](const auto& x, const auto& by, const Words& places, auto store)
                                                     SOFIM_INLINE {
        store(0, moment_code(x(0), by[0], random_bits(places, Words(0u))));
      });
    });
  }

  // Encodes moments and roots of second moments, likewise: both are rounded by one hash.
  void encode(const Coded& to, float* moments, const Coded& roots_to, float* roots, bool as_stored) const {
    each(end_, [&](int64_t at, int64_t size, int64_t number) SOFIM_INLINE {
      const Target<2> target{{to.codes + at, roots_to.codes + at}, {moments + (at - begin_), roots + (at - begin_)}};
      const BlockScale scales[] = {block_scale(largest_of(target.values[0], size)),
                                   root_scale(largest_of(target.values[1], size))};
      to.scales[number] = scales[0].scale;
      roots_to.scales[number] = scales[1].scale;
      encode(target, scales, at, size, as_stored, [](const auto& x, const auto& by, const Words& places, auto store)
                                                      SOFIM_INLINE {
        const Words hash = mixed(places);
        store(0, moment_code(x(0), by[0], hash >> 16));
        store(1, code_of_root(x(1), by[1].inverse, hash & 0xFFFFu));
      });
    });
  }

 private:
  // Where the codes of a block go, and its numbers, of one tensor or two.
  template <int n>
  struct Target {
    uint8_t* codes[n];
    float* values[n];
  };
  struct Scaling {
    Floats lift, inverse, scale;
  };

  static SOFIM_HD Words moment_code(const Floats& x, const Scaling& by, const Words& random) {
    return code_of((x * by.lift) * by.inverse, random);
  }

  // The bits of the largest magnitude.
  static SOFIM_HD uint32_t largest_of(const float* values, int64_t size) {
    const int64_t whole = size / kLanes * kLanes;
    Words largest(0u);
    for (int64_t i = 0; i < whole; i += kLanes) largest = larger(largest, bits_of(load(values + i)) & 0x7FFFFFFFu);
    if (whole < size) {
      float few[kLanes] = {};
      memcpy(few, values + whole, static_cast<size_t>(size - whole) * sizeof *few);
      largest = larger(largest, bits_of(load(few)) & 0x7FFFFFFFu);
    }
    return largest_lane(largest);
  }

  // The codes of one block: calls `code` with a function that has sixteen numbers, with scales, the places of random bits,
  // and a function that takes codes; the argument of both functions says of which target.
  template <int n, class Code>
  SOFIM_HD void encode(const Target<n>& to, const BlockScale (&scales)[n], int64_t at, int64_t size, bool as_stored,
                       Code code) const {
    Scaling by[n];
    for (int k = 0; k < n; ++k) by[k] = {Floats(scales[k].lift), Floats(scales[k].inverse), Floats(scales[k].scale)};
    const int64_t whole = size / kLanes * kLanes;
    // All have one key, unless this is the one block that goes across a multiple of 2^32. Two loops: a call in the first
    // would leave no registers for its constants.
    const auto store_all = [&](auto place_of) SOFIM_INLINE {
      for (int64_t i = 0; i < whole; i += kLanes) {
        code([&](int k) SOFIM_INLINE { return load(to.values[k] + i); }, by, place_of(i),
             [&](int k, const Words& codes) SOFIM_INLINE {
               store_bytes(to.codes[k] + i, codes);
               if (as_stored) (load_codes(to.codes[k] + i) * by[k].scale).store(to.values[k] + i);
             });
      }
      if (whole == size) return;
      const size_t rest = static_cast<size_t>(size - whole);
      float few[n][kLanes] = {};
      for (int k = 0; k < n; ++k) memcpy(few[k], to.values[k] + whole, rest * sizeof(float));
      code([&](int k) SOFIM_INLINE { return load(few[k]); }, by, place_of(whole),
           [&](int k, const Words& codes) SOFIM_INLINE {
             uint8_t of_few[kLanes];
             store_bytes(of_few, codes);
             memcpy(to.codes[k] + whole, of_few, rest);
             if (!as_stored) return;
             (load_codes(of_few) * by[k].scale).store(few[k]);
             memcpy(to.values[k] + whole, few[k], rest * sizeof(float));
           });
    };
    if (((at ^ (at + size - 1)) >> 32) != 0) {
      store_all([&](int64_t i) { return places_from(r_.key, at + i); });
    } else {
      Words places = keyed_places(stretch_key(r_.key, at), at);
      store_all([&](int64_t) SOFIM_INLINE {
        const Words here = places;
        places = places + kLanes * kWeyl;
        return here;
      });
    }
    for (int k = 0; k < n; ++k) {
      if (scales[k].finite) continue;
      memset(to.codes[k], 0, static_cast<size_t>(size));
      if (as_stored) std::fill_n(to.values[k], size, scales[k].scale);
    }
  }

  // Over elements of a row, to the next one at its end.
  void skip(int64_t elements) {
    begin_ += elements;
    column_ += elements;
    while (column_ >= r_.row_size) {
      column_ -= r_.row_size;
      ++row_;
    }
  }

  // Calls `call` with the first element, the size and the number of each block of these; returns where they end.
  template <class Call>
  SOFIM_HD int64_t each(int64_t limit, Call call) const {
    const int64_t per_row = (r_.row_size + kBlockSize - 1) / kBlockSize;
    int64_t row = row_, column = column_, end = begin_;
    while (end < limit && end - begin_ < kDecoded) {
      const int64_t size = std::min(kBlockSize, r_.row_size - column);
      call(end, size, row * per_row + column / kBlockSize);
      end += size;
      column += size;
      if (column < r_.row_size) continue;
      column = 0;
      ++row;
    }
    return end;
  }

  const Row& r_;
  int64_t row_, column_;  // of the first element
  int64_t begin_, end_;
};

// Calls `run` for the blocks of a tensor that begin in elements [begin, begin + size): with a row that is like `r`, but
// whose moments are these blocks' alone, in float32; with the mode, their first element and their number; with the place
// of `count` sums, which are added to `sums`; and with a function that encodes the moments, and changes them to what is
// stored if its argument is true. Second moments that are codes go the same way, as their roots.
template <class Run>
void over_codes(const Row& r, const Mode& mode, int64_t begin, int64_t size, double* sums, int count, Run run) {
  alignas(64) float moments[kDecoded + kBlockSize + kLanes];
  alignas(64) float roots[kDecoded + kBlockSize + kLanes];
  const Coded first{static_cast<uint8_t*>(r.m), r.scales};
  Row decoded = r;
  decoded.m = moments;
  decoded.m_type = Type::float32;
  Coded second{nullptr, nullptr};
  Scale scale;
  if (r.scale != nullptr && r.scale->variance_scales != nullptr) {
    scale = *r.scale;
    second = {static_cast<uint8_t*>(scale.variance), scale.variance_scales};
    scale.variance = roots;
    scale.variance_scales = nullptr;
    scale.roots = true;
    decoded.scale = &scale;
  }
  const bool both = second.codes != nullptr;
  Blocks blocks(r, begin);
  if (count > 0) std::fill_n(sums, count, 0.0);
  while (blocks.next(begin + size)) {
    blocks.decode(first, moments);
    if (both) blocks.decode(second, roots);
    if (mode.prefetch) blocks.prefetch(first);
    if (mode.prefetch && both) blocks.prefetch(second);
    decoded.first = blocks.begin();
    double more[kSums] = {};  // in dots, that of mw may not be written
    run(static_cast<const Row&>(decoded), mode, blocks.begin(), blocks.size(), more, [&](bool as_stored) {
      both ? blocks.encode(first, moments, second, roots, as_stored) : blocks.encode(first, moments, as_stored);
    });
    for (int i = 0; i < count; ++i) sums[i] += more[i];
  }
}

}  // namespace
}  // namespace sofim
