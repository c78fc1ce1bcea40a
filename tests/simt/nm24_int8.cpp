#include "nm24_simulate.hpp"

template void sparsebert::nm24::simulate_as<sparsebert::nm24::Element::int8>(const Call&);
