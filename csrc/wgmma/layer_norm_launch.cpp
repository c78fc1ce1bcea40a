#include <common/device_guard.h>
#include <wgmma/layer_norm_launch.h>

namespace sparsebert::wgmma {

void launch_layer_norm(const NormCall& call) {
    const DeviceGuard guard(call.linear.device, "wgmma_layer_norm");
    with_element(call.linear.problem.element, [&](auto element) {
        launch_layer_norm_as<decltype(element)::value>(call);
    });
}

}  // namespace sparsebert::wgmma
