#include <common/fields.h>
#include <pybind11/stl.h>
#include <wgmma/bind.h>
#include <wgmma/choose.h>

#include <tuple>

namespace py = pybind11;

namespace sparsebert::wgmma {

namespace {

// (tile, features, tokens, sharing, splits, clocks) of every solution, best first.
std::vector<std::tuple<int, int, int, int, int, double>> solutions(
    int element, int pattern, int tokens, int in_features, int out_features, int rank, int parts, int sms
) {
    const auto of = static_cast<Element>(element);
    const Problem problem{of, static_cast<Pattern>(pattern), tokens, in_features, out_features, rank, parts, sms};
    check(problem);
    std::vector<std::tuple<int, int, int, int, int, double>> found;
    for (const Solution& solution : choose(problem)) {
        const auto [number, sharing, splits] = solution;
        const Tile& tile = TILES[number];
        found.emplace_back(number, tile.features(), tile.tokens, sharing, splits, clocks(problem, solution));
    }
    return found;
}

}  // namespace

void bind(py::module_& module, void (*run)(const Call&)) {
    const auto linear = [run](const py::kwargs& given) {
        Fields fields("wgmma_linear", given);
        Call call{};
        read_product(fields, call);
        read_result(fields, call);
        call.problem.pattern = fields.need<Pattern>("pattern");
        call.problem.parts = fields.get("parts", 1);
        call.solution = {fields.need<int>("tile"), fields.need<int>("sharing"), fields.need<int>("splits")};
        call.positions = fields.get<uint64_t>("positions");
        fields.finish();
        check(call);
        run(call);
    };
    module.def(
        "wgmma_solutions", &solutions, py::arg("element"), py::arg("pattern"), py::arg("tokens"),
        py::arg("in_features"), py::arg("out_features"), py::arg("rank"), py::arg("parts"), py::arg("sms"),
        "Every (tile, features, tokens, sharing, splits, clocks) worth measuring for a problem, the estimated best\n"
        "first: clocks of a multiprocessor that one call takes by that estimate."
    );
    module.def(
        "wgmma_linear", linear,
        "y = activation(alpha (x Wᵀ + t uᵀ) + b) + residual on Hopper's wgmma, with a dense or a 2:4 weight.\n\n"
        "By keywords, those of Call. Addresses are those of device memory, 0 for what is not there. ValueError where\n"
        "something does not fit, RuntimeError where the device is not Hopper, or with CUDA's text where the launch\n"
        "fails."
    );
}

}  // namespace sparsebert::wgmma
