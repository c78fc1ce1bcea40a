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
    const auto linear = [run](
        int element,
        int tokens,
        int in_features,
        int out_features,
        int rank,
        int tile,
        int splits,
        uint64_t x,
        int64_t x_stride,
        uint64_t values,
        uint64_t metadata,
        uint64_t columns,
        uint64_t t,
        uint64_t u,
        uint64_t bias,
        int bias_number,
        uint64_t residual,
        uint64_t x_scale,
        uint64_t scale,
        uint64_t output_scale,
        uint64_t y,
        int y_number,
        uint64_t y_scale,
        uint64_t partial,
        uint64_t arrivals,
        int activation,
        float alpha,
        int device,
        uint64_t stream
    ) {
        Call call{};
        call.problem = {static_cast<Element>(element), tokens, in_features, out_features, rank, 0, 0};
        call.solution = {tile, splits};
        call.x = x;
        call.x_stride = x_stride;
        call.values = values;
        call.metadata = metadata;
        call.columns = columns;
        call.t = t;
        call.u = u;
        call.bias = bias;
        call.bias_number = static_cast<Number>(bias_number);
        call.residual = residual;
        call.x_scale = x_scale;
        call.scale = scale;
        call.output_scale = output_scale;
        call.y = y;
        call.y_number = static_cast<Number>(y_number);
        call.y_scale = y_scale;
        call.partial = partial;
        call.arrivals = arrivals;
        call.activation = activation;
        call.alpha = alpha;
        call.device = device;
        call.stream = stream;
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
        "nm24_linear", linear, py::kw_only(), py::arg("element"), py::arg("tokens"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank") = 0, py::arg("tile"), py::arg("splits"), py::arg("x"),
        py::arg("x_stride"), py::arg("values"), py::arg("metadata"), py::arg("columns") = 0, py::arg("t") = 0,
        py::arg("u") = 0, py::arg("bias") = 0, py::arg("bias_number") = static_cast<int>(Number::float32),
        py::arg("residual") = 0, py::arg("x_scale") = 0, py::arg("scale") = 0, py::arg("output_scale") = 0,
        py::arg("y"), py::arg("y_number"), py::arg("y_scale") = 0, py::arg("partial") = 0, py::arg("arrivals") = 0,
        py::arg("activation") = 0, py::arg("alpha") = 1.0f, py::arg("device"), py::arg("stream"),
        "y = activation(alpha x Wᵀ + b) + residual with a 2:4 weight on the sparse tensor cores.\n\n"
        "Addresses are those of device memory, 0 for what is not there. ValueError where something does not fit,\n"
        "RuntimeError with CUDA's text where the launch fails."
    );
}

}  // namespace sparsebert::nm24
