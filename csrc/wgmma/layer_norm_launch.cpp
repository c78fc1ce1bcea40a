#include <common/device_guard.h>
#include <wgmma/layer_norm_launch.h>

namespace sparsebert::wgmma {

void launch_layer_norm(const NormCall& call) {
    const DeviceGuard guard(call.linear.device, "wgmma_layer_norm");
    switch (call.linear.problem.element) {
        case Element::half:
            return launch_layer_norm_as<Element::half>(call);
        case Element::bfloat16:
            return launch_layer_norm_as<Element::bfloat16>(call);
        case Element::int8:
            return launch_layer_norm_as<Element::int8>(call);
    }
}

}  // namespace sparsebert::wgmma
