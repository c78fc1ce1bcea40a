// Kernels of csrc/wgmma/layer_norm.cuh for the GPU, one of each kind: for a test that reads what nvcc made of them.
#include <wgmma/layer_norm.cuh>

namespace sparsebert::wgmma {

#define KERNEL(element, pattern)                                                     \
    template __global__ void wgmma_layer_norm_kernel<Element::element, Pattern::pattern>( \
        const SB_PARAMETERS Arguments, const SB_PARAMETERS Maps, const SB_PARAMETERS NormArguments);

KERNEL(half, dense)
KERNEL(bfloat16, nm24)
KERNEL(int8, nm24)

}  // namespace sparsebert::wgmma
