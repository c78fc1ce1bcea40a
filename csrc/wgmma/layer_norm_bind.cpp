#include <common/fields.h>
#include <wgmma/layer_norm_bind.h>

namespace py = pybind11;

namespace sparsebert::wgmma {

void bind_layer_norm(py::module_& module, void (*run)(const NormCall&)) {
    const auto linear = [run](const py::kwargs& given) {
        Fields fields("wgmma_layer_norm", given);
        NormCall call{};
        read_product(fields, call.linear);
        call.linear.problem.pattern = fields.need<Pattern>("pattern");
        call.linear.problem.parts = 1;
        call.linear.solution = norm_solution(call.linear.problem);
        call.linear.positions = fields.get<uint64_t>("positions");
        call.gamma = fields.need<uint64_t>("gamma");
        call.gamma_number = fields.need<Number>("gamma_number");
        call.beta = fields.need<uint64_t>("beta");
        call.beta_number = fields.need<Number>("beta_number");
        call.eps = fields.need<float>("eps");
        call.q = fields.get<uint64_t>("q");
        call.q_scale = fields.get<uint64_t>("q_scale");
        call.input_scale = fields.get<uint64_t>("input_scale");
        fields.finish();
        check(call);
        run(call);
    };
    module.def(
        "wgmma_layer_norm", linear,
        "y = LayerNorm(alpha (x Wᵀ + t uᵀ) + b + residual) on Hopper's wgmma, with a dense or a 2:4 weight of at most\n"
        "1024 features, and with q and q_scale the same rows as int8.\n\n"
        "By keywords, those of NormCall. Addresses are those of device memory, 0 for what is not there. ValueError\n"
        "where something does not fit, RuntimeError where the device is not Hopper, or with CUDA's text where the\n"
        "launch fails."
    );
}

}  // namespace sparsebert::wgmma
