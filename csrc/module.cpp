// The Python module sparsebert._C. Importing it touches no driver: it works on a machine without a GPU.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include <common/errors.h>
#include <nm24/bind.h>
#include <nm24/launch.h>
#include <wgmma/bind.h>
#include <wgmma/launch.h>
#include <wgmma/layer_norm_bind.h>
#include <wgmma/layer_norm_launch.h>

// The text of a macro's value.
#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)

namespace py = pybind11;

namespace sparsebert {
namespace {

py::dict build_info() {
    // The build hands them over as they were asked for: "80;90a;120".
    const py::str archs(TEXT(SPARSEBERT_CUDA_ARCHS));
    py::dict info;
    info["archs"] = py::tuple(archs.attr("split")(";"));
    info["cudart"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    return info;
}

int device_count() {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "device_count", "cudaGetDeviceCount");
    return count;
}

}  // namespace
}  // namespace sparsebert

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of sparsebert, on raw pointers, sizes, strides and a stream.";
    module.def("build_info", &sparsebert::build_info,
               "What this was built for: archs, compute capabilities as in SPARSEBERT_CUDA_ARCHS, and cudart, the "
               "version of the CUDA runtime in it.");
    module.def("device_count", &sparsebert::device_count,
               "How many CUDA devices there are; RuntimeError without a driver or without a device.");
    sparsebert::nm24::bind(module, &sparsebert::nm24::launch);
    sparsebert::wgmma::bind(module, &sparsebert::wgmma::launch);
    sparsebert::wgmma::bind_layer_norm(module, &sparsebert::wgmma::launch_layer_norm);
}
