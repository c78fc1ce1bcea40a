// Makes a device current for a scope, as kernels are launched on the current one.
#pragma once

#include <common/errors.h>
#include <cuda_runtime_api.h>

namespace sparsebert {

class DeviceGuard {
  public:
    DeviceGuard(int device, const char* op) {
        check_cuda(cudaGetDevice(&before_), op, "reading the current device");
        if (device != before_) check_cuda(cudaSetDevice(device), op, "making the device current");
        changed_ = device != before_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace sparsebert
