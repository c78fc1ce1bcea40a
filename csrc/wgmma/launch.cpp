#include <common/device_guard.h>
#include <wgmma/launch.h>

namespace sparsebert::wgmma {

void launch(const Call& call) {
    const DeviceGuard guard(call.device, "wgmma_linear");
    switch (call.problem.element) {
        case Element::half:
            return launch_as<Element::half>(call);
        case Element::bfloat16:
            return launch_as<Element::bfloat16>(call);
        case Element::int8:
            return launch_as<Element::int8>(call);
    }
}

}  // namespace sparsebert::wgmma
