#include <common/device_guard.h>
#include <nm24/launch.h>

namespace sparsebert::nm24 {

void launch(const Call& call) {
    const DeviceGuard guard(call.device, "nm24_linear");
    switch (call.problem.element) {
        case Element::half:
            return launch_as<Element::half>(call);
        case Element::bfloat16:
            return launch_as<Element::bfloat16>(call);
        case Element::int8:
            return launch_as<Element::int8>(call);
    }
}

}  // namespace sparsebert::nm24
