// Interface of compact_kv: move the accepted path of a tree behind the prefix, in every cache tensor, in
// place.
#pragma once

#include <cstdint>

namespace specfuse {

// One cache tensor [B, G, Smax, D]; strides in bytes, the D dimension is contiguous.
struct KvTensor {
  char* data;
  int64_t stride_b, stride_g, stride_s;
  int64_t G, Smax, row_bytes;
};

// Letters: B batch, K path slots. Everything is contiguous.
struct CompactKvParams {
  int64_t B, K;
  const int32_t* path;    // [B, K], strictly increasing up to length
  const int32_t* length;  // [B]
  const int64_t* start;   // [B], slot of tree node 0
};

// What is wrong with the arguments of a row; `message` is null where nothing is.
struct CompactKvError {
  const char* message = nullptr;
  int64_t row = 0, value = 0;
};

// Moves nothing where it returns an error.
CompactKvError compact_kv_cpu(const CompactKvParams& params, const KvTensor* tensors, int64_t num_tensors);

// Launches on `stream` (a cudaStream_t) and returns the error's text, null on success. Moves whose source or
// destination lies outside a tensor are left out, since the path is not read on the host.
const char* compact_kv_cuda(const CompactKvParams& params, const KvTensor* tensors, int64_t num_tensors,
                            void* stream);

}  // namespace specfuse
