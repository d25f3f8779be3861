// A record of a gradient, to notice later that it was changed. Its counterpart in Python is in_backward._Mark.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace sofim {

// What a gradient was like when it entered its moment. Most writes to a tensor raise its version counter; all-reduces,
// `.data` and NumPy do not, so that a few elements are compared too. The gradient is not kept alive.
class GradientRecord {
 public:
  void set(const at::Tensor& grad) {
    forget();
    if (!grad.defined()) return;
    is_set_ = true;
    grad_ = c10::weak_intrusive_ptr<c10::TensorImpl>(grad.getIntrusivePtr());
    version_ = version(grad);
    data_ = data(grad);
    elements_ = bits(grad, data_, shift_ = kFew);
    if (elements_ == 0) elements_ = bits(grad, data_, shift_ = kMany);  // many changes, such as scaling, keep zeros
  }

  // Whether this is the recorded gradient, unchanged as far as can be seen, or both are undefined. While the weak
  // reference is held, no other tensor can have its address.
  bool fits(const at::Tensor& grad) const {
    if (!grad.defined() || !is_set_) return grad.defined() == is_set_;
    return grad_._unsafe_get_target() == grad.unsafeGetTensorImpl() && version(grad) == version_ &&
           data(grad) == data_ && bits(grad, data_, shift_) == elements_;
  }

  void forget() {
    if (is_set_) grad_.reset();
    is_set_ = false;
  }

 private:
  static constexpr int kFew = 3, kMany = 6;  // powers of two

  // Parts of one larger block of memory share a counter, which also counts writes to other parts: it is not used there.
  static int64_t version(const at::Tensor& x) {
    if (x.is_inference() || (x.has_storage() && x.storage().nbytes() > x.nbytes())) return 0;
    return static_cast<int64_t>(x.unsafeGetTensorImpl()->version_counter().current_version());
  }

  // Null if elements cannot be read.
  static const void* data(const at::Tensor& x) {
    const bool readable = x.device().is_cpu() && x.layout() == at::kStrided && x.has_storage() &&
                          !x.key_set().has(c10::DispatchKey::Python) && x.numel() > 0;
    return readable ? x.const_data_ptr() : nullptr;
  }

  // A checksum of the bits of 2^shift elements at equal distances (or of all, if there are no more); 0 if all of these
  // bits are 0.
  static uint64_t bits(const at::Tensor& x, const void* data, int shift) {
    if (data == nullptr) return 0;
    switch (x.element_size()) {
      case 2: return sum<uint16_t>(x, data, shift);
      case 4: return sum<uint32_t>(x, data, shift);
      case 8: return sum<uint64_t>(x, data, shift);
      case 16: return sum<uint64_t, 2>(x, data, shift);
      default: return 0;
    }
  }

  template <class Word, int words = 1>
  static uint64_t sum(const at::Tensor& x, const void* data, int shift) {
    const auto* start = static_cast<const char*>(data);  // may not be aligned to an element
    const bool dense = x.is_non_overlapping_and_dense();  // every place in its memory is an element
    const int64_t size = x.numel();
    uint64_t result = 0;
    for (int64_t i = 0; i < int64_t{1} << shift; ++i) {
      int64_t offset = (size * i) >> shift;
      if (!dense) {
        offset = 0;
        for (int64_t d = 0; d < x.dim(); ++d) offset += ((x.size(d) * i) >> shift) * x.stride(d);
      }
      for (int j = 0; j < words; ++j) {
        Word word;
        std::memcpy(&word, start + (offset * words + j) * static_cast<int64_t>(sizeof(Word)), sizeof(Word));
        result += word * (kOdd + 2 * static_cast<uint64_t>(i + j));
      }
    }
    return result;
  }

  static constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

  c10::weak_intrusive_ptr<c10::TensorImpl> grad_{c10::intrusive_ptr<c10::TensorImpl>()};
  const void* data_ = nullptr;
  int64_t version_ = 0;
  uint64_t elements_ = 0;
  int shift_ = kFew;
  bool is_set_ = false;
};

}  // namespace sofim
