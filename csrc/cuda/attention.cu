#include "cuda/attention.cuh"

#include "cuda/launch.cuh"

// Blocks on a processor at least: what the registers allow. Two blocks of width 64 fit 128 registers a
// thread, but for sm_80 the compiler spills a few of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
#define STREAM_R1_BLOCKS(head_dim) 1
#else
#define STREAM_R1_BLOCKS(head_dim) (128 / (head_dim))
#endif

namespace stream_r1::cuda {

#define STREAM_R1_ATTENTION(suffix, T, head_dim)                                                         \
  STREAM_R1_KERNEL(attention_##suffix##_##head_dim, kThreads, STREAM_R1_BLOCKS(head_dim), AttentionArgs, \
                   attention_block<T, head_dim>)

STREAM_R1_ATTENTION(bf16, Bf16, 64)
STREAM_R1_ATTENTION(bf16, Bf16, 128)
STREAM_R1_ATTENTION(fp16, Fp16, 64)
STREAM_R1_ATTENTION(fp16, Fp16, 128)

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_combine_bf16(const __grid_constant__ AttentionArgs args) {
  combine_parts<Bf16>(args);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_combine_fp16(const __grid_constant__ AttentionArgs args) {
  combine_parts<Fp16>(args);
}

namespace {

int64_t query_blocks(const AttentionArgs& args) {
  return args.table == nullptr ? blocks_for(args.queries, kQueries) : args.blocks;
}

}  // namespace

int32_t attention_splits(const AttentionArgs& args, int32_t processors) {
  const int64_t blocks = query_blocks(args) * args.batch * args.heads;
  const int64_t tiles = (args.segments[0].tokens + args.segments[1].tokens + kKeys - 1) / kKeys;
  if (args.table != nullptr || blocks == 0 || 2 * blocks > processors) return 1;
  // A part of less than four tiles costs more to combine than it saves.
  const int64_t wanted = processors / blocks, most = tiles / 4;
  return static_cast<int32_t>(wanted < most ? (wanted < 1 ? 1 : wanted) : (most < 1 ? 1 : most));
}

LaunchError launch_attention(const AttentionArgs& args, Stream stream) {
  const dim3 grid(query_blocks(args), args.batch * args.heads, args.splits);
  if (grid.x == 0 || grid.y == 0) return nullptr;
  const bool wide = args.head_dim == 128;
  const auto kernel = args.is_bfloat16 ? (wide ? attention_bf16_128 : attention_bf16_64)
                                       : (wide ? attention_fp16_128 : attention_fp16_64);
  const int shared = wide ? attention_shared_bytes<128>() : attention_shared_bytes<64>();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  kernel<<<grid, kThreads, shared, stream>>>(args);
  if (args.splits > 1) {
    const int64_t threads = int64_t(args.batch) * args.queries * args.heads * (args.head_dim / 8);
    const auto combine = args.is_bfloat16 ? attention_combine_bf16 : attention_combine_fp16;
    combine<<<blocks_for(threads, kThreads), kThreads, 0, stream>>>(args);
  }
  return launch_error();
}

}  // namespace stream_r1::cuda
