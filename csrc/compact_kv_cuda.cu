// CUDA implementation of compact_kv: all layers in one launch.
//
// A thread owns one 16-byte column of a head and moves it along the path, so that no thread waits for another
// over data. A block brings its row's path into shared memory, checked, while length and start are on their
// way: the chain of dependent reads is {path, length, start}, then rows, then stores.
//
// Bytes: row_bytes * G read and as much written per moved slot and tensor, which is the floor. Slots that
// keep their place move nothing. LLaMA-7B (64 tensors, 32 heads, 256 bytes) with 16 moved slots: 16.8 MB in
// all per sequence, 3.9 us at an H200's 4.3 TB/s; with 3 moved slots it is 0.7 us and the launch weighs more.
//
// In flight: 4.3 TB/s of copying are 2.15 TB/s of reads, at 1 us of loaded latency 2.2 MB or 16 KB per SM. At
// 56 registers 1,152 threads are resident, each with eight loads of 16 bytes on their way: 147 KB per SM.
// With 3 moved slots it is 55 KB, which still leaves room for the start of each block. 16 neighbouring lanes
// read a row of 128 fp16 as 256 contiguous bytes, all of eight sectors. Prediction, not measured on a GPU: 75
// to 90 % of a copy at 32 MB and more, where runs of 256 bytes instead of long ones are what is lost; a
// launch and 2 to 3 us where little moves.
//
// Limits: B * G * columns of a tensor below 2^38, which is what a grid holds; any K, 128 slots at a time.
// Where one tensor of a launch is not aligned to 16 bytes, all of them move in narrower columns.
#include <cuda_runtime.h>

#include "compact_kv.h"

namespace specfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 8;                   // loads in flight per thread
constexpr int kSmall = 64, kLarge = 256;     // tensors of one launch
constexpr int64_t kMostBlocks = 2147483647;  // of gridDim.x
static_assert(kThreads % kUnroll == 0, "groups do not cross the end of a stretch of the path");

// What a launch needs to know of one tensor.
struct Entry {
  char* data;
  int64_t stride_b, stride_g, stride_s;  // bytes
  int64_t Smax;
  uint32_t columns, lanes;  // of one Vector each: in a row of D elements, and in all G heads
};

template <int kCapacity>
struct Table {
  CompactKvParams params;
  uint32_t blocks_per_row;
  Entry entries[kCapacity];
};
static_assert(sizeof(Table<kSmall>) <= 4096, "what every driver takes, and the cheaper launch");
static_assert(sizeof(Table<kLarge>) <= 32764, "kernel parameters have a bound, from CUDA 12.1 on");

// Moves one column along a stretch of the path. `nodes[k]` goes to slot `to + k` of the tree, 0 stays.
template <typename Vector>
__device__ void move_column(char* column, int64_t stride_s, const int32_t* nodes, int count, int64_t to) {
  for (int k = 0; k < count; k += kUnroll) {
    // The path increases and path[i] >= i: within a group all loads come first, and no later group reads a
    // slot that this one has written.
    Vector held[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (nodes[k + j] > 0) held[j] = *reinterpret_cast<const Vector*>(column + nodes[k + j] * stride_s);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (nodes[k + j] > 0) *reinterpret_cast<Vector*>(column + (to + k + j) * stride_s) = held[j];
    }
  }
}

template <int kCapacity, typename Vector>
__global__ void __launch_bounds__(kThreads) compact_kv_kernel(const Table<kCapacity> table) {
  alignas(16) __shared__ int32_t nodes[kThreads];
  const CompactKvParams& p = table.params;
  const Entry& kv = table.entries[blockIdx.y];
  const int64_t b = blockIdx.x / table.blocks_per_row;
  const uint32_t lane = blockIdx.x % table.blocks_per_row * kThreads + threadIdx.x;
  // Within these bounds nothing overflows, and beyond them nothing moves.
  const int64_t given = p.start[b] < kv.Smax ? p.start[b] : kv.Smax;
  const int64_t start = given > -p.K ? given : -p.K;
  const int64_t n = p.length[b] < p.K ? p.length[b] : p.K;
  char* column = kv.data + b * kv.stride_b + lane / kv.columns * kv.stride_g + start * kv.stride_s +
                 lane % kv.columns * sizeof(Vector);
  const int32_t* path = p.path + b * p.K;
  const int tid = static_cast<int>(threadIdx.x);
  int32_t node = 1 + tid < p.K ? path[1 + tid] : 0;  // on its way before length is known
  for (int64_t first = 1; first < n; first += kThreads) {
    const int64_t i = first + tid;
    // What leaves the cache stays too: the path is not checked on the host.
    const bool moves = i < n && node > i && start + i >= 0 && start + node < kv.Smax;
    nodes[tid] = moves ? node : 0;
    node = i + kThreads < n ? path[i + kThreads] : 0;
    __syncthreads();
    const int count = static_cast<int>(n - first < kThreads ? n - first : kThreads);
    if (lane < kv.lanes) move_column<Vector>(column, kv.stride_s, nodes, count, first);
    __syncthreads();  // before the next stretch is written
  }
}

// The widest load that divides the address, strides and row of every tensor.
int vector_bytes(const KvTensor* tensors, int64_t count) {
  uint64_t bits = 16;
  for (int64_t t = 0; t < count; ++t) {
    const KvTensor& kv = tensors[t];
    bits |= reinterpret_cast<uintptr_t>(kv.data);
    bits |= static_cast<uint64_t>(kv.stride_b | kv.stride_g | kv.stride_s | kv.row_bytes);
  }
  return static_cast<int>(bits & (~bits + 1));  // the lowest bit that is set
}

template <int kCapacity, typename Vector>
const char* launch(const CompactKvParams& params, const KvTensor* tensors, int64_t count,
                   cudaStream_t stream) {
  Table<kCapacity> table = {};
  table.params = params;
  int64_t most = 0;
  for (int64_t t = 0; t < count; ++t) {
    const KvTensor& kv = tensors[t];
    const int64_t columns = kv.row_bytes / static_cast<int64_t>(sizeof(Vector)), lanes = kv.G * columns;
    if (lanes > kMostBlocks) return "a kv tensor has too many heads and dimensions";
    Entry& entry = table.entries[t];
    entry = {kv.data, kv.stride_b, kv.stride_g, kv.stride_s, kv.Smax};
    entry.columns = static_cast<uint32_t>(columns > 0 ? columns : 1);  // it divides
    entry.lanes = static_cast<uint32_t>(lanes);
    most = lanes > most ? lanes : most;
  }
  const int64_t blocks_per_row = (most + kThreads - 1) / kThreads;
  if (blocks_per_row == 0) return nullptr;
  if (params.B > kMostBlocks / blocks_per_row) return "the batch has too many rows for one launch";
  table.blocks_per_row = static_cast<uint32_t>(blocks_per_row);
  void* arguments[] = {&table};
  const dim3 grid(static_cast<unsigned>(params.B * blocks_per_row), static_cast<unsigned>(count));
  const cudaError_t status =
      cudaLaunchKernel(compact_kv_kernel<kCapacity, Vector>, grid, dim3(kThreads), arguments, 0, stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <int kCapacity>
const char* launch(const CompactKvParams& params, const KvTensor* tensors, int64_t count,
                   cudaStream_t stream) {
  switch (vector_bytes(tensors, count)) {
    case 16:
      return launch<kCapacity, uint4>(params, tensors, count, stream);
    case 8:
      return launch<kCapacity, uint2>(params, tensors, count, stream);
    case 4:
      return launch<kCapacity, uint32_t>(params, tensors, count, stream);
    case 2:
      return launch<kCapacity, uint16_t>(params, tensors, count, stream);
    default:
      return launch<kCapacity, uint8_t>(params, tensors, count, stream);
  }
}

}  // namespace

const char* compact_kv_cuda(const CompactKvParams& params, const KvTensor* tensors, int64_t num_tensors,
                            void* stream) {
  if (params.B == 0 || params.K <= 1) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  for (int64_t first = 0; first < num_tensors; first += kLarge) {
    const int64_t count = num_tensors - first < kLarge ? num_tensors - first : kLarge;
    const char* error = count <= kSmall ? launch<kSmall>(params, tensors + first, count, on)
                                        : launch<kLarge>(params, tensors + first, count, on);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace specfuse
