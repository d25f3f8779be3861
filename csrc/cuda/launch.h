// Launches of the kernels for PyTorch tensors: their arguments, memory, device and stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>

#include <vector>

#include "cuda/kernels.h"
#include "gather/step_tensors.h"

namespace sofim::cuda {

#if defined(SOFIM_EMULATED)
constexpr auto kDevice = c10::DeviceType::CPU;  // see tests/emulator
#else
constexpr auto kDevice = c10::DeviceType::CUDA;
#endif

// The bytes of a vector's elements.
template <class T>
Bytes bytes_of(const std::vector<T>& x) {
  return {x.data(), x.size() * sizeof(T)};
}

// Memory that launches need. It may be kept for the next launch on the same stream with the same sizes.
class Memory {
 public:
  // Allocates what is missing, and sets the task's addresses.
  void serve(Task& task, at::Device device, void* stream);
  // If rows and groups do not fit into arguments, sets the task's addresses to a table on the device. The table is
  // filled only if it does not have these rows and groups yet.
  void serve_table(Task& task, const std::vector<Row>& rows, const std::vector<Group>& groups, at::Device device,
                   void* stream);
  // The same of a step with a diagonal that adapts.
  void serve_table(ScaledTask& task, const std::vector<Row>& rows, const std::vector<Scaling>& scalings,
                   at::Device device, void* stream);
  // The last launch's sums: float64 [kSums, tensors].
  at::Tensor sums() const;

 private:
  // The address of a table with these bytes.
  const void* table(Bytes first, Bytes second, at::Device device, void* stream);

  at::Tensor counters_, numbers_, table_;
  int64_t tensors_ = -1, tiles_ = -1;
  void* stream_ = nullptr;
  std::vector<unsigned char> filled_;
};

// The arguments of a launch.
struct Packed {
  std::vector<Row> rows;
  std::vector<Group> groups;
  Task task{};
  Form form;

  // Packs the tensors, without the group of each, and makes `group_count` groups, all zero.
  void take(const StepTensors& tensors, size_t group_count);
};

// Makes a device the current one, and has its current stream, for launches.
class DeviceScope {
 public:
  explicit DeviceScope(at::Device device);
  void* stream() const { return stream_; }
  // Whether the stream is being captured in a graph, which needs memory of its own.
  bool captured() const { return captured_; }

 private:
  c10::cuda::CUDAGuard guard_;
  void* stream_;
  bool captured_;
};

// Raises an error if a launch returned one.
void check(int error);

}  // namespace sofim::cuda
