#include "cuda/sink.cuh"

#include "cuda/launch.cuh"

namespace stream_r1::cuda {

#define STREAM_R1_RENEW_SINK(suffix, T, Kept) \
  STREAM_R1_KERNEL(renew_sink_##suffix, 256, 3, RenewSinkArgs, renew_sink<T, Kept>)

STREAM_R1_RENEW_SINK(fp32, float, float)
STREAM_R1_RENEW_SINK(bf16, Bf16, Bf16)
STREAM_R1_RENEW_SINK(fp16, Fp16, Fp16)
STREAM_R1_RENEW_SINK(bf16_fp32, Bf16, float)
STREAM_R1_RENEW_SINK(fp16_fp32, Fp16, float)

LaunchError launch_renew_sink(const RenewSinkArgs& args, Stream stream) {
  auto* kernel = STREAM_R1_BY_ELEMENT(args.element, renew_sink);
  if (args.element != args.sink_element)
    kernel = args.element == Element::bfloat16 ? renew_sink_bf16_fp32 : renew_sink_fp16_fp32;
  const int64_t packs = (args.head_dim + kPack - 1) / kPack;
  const int64_t threads = args.layers * args.batch * args.sink_tokens * args.heads * packs;
  if (threads == 0) return nullptr;
  kernel<<<blocks_for(threads, kSinkThreads), kSinkThreads, 0, stream>>>(args);
  return launch_error();
}

}  // namespace stream_r1::cuda
