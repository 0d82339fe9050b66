// Small kernels that use what real ones use. FAULT 0 is right; every other number plants one fault.
#include <cuda_bf16.h>
#include <cstdint>

using bf16 = __nv_bfloat16;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void copy16(void* to, const void* from, bool used) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(used ? 16 : 0));
}

__device__ void commit() { asm volatile("cp.async.commit_group;"); }

template <int N>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

__device__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

// c = a + b. Fault 1: the bound is off by one.
template <int FAULT>
__global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n + (FAULT == 1)) c[i] = a[i] + b[i];
}

// Sum of each block's 256 numbers. Fault 1: a missing barrier.
template <int FAULT>
__global__ void block_sum(const float* x, float* sums, int n) {
  __shared__ float part[8];
  int i = blockIdx.x * 256 + threadIdx.x;
  float sum = i < n ? x[i] : 0.f;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  if (FAULT != 1) __syncthreads();
  if (threadIdx.x < 8) {
    sum = part[threadIdx.x];
    for (int step = 4; step > 0; step /= 2) sum += __shfl_down_sync(0xff, sum, step);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

// y = x^T in tiles of 32 x 32, 32 x 8 threads. Fault 1: a missing barrier. Fault 2: it writes past the ragged
// edge.
template <int FAULT>
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  __shared__ float tile[32][33];
  int column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8)
    if (column < columns && row + i < rows)
      tile[threadIdx.y + i][threadIdx.x] = x[(row + i) * columns + column];
  if (FAULT != 1) __syncthreads();
  int to_column = blockIdx.y * 32 + threadIdx.x, to_row = blockIdx.x * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8)
    if ((FAULT == 2 || to_column < rows) && to_row + i < columns)
      y[(to_row + i) * rows + to_column] = tile[threadIdx.x][threadIdx.y + i];
}

// y = x reversed within each run of 1024 bf16, through three stages of shared memory. n is a multiple of
// 1024. Fault 1: wrong wait count. Fault 2: the stage is filled again with no barrier. Fault 3: the stage
// before is read.
template <int FAULT>
__global__ void pipelined_reverse(const bf16* x, bf16* y, int n) {
  __shared__ __align__(16) bf16 stage[3][1024];
  int runs = n / 1024;
  auto fetch = [&](int run) {
    if (run < runs) copy16(&stage[run % 3][threadIdx.x * 8], x + run * 1024 + threadIdx.x * 8, true);
    commit();
  };
  fetch(0);
  fetch(1);
  for (int run = 0; run < runs; run++) {
    wait<FAULT == 1 ? 2 : 1>();
    if (FAULT != 2) __syncthreads();
    fetch(run + 2);
    const bf16* s = stage[(run + (FAULT == 3 ? 2 : 0)) % 3];
    for (int i = 0; i < 8; i++) y[run * 1024 + threadIdx.x * 8 + i] = s[1023 - threadIdx.x * 8 - i];
  }
}

// A row of 32 bf16 is 4 chunks of 16 bytes; the swizzle spreads a column of chunks over the banks.
__device__ int swizzled(int row, int chunk) { return row * 32 + (chunk ^ (row / 2 % 4)) * 8; }

// c[m, n] = a[m, k] b[n, k]^T, float32; 64 x 64 tiles, 4 warps of 16 rows; k is a multiple of 32.
// Fault 1: ldmatrix without the swizzle. Fault 2: no barrier before the tile is filled again.
template <int FAULT>
__global__ void matmul(const bf16* a, const bf16* b, float* c, int m, int n, int k) {
  __shared__ __align__(128) bf16 sa[64 * 32], sb[64 * 32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  float sum[8][4] = {};
  for (int k0 = 0; k0 < k; k0 += 32) {
    for (int i = threadIdx.x; i < 64 * 4; i += 128) {
      int row = i / 4, chunk = i % 4;
      bool in_a = m0 + row < m, in_b = n0 + row < n;
      copy16(sa + swizzled(row, chunk), a + (size_t)(in_a ? m0 + row : 0) * k + k0 + chunk * 8, in_a);
      copy16(sb + swizzled(row, chunk), b + (size_t)(in_b ? n0 + row : 0) * k + k0 + chunk * 8, in_b);
    }
    commit();
    wait<0>();
    __syncthreads();
    for (int kk = 0; kk < 2; kk++) {
      uint32_t fa[4];
      int row = warp * 16 + lane % 16, chunk = kk * 2 + lane / 16;
      load_matrices(fa, FAULT == 1 ? sa + row * 32 + chunk * 8 : sa + swizzled(row, chunk));
      for (int j = 0; j < 4; j++) {
        uint32_t fb[4];
        load_matrices(fb, sb + swizzled(j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
        multiply(sum[2 * j], fa, fb[0], fb[1]);
        multiply(sum[2 * j + 1], fa, fb[2], fb[3]);
      }
    }
    if (FAULT != 2) __syncthreads();
  }
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 4; i++) {
      int row = m0 + warp * 16 + lane / 4 + i / 2 * 8, column = n0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[(size_t)row * n + column] = sum[j][i];
    }
}

// Causal attention over 32 channels: q, k, v, o [length, 32]; one block for 64 queries, keys 32 at a time.
// Fault 1: no rescale. Fault 2: the mask is off by one. Fault 3: wrong wait. Fault 4: the last barrier is
// missing.
template <int FAULT>
__global__ void attention(const bf16* q, const bf16* k, const bf16* v, float* o, int length, float scale) {
  __shared__ __align__(128) bf16 sq[64 * 32], sk[2][32 * 32], sv[2][32 * 32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q0 = blockIdx.x * 64;
  auto fetch = [&](bf16* to, const bf16* from, int row0, int rows) {
    for (int i = threadIdx.x; i < rows * 4; i += 128) {
      bool in = row0 + i / 4 < length;
      copy16(to + swizzled(i / 4, i % 4), from + (size_t)(in ? row0 + i / 4 : 0) * 32 + i % 4 * 8, in);
    }
  };
  int steps = (min(q0 + 64, length) + 31) / 32;
  fetch(sq, q, q0, 64);
  fetch(sk[0], k, 0, 32);
  fetch(sv[0], v, 0, 32);
  commit();
  uint32_t fq[2][4];
  float out[4][4] = {}, highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      fetch(sk[(step + 1) % 2], k, (step + 1) * 32, 32);
      fetch(sv[(step + 1) % 2], v, (step + 1) * 32, 32);
    }
    commit();
    wait<FAULT == 3 ? 2 : 1>();
    __syncthreads();
    if (step == 0)
      for (int kk = 0; kk < 2; kk++)
        load_matrices(fq[kk], sq + swizzled(warp * 16 + lane % 16, kk * 2 + lane / 16));
    float score[4][4] = {};
    for (int kk = 0; kk < 2; kk++)
      for (int j = 0; j < 2; j++) {
        uint32_t fk[4];
        load_matrices(fk, sk[step % 2] + swizzled(j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
        multiply(score[2 * j], fq[kk], fk[0], fk[1]);
        multiply(score[2 * j + 1], fq[kk], fk[2], fk[3]);
      }
    float before[2] = {highest[0], highest[1]};
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 4; i++) {
        int row = q0 + warp * 16 + lane / 4 + i / 2 * 8, column = step * 32 + j * 8 + lane % 4 * 2 + i % 2;
        bool visible = column <= row + (FAULT == 2) && column < length;
        score[j][i] = visible ? score[j][i] * scale : -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], score[j][i]);
      }
    for (int r = 0; r < 2; r++) {
      for (int step = 1; step <= 2; step *= 2)
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffff, highest[r], step));
      float shrink = exp2f(before[r] - highest[r]);
      total[r] *= shrink;
      if (FAULT != 1)
        for (int j = 0; j < 4; j++) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
    }
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 4; i++) {
        score[j][i] = exp2f(score[j][i] - highest[i / 2]);
        total[i / 2] += score[j][i];
      }
    for (int kk = 0; kk < 2; kk++) {
      float (&low)[4] = score[2 * kk], (&high)[4] = score[2 * kk + 1];
      uint32_t p[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]),
                       pack(high[2], high[3])};
      for (int j = 0; j < 2; j++) {
        uint32_t fv[4];
        load_matrices_transposed(fv, sv[step % 2] + swizzled(kk * 16 + lane % 16, j * 2 + lane / 16));
        multiply(out[2 * j], p, fv[0], fv[1]);
        multiply(out[2 * j + 1], p, fv[2], fv[3]);
      }
    }
    if (FAULT != 4) __syncthreads();
  }
  for (int r = 0; r < 2; r++) {
    for (int step = 1; step <= 2; step *= 2) total[r] += __shfl_xor_sync(0xffffffff, total[r], step);
    int row = q0 + warp * 16 + lane / 4 + r * 8;
    for (int j = 0; j < 4 && row < length; j++)
      for (int i = 0; i < 2; i++)
        o[(size_t)row * 32 + j * 8 + lane % 4 * 2 + i] = out[j][2 * r + i] / total[r];
  }
}

// Calls that are not inlined, local memory, a switch, printf, an assertion and constants.
__constant__ float table[4] = {1.f, 2.f, 4.f, 8.f};
__device__ int calls;

__device__ __noinline__ float slow_power(float x, int n) {
  atomicAdd(&calls, 1);
  float result = 1.f;
  for (int i = 0; i < n; i++) result *= x;
  return result;
}

extern "C" __global__ void assorted(const float* x, float* y, int n, int pick) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float own[8];
  for (int j = 0; j < 8; j++) own[j] = x[i] + j;
  float value = own[(i + pick) % 8];
  switch (i % 6) {
    case 0:
      value = slow_power(value, i % 4);
      break;
    case 1:
      value = table[pick & 3] * value;
      break;
    case 2:
      value = sinf(value * 1e5f);
      break;
    case 3:
      value = erff(value) + tanhf(value);
      break;
    case 4:
      value = logf(fabsf(value) + 1.f) / 3.f;
      break;
    default:
      value = static_cast<float>(static_cast<long long>(value * 1e6f) % 1234567);
      break;
  }
  if (!(value == value)) asm volatile("trap;");
  y[i] = value;
}

template __global__ void add<0>(const float*, const float*, float*, int);
template __global__ void add<1>(const float*, const float*, float*, int);
template __global__ void block_sum<0>(const float*, float*, int);
template __global__ void block_sum<1>(const float*, float*, int);
template __global__ void transpose<0>(const float*, float*, int, int);
template __global__ void transpose<1>(const float*, float*, int, int);
template __global__ void transpose<2>(const float*, float*, int, int);
template __global__ void pipelined_reverse<0>(const bf16*, bf16*, int);
template __global__ void pipelined_reverse<1>(const bf16*, bf16*, int);
template __global__ void pipelined_reverse<2>(const bf16*, bf16*, int);
template __global__ void pipelined_reverse<3>(const bf16*, bf16*, int);
template __global__ void matmul<0>(const bf16*, const bf16*, float*, int, int, int);
template __global__ void matmul<1>(const bf16*, const bf16*, float*, int, int, int);
template __global__ void matmul<2>(const bf16*, const bf16*, float*, int, int, int);
template __global__ void attention<0>(const bf16*, const bf16*, const bf16*, float*, int, float);
template __global__ void attention<1>(const bf16*, const bf16*, const bf16*, float*, int, float);
template __global__ void attention<2>(const bf16*, const bf16*, const bf16*, float*, int, float);
template __global__ void attention<3>(const bf16*, const bf16*, const bf16*, float*, int, float);
template __global__ void attention<4>(const bf16*, const bf16*, const bf16*, float*, int, float);
