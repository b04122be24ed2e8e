// CUDA implementation of compact_kv: all layers in one launch.
//
// Bytes moved: 2 * row_bytes * G per moved slot and tensor, which is also the floor. A thread owns one column
// of a head (16 bytes where alignment allows) and moves it along the path, so no thread waits for another.
#include <cuda_runtime.h>

#include "compact_kv.h"

namespace specfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 4;              // loads in flight per thread; eight spill on sm_80
constexpr int kTensorsPerLaunch = 256;  // kernel parameters hold 32,764 bytes from CUDA 12.1 on

struct Table {
  KvTensor tensors[kTensorsPerLaunch];
  int vector_bytes[kTensorsPerLaunch];
};
static_assert(sizeof(Table) + sizeof(CompactKvParams) <= 32764, "kernel parameters have a bound");

template <typename Vector>
__device__ void compact_column(const KvTensor& kv, int64_t b, int64_t lane, const int32_t* path, int n,
                               int64_t start) {
  const int64_t columns = kv.row_bytes / static_cast<int64_t>(sizeof(Vector));
  if (lane >= kv.G * columns) return;
  char* base = kv.data + b * kv.stride_b + lane / columns * kv.stride_g + lane % columns * sizeof(Vector);
  const auto inside = [&](int64_t slot) { return slot >= 0 && slot < kv.Smax; };
  // The path increases and path[i] >= i, so no slot is read after a group before it has written it. Within a
  // group all loads come first.
  for (int i = 1; i < n; i += kUnroll) {
    Vector held[kUnroll];
    bool moves[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      moves[j] = i + j < n && path[i + j] > i + j && inside(start + path[i + j]) && inside(start + i + j);
      if (moves[j]) held[j] = *reinterpret_cast<const Vector*>(base + (start + path[i + j]) * kv.stride_s);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (moves[j]) *reinterpret_cast<Vector*>(base + (start + i + j) * kv.stride_s) = held[j];
    }
  }
}

__global__ void __launch_bounds__(kThreads) compact_kv_kernel(const CompactKvParams p, const Table table) {
  const int64_t b = blockIdx.z;
  const int n = static_cast<int>(p.length[b] < p.K ? p.length[b] : p.K);
  const int32_t* path = p.path + b * p.K;
  if (n <= 1 || path[n - 1] == n - 1) return;
  const KvTensor& kv = table.tensors[blockIdx.y];
  const int64_t lane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  switch (table.vector_bytes[blockIdx.y]) {
    case 16:
      compact_column<uint4>(kv, b, lane, path, n, p.start[b]);
      break;
    case 8:
      compact_column<uint2>(kv, b, lane, path, n, p.start[b]);
      break;
    case 4:
      compact_column<uint32_t>(kv, b, lane, path, n, p.start[b]);
      break;
    case 2:
      compact_column<uint16_t>(kv, b, lane, path, n, p.start[b]);
      break;
    default:
      compact_column<uint8_t>(kv, b, lane, path, n, p.start[b]);
      break;
  }
}

// The widest load that divides the tensor's address, strides and row.
int vector_bytes(const KvTensor& kv) {
  const auto bits = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(kv.data)) |
                    static_cast<uint64_t>(kv.stride_b | kv.stride_g | kv.stride_s | kv.row_bytes);
  int bytes = 16;
  while (bits % bytes != 0) bytes /= 2;
  return bytes;
}

}  // namespace

const char* compact_kv_cuda(const CompactKvParams& params, const KvTensor* tensors, int64_t num_tensors,
                            void* stream) {
  if (params.B == 0 || params.K <= 1) return nullptr;
  for (int64_t first = 0; first < num_tensors; first += kTensorsPerLaunch) {
    Table table = {};
    int64_t lanes = 0, count = 0;
    for (; count < kTensorsPerLaunch && first + count < num_tensors; ++count) {
      const KvTensor& kv = tensors[first + count];
      table.tensors[count] = kv;
      table.vector_bytes[count] = vector_bytes(kv);
      const int64_t here = kv.G * (kv.row_bytes / table.vector_bytes[count]);
      lanes = lanes > here ? lanes : here;
    }
    if (lanes == 0) continue;
    CompactKvParams copy = params;
    void* arguments[] = {&copy, &table};
    const dim3 grid(static_cast<unsigned>((lanes + kThreads - 1) / kThreads), static_cast<unsigned>(count),
                    static_cast<unsigned>(params.B));
    const cudaError_t status = cudaLaunchKernel(compact_kv_kernel, grid, dim3(kThreads), arguments, 0,
                                                static_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  return nullptr;
}

}  // namespace specfuse
