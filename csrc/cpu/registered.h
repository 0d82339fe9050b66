// Ops as torch's dispatcher has them: how autograd calls what runs below it, on any device.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace stream_r1 {

// The op of this name, such as "stream_r1::gated_add". Looking it up takes as long as a small op: once.
template <class Signature>
auto registered(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace stream_r1
