// The host side of the wgmma kernel alone: the Python side of sparsebert._C, with a launch that only notes the call.
#include <pybind11/pybind11.h>
#include <wgmma/bind.h>
#include <wgmma/boxes.h>

namespace py = pybind11;

namespace sparsebert::wgmma {
namespace {

Call noted{};

void note(const Call& call) { noted = call; }

int blocks(int sms) {
    Problem problem = noted.problem;
    problem.sms = sms;
    return blocks_of(problem, noted.solution);
}

// (address, element_bytes, inner, outer, row_bytes, box_inner, box_outer, swizzle).
py::tuple described(const Box& box) {
    return py::make_tuple(
        box.address, box.element_bytes, box.inner, box.outer, box.row_bytes, box.box_inner, box.box_outer,
        static_cast<int>(box.swizzle)
    );
}

py::dict boxes() {
    const Boxes found = boxes_of(noted);
    const std::pair<const char*, const Box&> every[] = {
        {"x", found.x}, {"weight", found.weight}, {"y", found.y}, {"t", found.t}, {"u", found.u},
    };
    py::dict there;
    for (const auto& [name, box] : every) {
        if (box.address) there[name] = described(box);
    }
    return there;
}

}  // namespace
}  // namespace sparsebert::wgmma

PYBIND11_MODULE(wgmma_host, module) {
    using namespace sparsebert::wgmma;
    bind(module, &note);
    module.def("blocks", &blocks, "Of the last call's grid on a device of so many multiprocessors.");
    module.def("boxes", &boxes, "Those of the last call that are there, by name.");
    py::list tiles;
    for (const Tile& tile : TILES) tiles.append(py::make_tuple(tile.features(), tile.tokens, tile.splits()));
    module.attr("TILES") = tiles;
}
