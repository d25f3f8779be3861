#include "cuda/launch.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <limits>

namespace sofim::cuda {

void Memory::serve(Task& task, at::Device device, void* stream) {
  const int64_t n = task.tensors, tiles = task.tiles;
  if (n != tensors_ || tiles != tiles_ || stream != stream_ || !numbers_.defined() || numbers_.device() != device) {
    const auto options = at::TensorOptions(at::kDouble).device(device);
    counters_ = at::zeros({n + 1}, options.dtype(at::kInt));
    numbers_ = at::empty({kSums * (n + tiles) + 4 * n + 2}, options);
    tensors_ = n;
    tiles_ = tiles;
    stream_ = stream;
    filled_.clear();
  }
  task.counters = static_cast<uint32_t*>(counters_.mutable_data_ptr());
  task.sums = numbers_.mutable_data_ptr<double>();
  task.slots = task.sums + kSums * n;
  task.corrections = task.slots + kSums * tiles;
  task.by_weight = task.corrections + n;
  task.by_gradient = task.by_weight + n;
  task.by_moment = task.by_gradient + n;
  task.gain = task.by_moment + n;
  task.skip = reinterpret_cast<bool*>(task.gain + 1);
}

void Memory::serve_table(Task& task, const std::vector<Row>& rows, const std::vector<Group>& groups, at::Device device,
                         void* stream) {
  task.rows = nullptr;
  task.groups = nullptr;
  if (fit(largest_arguments(), rows.size(), groups.size())) return;
  const Bytes first = bytes_of(rows);
  const void* const at = table(first, bytes_of(groups), device, stream);
  task.rows = static_cast<const Row*>(at);
  task.groups = reinterpret_cast<const Group*>(static_cast<const unsigned char*>(at) + first.size);
}

void Memory::serve_table(ScaledTask& task, const std::vector<Row>& rows, const std::vector<Scaling>& scalings,
                         at::Device device, void* stream) {
  task.rows = nullptr;
  task.scalings = nullptr;
  const Bytes first = bytes_of(rows), second = bytes_of(scalings);
  if (has_room<ScaledTask>(largest_arguments(), first.size + second.size)) return;
  const void* const at = table(first, second, device, stream);
  task.rows = static_cast<const Row*>(at);
  task.scalings = reinterpret_cast<const Scaling*>(static_cast<const unsigned char*>(at) + first.size);
}

const void* Memory::table(Bytes first, Bytes second, at::Device device, void* stream) {
  const size_t bytes = first.size + second.size;
  if (!table_.defined() || table_.numel() != static_cast<int64_t>(bytes) || filled_.empty()) {
    table_ = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(device));
  }
  void* const table = table_.mutable_data_ptr();
  const bool same = filled_.size() == bytes && std::memcmp(filled_.data(), first.data, first.size) == 0 &&
                    std::memcmp(filled_.data() + first.size, second.data, second.size) == 0;
  if (!same) {
    check(fill(table, first, second, stream));
    filled_.resize(bytes);
    std::memcpy(filled_.data(), first.data, first.size);
    std::memcpy(filled_.data() + first.size, second.data, second.size);
  }
  return table;
}

at::Tensor Memory::sums() const { return numbers_.narrow(0, 0, kSums * tensors_).view({kSums, tensors_}); }

void Packed::take(const StepTensors& tensors, size_t group_count) {
  rows.resize(tensors.size());
  groups.resize(group_count);
  // Also the padding between members: tables are compared byte by byte.
  if (group_count > 0) std::memset(static_cast<void*>(groups.data()), 0, group_count * sizeof(Group));
  uint64_t tiles = 0;
  bool float32 = true, narrow = true;
  for (size_t i = 0; i < rows.size(); ++i) {
    const TensorRow& r = tensors.records()[i];
    Row& row = rows[i];
    static_cast<TensorRow&>(row) = r;
    row.first = static_cast<uint32_t>(tiles);
    tiles += tiles_of(r.numel);
    float32 &= r.w_type == Type::float32;
    narrow &= is_narrow(r.w_type) && r.g_type == r.w_type;
  }
  TORCH_CHECK(tiles <= std::numeric_limits<int32_t>::max(), "sofim_fused: more elements than a launch can have");
  task.tensors = static_cast<uint32_t>(rows.size());
  task.group_count = static_cast<uint32_t>(group_count);
  task.tiles = static_cast<uint32_t>(tiles);
  form.types = float32 ? Types::float32 : narrow ? Types::narrow : Types::any;
}

DeviceScope::DeviceScope(at::Device device)
    : guard_(device),
      stream_(c10::cuda::getCurrentCUDAStream().stream()),
      captured_(c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {}

void check(int error) {
  TORCH_CHECK(error == 0, "sofim_fused: a kernel could not be launched: ", error_text(error));
}

}  // namespace sofim::cuda
