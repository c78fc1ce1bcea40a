// From a call to what the kernel is given.
#pragma once

#include <nm24/check.h>
#include <nm24/kernel.cuh>

namespace sparsebert::nm24 {

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

inline Arguments arguments_of(const Call& call) {
    Arguments args{};
    args.x = at<const void>(call.x);
    args.values = at<const Words4>(call.values);
    args.metadata = at<const Words4>(call.metadata);
    args.columns = at<const int32_t>(call.columns);
    args.t = at<const void>(call.t);
    args.u = at<const Words4>(call.u);
    args.bias = at<const void>(call.bias);
    args.residual = at<const void>(call.residual);
    args.x_scale = at<const float>(call.x_scale);
    args.scale = at<const float>(call.scale);
    args.output_scale = at<const float>(call.output_scale);
    args.y = at<void>(call.y);
    args.y_scale = at<float>(call.y_scale);
    args.partial = at<Words4>(call.partial);
    args.arrivals = at<uint32_t>(call.arrivals);
    args.x_stride = call.x_stride;
    args.tokens = call.problem.tokens;
    args.in_features = call.problem.in_features;
    args.out_features = call.problem.out_features;
    args.rank = call.problem.rank;
    args.splits = call.solution.splits;
    args.alpha = call.alpha;
    args.activation = static_cast<Activation>(call.activation);
    args.y_number = call.y_number;
    args.bias_number = call.bias_number;
    return args;
}

}  // namespace sparsebert::nm24
