// What the CPU and CUDA implementations of verify_tree share: parameters, noise, and the step from a node to
// its child.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPECFUSE_HD __host__ __device__ __forceinline__
#else
#define SPECFUSE_HD inline
#endif

namespace specfuse {

enum class LogitsDtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kMaxTreeNodes = 1024;

// Letters: B batch, N tree nodes (padded), V vocabulary. Everything but the logits is contiguous.
struct VerifyTreeParams {
  const void* logits;  // [B, N, V], strides in elements
  int64_t stride_b, stride_n, stride_v;
  LogitsDtype dtype;
  int64_t B, N, V;
  const int64_t* tokens;     // [B, N]
  const int32_t* parents;    // [B, N], smaller than the node's own index, -1 at the root
  const int32_t* num_nodes;  // [B], nodes beyond it are padding and never read
  const float* temperature;  // [B], 0 = greedy
  const int32_t* top_k;      // [B], 0 = off
  const float* top_p;        // [B], 1 = off
  const float* min_p;        // [B], 0 = off
  const int64_t* seed;       // [B]
  const int64_t* positions;  // [B], absolute position of the root token
  int32_t* path;             // [B, N] out, padded with -1
  int32_t* length;           // [B] out
  int64_t* next_token;       // [B] out, -1 where nothing can be emitted
  float* logprobs;           // [B, N] out, padded with 0
  // Of the CUDA implementation only.
  int64_t splits = 0;   // blocks per row of a scan of all rows, 0 = rows are read when visited
  int64_t cluster = 1;  // blocks per tree of the walk
  void *scratch = nullptr, *group_scratch = nullptr;
};

// Philox-4x32-10 (Salmon et al., SC 2011). `words` holds the counter on entry and the random words on return.
SPECFUSE_HD void philox4x32(uint32_t words[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * words[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * words[2];
    const uint32_t w1 = words[1], w3 = words[3];
    words[0] = static_cast<uint32_t>(p1 >> 32) ^ w1 ^ key0;
    words[1] = static_cast<uint32_t>(p1);
    words[2] = static_cast<uint32_t>(p0 >> 32) ^ w3 ^ key1;
    words[3] = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Independent streams of noise at one (seed, position), kept apart by the last word of the counter.
enum class NoiseStream : uint32_t { kTarget = 0, kCoin = 1, kResidual = 2 };

// The random words of tokens 4 * block .. 4 * block + 3.
SPECFUSE_HD void noise_block(int64_t seed, int64_t position, int64_t block, NoiseStream stream,
                             uint32_t words[4]) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = static_cast<uint32_t>(position);
  words[2] = static_cast<uint32_t>(position >> 32);
  words[3] = static_cast<uint32_t>(stream);
  philox4x32(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

SPECFUSE_HD uint32_t noise_word(int64_t seed, int64_t position, int64_t token,
                                NoiseStream stream = NoiseStream::kTarget) {
  uint32_t words[4];
  noise_block(seed, position, token >> 2, stream, words);
  return words[token & 3];
}

// u = (word >> 8) * 2^-24 is exact in float and double; the floor 2^-25 keeps the noise of u = 0 finite.
SPECFUSE_HD double gumbel_double(uint32_t word) {
  const double u = (word >> 8) * 0x1p-24;
  return -log(-log(u > 0x1p-25 ? u : 0x1p-25));
}

SPECFUSE_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SPECFUSE_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SPECFUSE_HD float float_from_bfloat16(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// Multiplying by 2^112 moves the exponent's bias and normalises subnormals; infinity and NaN keep an all-ones
// exponent.
SPECFUSE_HD float float_from_half(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  const uint32_t scaled = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
  return float_from_bits(scaled | special | static_cast<uint32_t>(bits & 0x8000) << 16);
}

// The lowest-numbered child of `node` that holds `token`, or -1. A child comes after its parent, so the walk
// ends whatever the padding holds.
SPECFUSE_HD int find_child(const int64_t* tokens, const int32_t* parents, int num_nodes, int node,
                           int64_t token) {
  for (int child = node + 1; child < num_nodes; ++child) {
    if (parents[child] == node && tokens[child] == token) return child;
  }
  return -1;
}

// What is wrong with the arguments of a row; `message` is null where nothing is.
struct ArgumentError {
  const char* message;
  int64_t row;
  double value;
};

// Checks num_nodes and the parameters of every row.
ArgumentError check_verify_tree(const VerifyTreeParams& params);

// Trees are shared out to at most `threads` threads; results do not depend on their number.
ArgumentError verify_tree_cpu(const VerifyTreeParams& params, int threads);

// Launches on `stream` (a cudaStream_t) and returns the error's text, null on success.
// `scratch` holds verify_tree_cuda_scratch_bytes, 16-byte aligned, of this call alone and of any content.
int64_t verify_tree_cuda_scratch_bytes(const VerifyTreeParams& params);
const char* verify_tree_cuda(const VerifyTreeParams& params, void* stream);

}  // namespace specfuse
