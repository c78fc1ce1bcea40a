#include <nm24/launch.cuh>

template void sparsebert::nm24::launch_as<sparsebert::Element::int8>(const Call&);
