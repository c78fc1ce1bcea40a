// The wgmma kernel that normalizes, on the CPU: the Python side of sparsebert._C with a launch that runs in the machine
// of simt.hpp.
#include <pybind11/pybind11.h>
#include <wgmma/layer_norm_arguments.cuh>
#include <wgmma/layer_norm_bind.h>

#include <utility>

#include "wgmma_simulate.hpp"

namespace sparsebert::wgmma {

simt::Order order = simt::Forward;

namespace {

// Of the GPU that the calls are for; few, so that blocks take several tiles.
int multiprocessors = 8;

void describe(simt::Machine& machine, const NormCall& call) {
    const Problem& problem = call.linear.problem;
    const int64_t tokens = problem.tokens, out = problem.out_features;
    describe(machine, call.linear);
    const auto add = [&](const char* name, uint64_t address, int64_t bytes, simt::Use use = simt::Input) {
        if (address) machine.buffer(name, at<const void>(address), bytes, use);
    };
    add("gamma", call.gamma, out * size_of(call.gamma_number));
    add("beta", call.beta, out * size_of(call.beta_number));
    add("q", call.q, tokens * out, simt::Output);
    add("q_scale", call.q_scale, tokens * 4, simt::Output);
    add("input_scale", call.input_scale, 4);
}

template <Element ELEMENT, Pattern PATTERN>
void simulate_kernel(const NormCall& call) {
    simt::Machine machine;
    describe(machine, call);
    const Solution& solution = call.linear.solution;
    const int blocks = blocks_of(call.linear.problem, solution);
    const Arguments args = arguments_of(call, blocks);
    const NormBoxes boxes = boxes_of(call);
    const Boxes& of = boxes.linear;
    const Maps maps{map_of(of.x), map_of(of.weight), map_of(of.y), map_of(of.t), map_of(of.u)};
    NormArguments norm = norm_arguments_of(call);
    norm.residual = map_of(boxes.residual);
    machine.launch({blocks}, THREADS, norm_shared_bytes(PATTERN),
                   [&] { wgmma_layer_norm_kernel<ELEMENT, PATTERN>(args, maps, norm); }, order, solution.cluster());
    for (const auto& [name, address] : {std::pair{"y", call.linear.y}, {"q", call.q}, {"q_scale", call.q_scale}}) {
        if (address && !machine.written(name)) throw std::runtime_error(std::string(name) + " is not all written");
    }
}

template <Element ELEMENT>
void simulate_as(const NormCall& call) {
    call.linear.problem.pattern == Pattern::dense ? simulate_kernel<ELEMENT, Pattern::dense>(call)
                                                  : simulate_kernel<ELEMENT, Pattern::nm24>(call);
}

void simulate(const NormCall& call) {
    NormCall own = call;
    own.linear.problem.sms = multiprocessors;
    with_element(own.linear.problem.element, [&](auto element) { simulate_as<decltype(element)::value>(own); });
}

}  // namespace
}  // namespace sparsebert::wgmma

PYBIND11_MODULE(wgmma_layer_norm, module) {
    using namespace sparsebert::wgmma;
    bind_layer_norm(module, &simulate);
    module.def("set_order", [](int seed) {
        order = seed == 0 ? simt::Forward : seed < 0 ? simt::Reversed : simt::shuffled(seed);
    }, "Clusters run one after the other: 0 forward, below 0 reversed, else shuffled by this seed.");
    module.def("set_sms", [](int sms) { multiprocessors = sms; });
}
