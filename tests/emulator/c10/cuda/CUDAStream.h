// See ../../cuda_runtime.h: the one stream of the CPU, on which everything is done at once.
#pragma once

#include <c10/core/Device.h>

#include "../../cuda_runtime.h"

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(DeviceIndex = -1) { return {}; }

}  // namespace c10::cuda
