#include <common/device_guard.h>
#include <nm24/launch.h>

namespace sparsebert::nm24 {

void launch(const Call& call) {
    const DeviceGuard guard(call.device, "nm24_linear");
    with_element(call.problem.element, [&](auto element) { launch_as<decltype(element)::value>(call); });
}

}  // namespace sparsebert::nm24
