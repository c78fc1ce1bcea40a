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
    const auto linear = [run](
        int element,
        int pattern,
        int tokens,
        int in_features,
        int out_features,
        int rank,
        int parts,
        int tile,
        int sharing,
        int splits,
        uint64_t x,
        int64_t x_stride,
        uint64_t values,
        uint64_t positions,
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
        int activation,
        float alpha,
        int device,
        uint64_t stream
    ) {
        Call call{};
        const auto of = static_cast<Element>(element);
        call.problem = {of, static_cast<Pattern>(pattern), tokens, in_features, out_features, rank, parts, 0};
        call.solution = {tile, sharing, splits};
        call.x = x;
        call.x_stride = x_stride;
        call.values = values;
        call.positions = positions;
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
        call.activation = activation;
        call.alpha = alpha;
        call.device = device;
        call.stream = stream;
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
        "wgmma_linear", linear, py::kw_only(), py::arg("element"), py::arg("pattern"), py::arg("tokens"),
        py::arg("in_features"), py::arg("out_features"), py::arg("rank") = 0, py::arg("parts") = 1, py::arg("tile"),
        py::arg("sharing"), py::arg("splits"), py::arg("x"), py::arg("x_stride"), py::arg("values"),
        py::arg("positions") = 0, py::arg("t") = 0, py::arg("u") = 0, py::arg("bias") = 0,
        py::arg("bias_number") = static_cast<int>(Number::float32), py::arg("residual") = 0, py::arg("x_scale") = 0,
        py::arg("scale") = 0, py::arg("output_scale") = 0, py::arg("y"), py::arg("y_number"), py::arg("y_scale") = 0,
        py::arg("activation") = 0, py::arg("alpha") = 1.0f, py::arg("device"), py::arg("stream"),
        "y = activation(alpha (x Wᵀ + t uᵀ) + b) + residual on Hopper's wgmma, with a dense or a 2:4 weight.\n\n"
        "Addresses are those of device memory, 0 for what is not there. ValueError where something does not fit,\n"
        "RuntimeError where the device is not Hopper, or with CUDA's text where the launch fails."
    );
}

}  // namespace sparsebert::wgmma
