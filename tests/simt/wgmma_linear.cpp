// The wgmma kernel on the CPU: the Python side of sparsebert._C with a launch that runs in the machine of simt.hpp.
#include <pybind11/pybind11.h>
#include <wgmma/bind.h>

#include "simt.hpp"

namespace sparsebert::wgmma {

// What wgmma_simulate.hpp declares, without its templates: they are instantiated in the source of each type of x.
simt::Order order = simt::Forward;
template <Element ELEMENT>
void simulate_as(const Call& call);

namespace {

// Of the GPU that the calls are for; few, so that blocks take several tiles.
int multiprocessors = 8;

void simulate(const Call& call) {
    Call own = call;
    own.problem.sms = multiprocessors;
    with_element(call.problem.element, [&](auto element) { simulate_as<decltype(element)::value>(own); });
}

}  // namespace
}  // namespace sparsebert::wgmma

PYBIND11_MODULE(wgmma_linear, module) {
    using namespace sparsebert::wgmma;
    bind(module, &simulate);
    module.def("set_order", [](int seed) {
        order = seed == 0 ? simt::Forward : seed < 0 ? simt::Reversed : simt::shuffled(seed);
    }, "Clusters run one after the other: 0 forward, below 0 reversed, else shuffled by this seed.");
    module.def("set_sms", [](int sms) { multiprocessors = sms; });
    module.def("build_info", [] {
        pybind11::dict info;
        info["archs"] = pybind11::make_tuple("80", "90a", "120");
        return info;
    });
    pybind11::list tiles;
    for (const Tile& tile : TILES) tiles.append(pybind11::make_tuple(tile.features(), tile.tokens));
    module.attr("TILES") = tiles;
}
