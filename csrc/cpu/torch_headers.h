// What the op files need of torch. It costs a compiler longer to read than the ops themselves, so setup.py
// precompiles it and puts it in front of every op file; nothing else includes it, hence no guard.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
