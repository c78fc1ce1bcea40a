// The wgmma kernel on the CPU: what Python gives are addresses and sizes.
#include <pybind11/pybind11.h>

#include "wgmma_simulate.hpp"

namespace sparsebert::wgmma {

extern template void simulate_as<Element::half>(const Call&);
extern template void simulate_as<Element::bfloat16>(const Call&);
extern template void simulate_as<Element::int8>(const Call&);

namespace {

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

void linear(int element, int pattern, int tile, int blocks, int tokens, int in_features, int out_features, uint64_t x,
            int64_t x_stride, uint64_t weight, uint64_t positions, uint64_t bias, int bias_number, uint64_t x_scale,
            uint64_t scale, uint64_t output_scale, uint64_t y, int y_number, uint64_t y_scale, int activation,
            float alpha, bool tiled) {
    Arguments args{};
    args.positions = at<const uint8_t>(positions);
    args.bias = at<const void>(bias);
    args.x_scale = at<const float>(x_scale);
    args.scale = at<const float>(scale);
    args.output_scale = at<const float>(output_scale);
    args.y = at<void>(y);
    args.y_scale = at<float>(y_scale);
    args.tokens = tokens;
    args.in_features = in_features;
    args.out_features = out_features;
    args.blocks = blocks;
    args.alpha = alpha;
    args.activation = static_cast<Activation>(activation);
    args.y_number = static_cast<Number>(y_number);
    args.bias_number = static_cast<Number>(bias_number);
    args.tiled = tiled;
    const Call call{static_cast<Element>(element), static_cast<Pattern>(pattern), tile, x_stride, x, weight, args};
    switch (call.element) {
        case Element::half:
            return simulate_as<Element::half>(call);
        case Element::bfloat16:
            return simulate_as<Element::bfloat16>(call);
        case Element::int8:
            return simulate_as<Element::int8>(call);
    }
}

}  // namespace
}  // namespace sparsebert::wgmma

PYBIND11_MODULE(wgmma_linear, module) {
    module.def("linear", &sparsebert::wgmma::linear);
    pybind11::list tiles;
    for (const auto& tile : sparsebert::wgmma::TILES) {
        tiles.append(pybind11::make_tuple(tile.features(), tile.tokens));
    }
    module.attr("TILES") = tiles;
}
