// Renewing the sink of a streaming cache on raw pointers. Plain C++.

#pragma once

#include "common/views.h"
#include "cuda/launch.h"

namespace stream_r1::cuda {

struct RenewSinkArgs {
  void* storage;                           // [L, 2, B, T, H, D] contiguous, keys and values
  void *sink_k, *sink_v;                   // [L, B, S, H, D] contiguous; sink_v null: values stay as they are
  const float *evicted_cos, *evicted_sin;  // [D / 2], turn evicted keys to the sink's frames
  const float *window_cos, *window_sin;    // [D / 2], turn the sink to the window; null: it stays
  int64_t layers, batch, tokens, heads, sink_tokens, slot;  // slot: first token of the evicted chunk
  int32_t head_dim;
  bool averages;  // sink = keep * sink + add * evicted
  float keep, add;
  bool first;                     // the sink's frames still lie in `storage` alone
  Element element, sink_element;  // of storage, and of sink_k and sink_v: storage's or float32
};

LaunchError launch_renew_sink(const RenewSinkArgs& args, Stream stream);

}  // namespace stream_r1::cuda
