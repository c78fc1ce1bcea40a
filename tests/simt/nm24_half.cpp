#include "nm24_simulate.hpp"

template void sparsebert::nm24::simulate_as<sparsebert::Element::half>(const Call&);
