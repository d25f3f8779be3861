// Gathers and validates the tensors of a step for the native passes: pointers, types, one flat order of memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "gather/tiling.h"
#include "step/tensor_row.h"

namespace sofim {

// Whether a tensor's elements have addresses: it is dense, has memory, and its device is one where pointers say where.
bool has_addresses(const at::Tensor& x);

class StepTensors {
 public:
  // `anywhere`: all tensors may lie on any one device, the first one's. Else all have to lie on the CPU.
  explicit StepTensors(bool anywhere = false) : anywhere_(anywhere) {}
  void clear();

  // Takes one tensor of a step; it must outlive this step. `kahan` and `step` may be undefined: no bits are kept, no
  // count is needed. Returns nullptr, or what is wrong, a phrase for a message; then nothing was added.
  // Tensors whose memory is not laid out like m's go through copies, which write_back() takes home; so do lazily
  // conjugated and negated gradients.
  const char* add(const at::Tensor& w, const at::Tensor& g, const at::Tensor& m, const at::Tensor& kahan,
                  const at::Tensor& step, int64_t ordinal);

  // Whether memory that a step writes (w, m, kahan, step) may be another tensor's as well: the ranges of addresses
  // overlap. Gradients may lie in each other's memory, and one in that of its own w, element by element. Then no pass
  // over all tensors at once is right: two threads would write the same elements.
  //
  // What was found stays known from step to step, as numbers, which point to nothing: a step whose addresses are those
  // of the last one costs a comparison. Other addresses of what is written cost a sort, other ones of a gradient a look
  // at its storage: memory that the allocator made for it alone is nobody else's.
  bool shares_memory();

  // The number of tensors.
  size_t size() const { return records_.size(); }
  const Tiling& tiling() const { return tiling_; }
  const Row* records() const { return records_.data(); }
  Row& record(size_t i) { return records_[i]; }
  // Where the tensors lie; undefined if there are none.
  at::Device device() const { return device_; }
  uint32_t ordinal(size_t i) const { return records_[i].ordinal; }

  // Where tensor i's count of updates lies, on the tensors' device.
  const int64_t* count(size_t i) const { return records_[i].step; }
  // The updates that tensor i has received. This, key_random_bits() and advance() are for tensors on the CPU.
  int64_t updates(size_t i) const { return *records_[i].step; }
  // Keys the random bits of each tensor by its update number: updates received plus `ahead`.
  void key_random_bits(int64_t ahead);
  // Counts one more update of every tensor.
  void advance();

  // Raise version counters, so that autograd notices what passes write; w includes kahan.
  void bump_weights();
  void bump_moments();
  void bump_steps();
  // Takes what the passes wrote into copies home.
  void write_back(bool weights, bool moments);
  // Keeps the gradients alive until clear().
  void hold_gradients();

 private:
  struct Member {
    c10::TensorImpl *w, *g, *m, *kahan, *step;
  };
  struct Copied {
    at::Tensor home, copy;
    bool moment;
  };
  // A range of addresses; empty: {0, 0}.
  struct Range {
    uintptr_t begin, end;
  };
  // Where a tensor lay in the last step; numbers, which point to nothing.
  struct Known {
    const void *w, *g, *m, *kahan, *step;
    int64_t numel;
    Type w_type, g_type, m_type;
  };

  static Range range_of(const c10::TensorImpl* x);
  // Sorts what is written; says whether any two of the ranges overlap.
  bool sort_written();
  // Whether a range overlaps one of those that were sorted, which do not overlap each other.
  bool is_written(const Range& range) const;

  const bool anywhere_;
  at::Device device_ = at::kCPU;
  std::vector<Row> records_;
  std::vector<Member> members_;
  std::vector<at::Tensor> kept_;  // copies that are only read
  std::vector<Copied> copied_;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_;
  Tiling tiling_;
  std::vector<Known> known_;     // compared and replaced as tensors are added
  std::vector<size_t> unsure_;   // tensors with gradients that shares_memory() has to look at
  std::vector<Range> sorted_;    // what is written, when something of it last moved
  bool moved_ = false;           // since it was sorted
  bool overlap_ = false;         // of what was sorted
};

}  // namespace sofim
