#include <wgmma/launch.cuh>

template void sparsebert::wgmma::launch_as<sparsebert::Element::half>(const Call&);
