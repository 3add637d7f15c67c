// What a CPU build of PyTorch lacks so that fake tensors can be on "cuda": the device's guard, by
// which operators say where they run, its hooks, which the backward pass asks for the device, and
// the choice among its attention kernels.
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace c10::impl {

// One device, and one stream, on which events have always happened.
struct Guard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Device exchangeDevice(Device) const override { return stream().device(); }
  Device getDevice() const override { return stream().device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace c10::impl

namespace {

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
};

// PyTorch asks its registry for the hooks when it is imported, before this can be loaded: they are
// made where those of no device stand. Neither has members.
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
[[maybe_unused]] const Hooks* hooks =
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;

}  // namespace

namespace at::native {

// PyTorch's own choice on Hopper, as far as this project's calls go: flash attention of 16 bits
// without a mask, else the memory-efficient one.
int64_t attention_kernel(
    const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double,
    bool, std::optional<double>, bool) {
  const bool is_narrow = query.element_size() == 2;
  return static_cast<int64_t>(
      is_narrow && !mask ? SDPBackend::flash_attention : SDPBackend::efficient_attention);
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &attention_kernel)

}  // namespace at::native
