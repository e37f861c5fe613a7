// Paddle's collective interface over NCCL: collectives.cpp.
#pragma once

#include "paddle/phi/backends/device_ext.h"

namespace paddle_cuda_device {

void fill_collectives(C_DeviceInterface* to);

}  // namespace paddle_cuda_device
