// Gathers and validates the tensors of a step for the native passes: pointers, types, one flat order of memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <vector>

#include "gather/tiling.h"
#include "step/adaptive.h"
#include "step/tensor_row.h"

namespace sofim {

// Whether a tensor's elements have addresses: it is strided, has memory, and its device has pointers (not meta or MPS).
bool has_addresses(const at::Tensor& x);

// How elements of a dtype are stored, those of a complex one as pairs. Returns false if no pass reads them.
bool storage_type(at::ScalarType dtype, Type& type);

// The strides of running means of columns whose order is that of a row of the dense tensor x; elements of a complex x are
// pairs.
c10::SmallVector<int64_t, 5> strides_of_columns(const at::Tensor& x);

// The running means of g² of one tensor and its diagonal; nullptr or undefined: it has none of that kind.
struct Variances {
  Diagonal diagonal;
  const at::Tensor *rows = nullptr, *cols = nullptr, *whole = nullptr;
  const at::Tensor* scales = nullptr;  // those of `whole`, if that is codes
};

class StepTensors {
 public:
  // `anywhere`: all tensors may be on any one device, the first one's. Otherwise all have to be on the CPU.
  // `codes`: moments may be codes, as they may be on the CPU in any case.
  explicit StepTensors(bool anywhere = false, bool codes = false) : anywhere_(anywhere), codes_(codes || !anywhere) {}
  void clear();

  // Adds one tensor of a step; it must outlive this step. `lost` and `step` may be undefined: then no lost bits are
  // kept, and no count of updates is needed. Returns nullptr; or, with nothing added, what is wrong, as a phrase for a
  // message. Tensors whose memory is not laid out like m's go through copies, which write_back() copies back; so do
  // lazily conjugated and negated ones.
  //
  // `variances`: of a tensor whose diagonal adapts, nullptr of others. They go through copies if their elements lie in
  // another order than w's. `scales`: those of m, if that is codes, else undefined.
  const char* add(const at::Tensor& w, const at::Tensor& g, const at::Tensor& m, const at::Tensor& scales,
                  const at::Tensor& lost, const at::Tensor& step, int64_t ordinal,
                  const Variances* variances = nullptr);

  // Whether memory that a step writes (w, m, scales, lost, step, running
  // means) may belong to another tensor as well: the ranges of addresses
  // overlap. Then no pass over all tensors at once is correct: two threads would write the same elements. Allowed are
  // gradients that share memory with each other, and a gradient that is its own w, element by element.
  //
  // The result is remembered from step to step, with addresses as numbers that are never dereferenced. A step with the
  // same addresses as the last one costs a comparison. New addresses of written tensors cost a sort. A new address of
  // a gradient costs a look at its storage: if that was allocated for this gradient alone, no other tensor shares it.
  bool shares_memory();

  // The number of tensors.
  size_t size() const { return members_.size(); }
  const Tiling& tiling() const { return tiling_; }
  const Row* records() const { return records_.data(); }
  Row& record(size_t i) { return records_[i]; }
  // The running means of each tensor, if their diagonals adapt.
  const VarianceRow* variances() const { return variances_.data(); }
  // The tensors' device; undefined if there are none.
  at::Device device() const { return device_; }
  uint32_t ordinal(size_t i) const { return records_[i].ordinal; }

  // The address of tensor i's count of updates, on the tensors' device.
  const int64_t* count(size_t i) const { return records_[i].step; }
  // The updates that tensor i has received. This, key_random_bits() and advance() are for tensors on the CPU.
  int64_t updates(size_t i) const { return *records_[i].step; }
  // Keys the random bits of each tensor by its update number: updates received plus `ahead`.
  void key_random_bits(int64_t ahead);
  // Counts one more update of every tensor.
  void advance();

  // Raise version counters, so that autograd notices what passes write; w includes lost bits.
  void bump_weights();
  void bump_moments();
  void bump_variances();
  void bump_steps();
  // Copies what the passes wrote into copies back to the tensors; `moments` includes running means.
  void write_back(bool weights, bool moments);
  // Keeps the tensors and their gradients alive until clear(), to be called and released with Python's lock held.
  void hold();

 private:
  struct Member {
    c10::TensorImpl *w, *g, *m, *scales, *lost, *step;
  };
  struct MeansOfMember {
    c10::TensorImpl *rows, *cols, *whole, *scales;  // nullptr: it has none of that kind
  };
  struct Copied {
    at::Tensor original, copy;
    bool moment;
  };
  // A range of addresses; empty: {0, 0}.
  struct Range {
    uintptr_t begin, end;
  };

  // add(), with a row of zeros to fill.
  const char* fill(Row& record, const at::Tensor& w, const at::Tensor& g, const at::Tensor& m,
                   const at::Tensor& scales, const at::Tensor& lost, const at::Tensor& step, int64_t ordinal,
                   const Variances* variances);
  // Whether a tensor is where it was in the last step, apart from its gradient.
  bool is_known(const Row& record, size_t place) const;
  static Range range_of(const c10::TensorImpl* x);
  // Sorts the ranges that are written; returns whether any two of them overlap.
  bool sort_written();
  // Whether a range overlaps one of those that were sorted, which do not overlap each other.
  bool is_written(const Range& range) const;

  const bool anywhere_, codes_;
  at::Device device_ = at::kCPU;
  // At least as many as members_. The first known_ of them are those of the last step until add() replaces them; their
  // addresses are only compared, never dereferenced.
  std::vector<Row> records_;
  size_t known_ = 0;
  std::vector<Member> members_;
  std::vector<MeansOfMember> means_;    // as many as members_, or none
  std::vector<VarianceRow> variances_;  // the same
  std::vector<VarianceRow> known_variances_;  // those of the last step, replaced in the same way
  std::vector<at::Tensor> kept_;  // copies that are only read
  std::vector<Copied> copied_;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> held_;
  Tiling tiling_;
  std::vector<size_t> unsure_;  // tensors whose gradients shares_memory() has to check
  std::vector<Range> sorted_;   // the ranges that are written, as last sorted
  bool moved_ = false;          // whether one of them has changed since
  bool overlap_ = false;        // whether two of sorted_ overlap
};

}  // namespace sofim
