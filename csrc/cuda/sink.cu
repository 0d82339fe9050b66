#include "cuda/sink.cuh"

#include "cuda/launch.cuh"

using stream_r1::Bf16;
using stream_r1::Element;
using stream_r1::Fp16;
using stream_r1::cuda::RenewSinkArgs;

#define STREAM_R1_RENEW_SINK(suffix, T, Kept)                           \
  extern "C" __global__ void __launch_bounds__(256, 3)                  \
      renew_sink_##suffix(const __grid_constant__ RenewSinkArgs args) { \
    stream_r1::cuda::renew_sink<T, Kept>(args);                         \
  }

STREAM_R1_RENEW_SINK(fp32, float, float)
STREAM_R1_RENEW_SINK(bf16, Bf16, Bf16)
STREAM_R1_RENEW_SINK(fp16, Fp16, Fp16)
STREAM_R1_RENEW_SINK(bf16_fp32, Bf16, float)
STREAM_R1_RENEW_SINK(fp16_fp32, Fp16, float)

namespace stream_r1::cuda {

LaunchError launch_renew_sink(const RenewSinkArgs& args, Stream stream) {
  using SinkKernel = void(RenewSinkArgs);
  SinkKernel* kernel =
      by_element<SinkKernel>(args.element, renew_sink_fp32, renew_sink_bf16, renew_sink_fp16);
  if (args.element != args.sink_element)
    kernel = args.element == Element::bfloat16 ? renew_sink_bf16_fp32 : renew_sink_fp16_fp32;
  const int64_t packs = (args.head_dim + kPack - 1) / kPack;
  const int64_t threads = args.layers * args.batch * args.sink_tokens * args.heads * packs;
  if (threads == 0) return nullptr;
  kernel<<<blocks_for(threads, kSinkThreads), kSinkThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
