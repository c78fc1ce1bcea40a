#include <common/device_guard.h>
#include <wgmma/launch.h>

namespace sparsebert::wgmma {

void launch(const Call& call) {
    const DeviceGuard guard(call.device, "wgmma_linear");
    with_element(call.problem.element, [&](auto element) { launch_as<decltype(element)::value>(call); });
}

}  // namespace sparsebert::wgmma
