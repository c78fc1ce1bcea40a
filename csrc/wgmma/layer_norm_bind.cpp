#include <wgmma/layer_norm_bind.h>

namespace py = pybind11;

namespace sparsebert::wgmma {

void bind_layer_norm(py::module_& module, void (*run)(const NormCall&)) {
    const auto linear = [run](
        int element,
        int pattern,
        int tokens,
        int in_features,
        int out_features,
        int rank,
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
        uint64_t gamma,
        int gamma_number,
        uint64_t beta,
        int beta_number,
        float eps,
        uint64_t y,
        int y_number,
        uint64_t q,
        uint64_t q_scale,
        uint64_t input_scale,
        float alpha,
        int device,
        uint64_t stream
    ) {
        NormCall call{};
        const auto of = static_cast<Element>(element);
        call.linear.problem = {of, static_cast<Pattern>(pattern), tokens, in_features, out_features, rank, 1, 0};
        call.linear.solution = norm_solution(call.linear.problem);
        call.linear.x = x;
        call.linear.x_stride = x_stride;
        call.linear.values = values;
        call.linear.positions = positions;
        call.linear.t = t;
        call.linear.u = u;
        call.linear.bias = bias;
        call.linear.bias_number = static_cast<Number>(bias_number);
        call.linear.residual = residual;
        call.linear.x_scale = x_scale;
        call.linear.scale = scale;
        call.linear.y = y;
        call.linear.y_number = static_cast<Number>(y_number);
        call.linear.alpha = alpha;
        call.linear.device = device;
        call.linear.stream = stream;
        call.gamma = gamma;
        call.gamma_number = static_cast<Number>(gamma_number);
        call.beta = beta;
        call.beta_number = static_cast<Number>(beta_number);
        call.eps = eps;
        call.q = q;
        call.q_scale = q_scale;
        call.input_scale = input_scale;
        check(call);
        run(call);
    };
    module.def(
        "wgmma_layer_norm", linear, py::kw_only(), py::arg("element"), py::arg("pattern"), py::arg("tokens"),
        py::arg("in_features"), py::arg("out_features"), py::arg("rank") = 0, py::arg("x"), py::arg("x_stride"),
        py::arg("values"), py::arg("positions") = 0, py::arg("t") = 0, py::arg("u") = 0, py::arg("bias") = 0,
        py::arg("bias_number") = static_cast<int>(Number::float32), py::arg("residual") = 0, py::arg("x_scale") = 0,
        py::arg("scale") = 0, py::arg("gamma"), py::arg("gamma_number"), py::arg("beta"), py::arg("beta_number"),
        py::arg("eps"), py::arg("y"), py::arg("y_number"), py::arg("q") = 0, py::arg("q_scale") = 0,
        py::arg("input_scale") = 0, py::arg("alpha") = 1.0f, py::arg("device"), py::arg("stream"),
        "y = LayerNorm(alpha (x Wᵀ + t uᵀ) + b + residual) on Hopper's wgmma, with a dense or a 2:4 weight of at most\n"
        "1024 features, and with q and q_scale the same rows as int8.\n\n"
        "Addresses are those of device memory, 0 for what is not there. ValueError where something does not fit,\n"
        "RuntimeError where the device is not Hopper, or with CUDA's text where the launch fails."
    );
}

}  // namespace sparsebert::wgmma
