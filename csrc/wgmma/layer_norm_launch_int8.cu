#include <wgmma/layer_norm_launch.cuh>

template void sparsebert::wgmma::launch_layer_norm_as<sparsebert::Element::int8>(const NormCall&);
