#include "wgmma_simulate.hpp"

template void sparsebert::wgmma::simulate_as<sparsebert::Element::int8>(const Call&);
