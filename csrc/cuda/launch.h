// Launches of the kernels for tensors of PyTorch's: their arguments, memory, device and stream.
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

// What a vector holds.
template <class T>
Bytes bytes_of(const std::vector<T>& x) {
  return {x.data(), x.size() * sizeof(T)};
}

// Memory that launches need. It may be kept for the next launch on the same stream with the same sizes.
class Memory {
 public:
  // Makes what is not there yet, and points the task to it.
  void serve(Task& task, at::Device device, void* stream);
  // Points the task to a table on the device, if rows and groups do not fit into arguments; it is filled unless it was
  // with the same.
  void serve_table(Task& task, const std::vector<Row>& rows, const std::vector<Group>& groups, at::Device device,
                   void* stream);
  // The last launch's sums: float64 [kSums, tensors].
  at::Tensor sums() const;

 private:
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

  // Takes over the tensors, but for the group of each, and makes so many groups, all zero.
  void take(const StepTensors& tensors, size_t group_count);
};

// Switches to a device, whose stream then says where launches go.
class DeviceScope {
 public:
  explicit DeviceScope(at::Device device);
  void* stream() const { return stream_; }
  // Whether the stream is captured in a graph, which keeps to itself whatever memory it is given.
  bool captured() const { return captured_; }

 private:
  c10::cuda::CUDAGuard guard_;
  void* stream_;
  bool captured_;
};

// Raises an error if a launch returned one.
void check(int error);

}  // namespace sofim::cuda
