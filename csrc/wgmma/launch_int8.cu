#include <wgmma/launch.cuh>

template void sparsebert::wgmma::launch_as<sparsebert::Element::int8>(const Call&);
