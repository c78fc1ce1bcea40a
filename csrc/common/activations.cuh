// The activations that an epilogue applies, in float. The numbers are those of sparsebert.ops.activations.
#pragma once

#include <common/intrinsics.cuh>

#include <cmath>

namespace sparsebert {

enum class Activation : int { none, gelu, gelu_tanh, relu };

SB_DEVICE float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::gelu:  // x Phi(x)
            return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case Activation::relu:  // as torch: NaN stays NaN
            return x < 0.0f ? 0.0f : x;
        default:
            return x;
    }
}

}  // namespace sparsebert
