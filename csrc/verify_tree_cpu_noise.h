// Philox words of many consecutive tokens at a time: what verify_tree.h's noise_word gives for each of them.
#pragma once

#include <cstdint>

#include "verify_tree.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SPECFUSE_X86 1
#include <immintrin.h>
#endif

namespace specfuse {

// Tokens per call: 16 Philox blocks of four tokens each. The first token must be a multiple of it.
constexpr int64_t kNoiseStep = 64;

inline void step_noise_baseline(int64_t base, int64_t seed, int64_t position, NoiseStream stream,
                                uint32_t* words) {
  constexpr int kBlocks = kNoiseStep / 4;
  uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (int j = 0; j < kBlocks; ++j) {
    c0[j] = static_cast<uint32_t>(base / 4 + j);
    c1[j] = static_cast<uint32_t>(position);
    c2[j] = static_cast<uint32_t>(position >> 32);
    c3[j] = static_cast<uint32_t>(stream);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < kBlocks; ++j) {
      // High and low halves apart: this is the form that the compiler vectorises.
      const uint32_t a = c0[j], c = c2[j];
      const auto high0 = static_cast<uint32_t>((uint64_t{a} * 0xD2511F53u) >> 32);
      const auto high1 = static_cast<uint32_t>((uint64_t{c} * 0xCD9E8D57u) >> 32);
      c0[j] = high1 ^ c1[j] ^ key0;
      c1[j] = c * 0xCD9E8D57u;
      c2[j] = high0 ^ c3[j] ^ key1;
      c3[j] = a * 0xD2511F53u;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int j = 0; j < kBlocks; ++j) {
    words[4 * j] = c0[j];
    words[4 * j + 1] = c1[j];
    words[4 * j + 2] = c2[j];
    words[4 * j + 3] = c3[j];
  }
}

#ifdef SPECFUSE_X86
// Four blocks per register, each 32-bit word in the low half of a 64-bit lane: vpmuludq ignores the high
// half, so the low half of a product needs no masking. Compilers do not find this form by themselves.
__attribute__((target("avx2,fma"))) inline void step_noise_avx2(int64_t base, int64_t seed, int64_t position,
                                                                NoiseStream stream, uint32_t* words) {
  constexpr int kRegisters = kNoiseStep / 16;
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i c0[kRegisters], c1[kRegisters], c2[kRegisters], c3[kRegisters];
  for (int r = 0; r < kRegisters; ++r) {
    c0[r] = _mm256_add_epi64(_mm256_set1_epi64x(base / 4 + 4 * r), _mm256_setr_epi64x(0, 1, 2, 3));
    c1[r] = _mm256_set1_epi64x(static_cast<uint32_t>(position));
    c2[r] = _mm256_set1_epi64x(static_cast<uint32_t>(position >> 32));
    c3[r] = _mm256_set1_epi64x(static_cast<uint32_t>(stream));
  }
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
    for (int r = 0; r < kRegisters; ++r) {
      const __m256i p0 = _mm256_mul_epu32(c0[r], multiplier0), p1 = _mm256_mul_epu32(c2[r], multiplier1);
      c0[r] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[r]), k0);
      c1[r] = p1;
      c2[r] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[r]), k1);
      c3[r] = p0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int r = 0; r < kRegisters; ++r) {
    // Per lane the pairs (c0, c1) and (c2, c3), then the four words of each block side by side.
    const __m256i first = _mm256_blend_epi32(c0[r], _mm256_slli_epi64(c1[r], 32), 0xAA);
    const __m256i second = _mm256_blend_epi32(c2[r], _mm256_slli_epi64(c3[r], 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
    auto* out = reinterpret_cast<__m256i*>(words + 16 * r);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
#endif

}  // namespace specfuse
