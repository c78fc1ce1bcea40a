// The 2:4 kernel on the CPU: the Python side of sparsebert._C with a launch that runs in the machine of simt.hpp.
#include <nm24/bind.h>
#include <pybind11/pybind11.h>

#include "simt.hpp"

namespace sparsebert::nm24 {

// What nm24_simulate.hpp declares, without its templates: they are instantiated in the source of each type of x.
simt::Order order = simt::Forward;
template <Element ELEMENT>
void simulate_as(const Call& call);

namespace {

void simulate(const Call& call) {
    with_element(call.problem.element, [&](auto element) { simulate_as<decltype(element)::value>(call); });
}

}  // namespace
}  // namespace sparsebert::nm24

PYBIND11_MODULE(nm24_linear, module) {
    using namespace sparsebert::nm24;
    bind(module, &simulate);
    module.def("set_order", [](int seed) {
        order = seed == 0 ? simt::Forward : seed < 0 ? simt::Reversed : simt::shuffled(seed);
    }, "Blocks run one after the other: 0 forward, below 0 reversed, else shuffled by this seed.");
    module.def("build_info", [] {
        pybind11::dict info;
        info["archs"] = pybind11::make_tuple("80", "90a", "120");
        return info;
    });
    pybind11::list tiles;
    for (const Tile& tile : TILES) tiles.append(pybind11::make_tuple(tile.features(), tile.tokens, tile.warps_k, tile.shared_bytes()));
    module.attr("TILES") = tiles;
}
