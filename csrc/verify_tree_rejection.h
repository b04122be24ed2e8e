// What the CPU and CUDA implementations of verify_tree_rejection share.
//
// Rejection sampling over siblings in closed form. Let p be the target's weights with sum M, q the drafter's
// with sum Q. The rule accepts the first child, of token t, where u * q(t) / Q < p(t) / M; else what is left
// of p is max(p - (M / Q) * q, 0). By induction what is left after any number of rejections is
//
//     left(S) = max(p - S * q, 0)    with one scalar S, which a rejection raises by R / Q,
//
// R being the sum of left(S) and Q the sum of q over what can still be drawn: without replacement q loses the
// rejected token and is rescaled, which changes Q alone, as nothing is left of p at that token anyway. So the
// child at hand is accepted where left(S + u * R / Q) at its token is positive, no vector is ever written,
// and a rejection costs one pass over p and q for the next R and Q.
#pragma once

#include "verify_tree.h"

namespace specfuse {

// Letters as in verify_tree.h; W entries of q per node: all V tokens, or k with their ids.
struct VerifyTreeRejectionParams {
  VerifyTreeParams tree;
  const void* draft_probs;  // [B, N, W], strides in elements; row i: what the children of node i come from
  int64_t draft_stride_b, draft_stride_n, draft_stride_w;
  LogitsDtype draft_dtype;
  int64_t W;
  bool sparse;
  const int64_t* draft_ids;  // [B, N, W] contiguous where sparse; outside [0, V) is padding
  bool with_replacement;
};

// Rounding is monotonic: what is rejected at S + u * R / Q has nothing left at S + R / Q.
SPECFUSE_HD double left_of(double p, double s, double q) {
  const double left = p - s * q;
  return left > 0.0 ? left : 0.0;
}

ArgumentError verify_tree_rejection_cpu(const VerifyTreeRejectionParams& params, int threads);

// Launches on `stream` (a cudaStream_t), tree.cluster blocks per tree, and returns the error's text, null on
// success. tree.scratch holds verify_tree_rejection_cuda_scratch_bytes, of this call alone.
int64_t verify_tree_rejection_cuda_scratch_bytes(int64_t B, int64_t cluster);
const char* verify_tree_rejection_cuda(const VerifyTreeRejectionParams& params, void* stream);

}  // namespace specfuse
