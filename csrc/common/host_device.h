// Marks what CPU and CUDA code both call; nothing where a C++ compiler reads it.

#pragma once

#ifdef __CUDACC__
#define STREAM_R1_HOST_DEVICE __host__ __device__
#else
#define STREAM_R1_HOST_DEVICE
#endif
