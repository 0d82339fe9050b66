// Kernels as torch's dispatcher knows them; schemas, autograd and shapes for tracing are Python's.

#pragma once

#include <torch/csrc/stable/library.h>

// STREAM_R1_REGISTER(CPU, m) { m.impl("op", TORCH_BOX(&function)); }
//
// Every kernel is there twice. torch.ops.stream_r1 has the ops that everybody may call; autograd, tracing and
// torch's modes see them, which costs Python's time. torch.ops.stream_r1_unrecorded has the same ops where
// nothing watches: the public functions take them then (stream_r1_kernels/registration.py).
#define STREAM_R1_REGISTER(key, library) STREAM_R1_REGISTER_AS(key, library, C10_UID)
#define STREAM_R1_REGISTER_AS(key, library, id) STREAM_R1_REGISTER_WITH(key, library, id)
#define STREAM_R1_REGISTER_WITH(key, library, id)                                       \
  static void register_kernels_##id(torch::stable::detail::StableLibrary& library);     \
  STABLE_TORCH_LIBRARY_IMPL(stream_r1, key, m) { register_kernels_##id(m); }            \
  STABLE_TORCH_LIBRARY_IMPL(stream_r1_unrecorded, key, m) { register_kernels_##id(m); } \
  static void register_kernels_##id(torch::stable::detail::StableLibrary& library)
