// Kernels of csrc/wgmma for the GPU, those with most sums of each kind: for a test that reads what nvcc made of them.
#include <wgmma/kernel.cuh>

namespace sparsebert::wgmma {

#define KERNEL(element, pattern, tile)                                                  \
    template __global__ void wgmma_linear_kernel<Element::element, Pattern::pattern, tile>( \
        const SB_PARAMETERS Arguments, const SB_PARAMETERS Maps);

KERNEL(bfloat16, dense, 3)
KERNEL(bfloat16, nm24, 3)
KERNEL(int8, nm24, 2)

}  // namespace sparsebert::wgmma
