// The kernels of hopper_kernels.cuh for the GPU, each without mistakes: for tests that read what nvcc made of them.
#include "hopper_kernels.cuh"

namespace sparsebert::hopper {

template __global__ void tile_copy<Mistake::none>(const SB_PARAMETERS TensorMap, const SB_PARAMETERS TensorMap, int);
template __global__ void exchange<Fault::none>(const uint32_t*, uint32_t*);
template __global__ void handover<Fault::none>(const uint32_t*, uint32_t*);
template __global__ void multicast<Fault::none>(const SB_PARAMETERS TensorMap, Words4*, int);

#define PRODUCT(...)                                                            \
    template __global__ void products<Products<__VA_ARGS__>>(                   \
        const SB_PARAMETERS TensorMap, const SB_PARAMETERS TensorMap,           \
        const SB_PARAMETERS Products<__VA_ARGS__>::Parameters);
#define FORMS(type, n)             \
    PRODUCT(type, n, false, false) \
    PRODUCT(type, n, false, true)  \
    PRODUCT(type, n, true, false)  \
    PRODUCT(type, n, true, true)

FORMS(Half, 64)
FORMS(Half, 256)
FORMS(BFloat16, 64)
FORMS(BFloat16, 256)
FORMS(int8_t, 64)
FORMS(int8_t, 256)
PRODUCT(Half, 8, true, false)
PRODUCT(Half, 16, true, false)
PRODUCT(Half, 32, true, false)
PRODUCT(Half, 128, true, false)

}  // namespace sparsebert::hopper
