// What all kernels of products are given for the end of it: y = activation(alpha sums + b) + residual.
#pragma once

#include <common/activations.cuh>
#include <common/operands.h>

namespace sparsebert {

struct Epilogue {
    const void* bias;           // [out_features], or null
    const void* residual;       // [tokens][out_features], in y's type, or null
    const float* x_scale;       // [tokens], int8
    const float* scale;         // [out_features], int8
    const float* output_scale;  // [], of an int8 y
    void* y;                    // [tokens][out_features]
    float* y_scale;             // [tokens], of an int8 y
    int tokens;
    int in_features;
    int out_features;
    float alpha;
    Activation activation;
    Number y_number;
    Number bias_number;
};

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename Call>
Epilogue epilogue_of(const Call& call) {
    Epilogue found{};
    found.bias = at<const void>(call.bias);
    found.residual = at<const void>(call.residual);
    found.x_scale = at<const float>(call.x_scale);
    found.scale = at<const float>(call.scale);
    found.output_scale = at<const float>(call.output_scale);
    found.y = at<void>(call.y);
    found.y_scale = at<float>(call.y_scale);
    found.tokens = call.problem.tokens;
    found.in_features = call.problem.in_features;
    found.out_features = call.problem.out_features;
    found.alpha = call.alpha;
    found.activation = static_cast<Activation>(call.activation);
    found.y_number = call.y_number;
    found.bias_number = call.bias_number;
    return found;
}

}  // namespace sparsebert
