#include <common/fields.h>
#include <nm24/bind.h>
#include <nm24/choose.h>
#include <pybind11/stl.h>

#include <tuple>

namespace py = pybind11;

namespace sparsebert::nm24 {

namespace {

// (tile, features, tokens, splits) of every solution, best first.
std::vector<std::tuple<int, int, int, int>> solutions(
    int element, int tokens, int in_features, int out_features, int rank, int sms, int shared_bytes
) {
    const Problem problem{static_cast<Element>(element), tokens, in_features, out_features, rank, sms, shared_bytes};
    check(problem);
    std::vector<std::tuple<int, int, int, int>> found;
    for (const Solution& solution : choose(problem)) {
        const Tile& tile = TILES[solution.tile];
        found.emplace_back(solution.tile, tile.features(), tile.tokens, solution.splits);
    }
    return found;
}

// Bytes of partial sums and number of counters that a solution needs.
std::pair<int64_t, int> workspace(int tokens, int out_features, int tile, int splits) {
    Problem problem{};
    problem.tokens = tokens;
    problem.in_features = 4;
    problem.out_features = out_features;
    const Solution solution{tile, splits};
    check(problem);
    check(solution);
    return {partial_bytes(problem, solution), counters(problem, solution)};
}

}  // namespace

void bind(py::module_& module, void (*run)(const Call&)) {
    const auto linear = [run](const py::kwargs& given) {
        Fields fields("nm24_linear", given);
        Call call{};
        read_product(fields, call);
        read_result(fields, call);
        call.solution = {fields.need<int>("tile"), fields.need<int>("splits")};
        call.metadata = fields.need<uint64_t>("metadata");
        call.columns = fields.get<uint64_t>("columns");
        call.partial = fields.get<uint64_t>("partial");
        call.arrivals = fields.get<uint64_t>("arrivals");
        fields.finish();
        check(call);
        run(call);
    };
    module.def(
        "nm24_solutions", &solutions, py::arg("element"), py::arg("tokens"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank"), py::arg("sms"), py::arg("shared_bytes"),
        "Every (tile, features, tokens, splits) worth measuring for a problem, the estimated best first."
    );
    module.def(
        "nm24_workspace", &workspace, py::arg("tokens"), py::arg("out_features"), py::arg("tile"), py::arg("splits"),
        "Bytes of partial sums and number of zeroed uint32 counters that a call needs."
    );
    module.def(
        "nm24_linear", linear,
        "y = activation(alpha x Wᵀ + b) + residual with a 2:4 weight on the sparse tensor cores.\n\n"
        "By keywords, those of Call. Addresses are those of device memory, 0 for what is not there. ValueError where\n"
        "something does not fit, RuntimeError with CUDA's text where the launch fails."
    );
}

}  // namespace sparsebert::nm24
