// Copies arguments that do not fit into one launch to a table in the device's memory.
#include "cuda/kernels.cuh"

namespace sofim::cuda {
namespace {

// A piece of the table.
struct Copy {
  unsigned long long* to;
  uint32_t words;
};

template <int size>
__global__ void __launch_bounds__(kThreads) copy(const __grid_constant__ Arguments<Copy, size> a) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  if (at < a.task.words) a.task.to[at] = reinterpret_cast<const unsigned long long*>(a.more)[at];
}

}  // namespace

int fill(void* table, Bytes first, Bytes second, void* stream) {
  constexpr size_t most = sizeof(Arguments<Copy, kMost>::more);
  const size_t bytes = first.size + second.size;
  // Those of the table's bytes [begin, end) that belong to `part`, which begins at `at` in the table.
  const auto cut = [](Bytes part, size_t at, size_t begin, size_t end) -> Bytes {
    const size_t from = begin > at ? begin : at, to = end < at + part.size ? end : at + part.size;
    if (from >= to) return {nullptr, 0};
    return {static_cast<const unsigned char*>(part.data) + (from - at), to - from};
  };
  for (size_t begin = 0; begin < bytes; begin += most) {
    const size_t end = bytes - begin < most ? bytes : begin + most;
    const Copy task{reinterpret_cast<unsigned long long*>(static_cast<unsigned char*>(table) + begin),
                    static_cast<uint32_t>((end - begin + 7) / 8)};
    const Bytes some = cut(first, 0, begin, end), more = cut(second, first.size, begin, end);
    const uint32_t blocks = (task.words + kThreads - 1) / kThreads;
    const int error = launch_kernel<Copy, kMost>(&copy<kMost>, false, blocks, task, some, more, stream);
    if (error != 0) return error;
  }
  return 0;
}

int largest_arguments() { return kMost; }

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace sofim::cuda
