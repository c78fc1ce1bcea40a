// From a call to what the kernel is given.
#pragma once

#include <nm24/check.h>
#include <nm24/kernel.cuh>

namespace sparsebert::nm24 {

inline Arguments arguments_of(const Call& call) {
    Arguments args{epilogue_of(call)};
    args.x = at<const void>(call.x);
    args.x_stride = call.x_stride;
    args.values = at<const Words4>(call.values);
    args.metadata = at<const Words4>(call.metadata);
    args.columns = at<const int32_t>(call.columns);
    args.t = at<const void>(call.t);
    args.u = at<const Words4>(call.u);
    args.partial = at<Words4>(call.partial);
    args.arrivals = at<uint32_t>(call.arrivals);
    args.rank = call.problem.rank;
    args.splits = call.solution.splits;
    return args;
}

}  // namespace sparsebert::nm24
