// See ../../cuda_runtime.h.
#pragma once

#include <c10/core/Device.h>

#include "../../cuda_runtime.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};

}  // namespace c10::cuda
