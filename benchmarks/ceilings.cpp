// What this processor can do at most: each loop does nothing but the one thing that it is the limit of.
// Compiled for the machine that it runs on (-march=native) by benchmarks/ceilings.py, which calls it through
// ctypes.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24;  // 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;  // 16 registers
#else
constexpr int kBytes = 16, kChains = 12;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int kTries = 8;  // the system may begin with two threads on one core
using Vector = float __attribute__((vector_size(kBytes)));

volatile float sink;

// The best of some tries of `work(thread)`, in seconds: from when all threads begin to when the last one
// ends.
template <typename Work>
double seconds(int threads, const Work& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> begins(threads), ends(threads);
  std::barrier together(threads);
  double best = 1e30;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i)
      pool.emplace_back([&, i] {
        together.arrive_and_wait();
        begins[i] = Clock::now();
        work(i);
        ends[i] = Clock::now();
      });
    for (std::thread& thread : pool) thread.join();
    const auto begin = *std::min_element(begins.begin(), begins.end());
    const auto end = *std::max_element(ends.begin(), ends.end());
    best = std::min(best, std::chrono::duration<double>(end - begin).count());
  }
  return best;
}

float total(const Vector& v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

struct Buffer {
  explicit Buffer(std::size_t bytes) : data(static_cast<char*>(std::aligned_alloc(4096, bytes))) {
    std::memset(data, 1, bytes);  // pages that are there
  }
  ~Buffer() { std::free(data); }
  char* data;
};

// Loads that nobody uses would be left out; this one looks used.
inline void used(Vector v) {
#if defined(__x86_64__)
  asm volatile("" ::"v"(v));
#else
  asm volatile("" ::"w"(v));
#endif
}

}  // namespace

extern "C" {

// float32 fused multiply-adds a second, in flops.
double fma_rate(int threads) {
  constexpr std::int64_t rounds = 1 << 23;
  const double time = seconds(threads, [](int thread) {
    Vector sums[kChains];
    const Vector a = Vector{} + 0.999f, b = Vector{} + 1e-3f * (1 + thread);
    for (Vector& sum : sums) sum = b;
    for (std::int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 24
      for (int j = 0; j < kChains; ++j) sums[j] = sums[j] * a + b;
    for (const Vector& sum : sums) sink = total(sum);
  });
  return 2.0 * kLanes * kChains * rounds * threads / time;
}

// Dot products of bfloat16 pairs into float32 a second, in flops; 0 where the processor has no such
// instruction.
double bf16_dot_rate([[maybe_unused]] int threads) {
#if defined(__AVX512BF16__)
  constexpr std::int64_t rounds = 1 << 23;
  const double time = seconds(threads, [](int) {
    __m512 sums[kChains];
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(-0.5f)), b = a;
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 24
      for (int j = 0; j < kChains; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, b);
    for (const __m512& sum : sums) sink = _mm512_reduce_add_ps(sum);
  });
  return 64.0 * kChains * rounds * threads / time;
#else
  return 0;
#endif
}

// The same on AMX tiles; 0 where there are none, or the system does not lend them.
double amx_rate([[maybe_unused]] int threads) {
#if defined(__AMX_BF16__) && defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // arch_prctl's
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 0;
  constexpr std::int64_t rounds = 1 << 21;
  const double time = seconds(threads, [](int) {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t columns[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.columns[i] = 64;
      shape.rows[i] = 16;
    }
    _tile_loadconfig(&shape);
    alignas(64) static const char zeros[1024] = {};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    for (std::int64_t i = 0; i < rounds; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
  });
  return 4.0 * 2 * 16 * 16 * 32 * rounds * threads / time;
#else
  return 0;
#endif
}

// Bytes read a second where all threads together read `bytes` again and again.
double read_rate(int threads, std::int64_t bytes) {
  const std::int64_t share = std::max<std::int64_t>(bytes / threads / 4096, 1) * 4096;
  const std::int64_t rounds = std::max<std::int64_t>((std::int64_t{1} << 28) / share, 4);
  const Buffer buffer(share * threads);
  const double time = seconds(threads, [&](int thread) {
    const auto* from = reinterpret_cast<const Vector*>(buffer.data + thread * share);
    for (std::int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 8
      for (std::int64_t j = 0; j < share / kBytes; ++j) used(from[j]);
  });
  return static_cast<double>(share) * threads * rounds / time;
}

// Bytes read and written a second by copies of half of `bytes` to the other half; the faster of usual stores
// and of those that pass the caches by.
double copy_rate(int threads, std::int64_t bytes) {
  const std::int64_t share = std::max<std::int64_t>(bytes / 2 / threads / 4096, 1) * 4096;
  const std::int64_t rounds = std::max<std::int64_t>((std::int64_t{1} << 27) / share, 4);
  const Buffer source(share * threads), target(share * threads);
  double best = 1e30;
  for (const bool past_caches : {false, true})
    best =
        std::min(best, seconds(threads, [&](int thread) {
                   const auto* from = reinterpret_cast<const Vector*>(source.data + thread * share);
                   auto* to = reinterpret_cast<Vector*>(target.data + thread * share);
                   for (std::int64_t i = 0; i < rounds; ++i) {
                     if (past_caches) {
#pragma GCC unroll 8
                       for (std::int64_t j = 0; j < share / kBytes; ++j)
#if defined(__AVX512F__)
                         _mm512_stream_ps(reinterpret_cast<float*>(to + j), from[j]);
#elif defined(__AVX__)
                            _mm256_stream_ps(reinterpret_cast<float*>(to + j), from[j]);
#else
                            to[j] = from[j];
#endif
                     } else {
#pragma GCC unroll 8
                       for (std::int64_t j = 0; j < share / kBytes; ++j) to[j] = from[j];
                     }
                     asm volatile("" ::: "memory");  // the next round is no repetition that can be left out
                   }
                 }));
  return 2.0 * share * threads * rounds / best;
}
}
