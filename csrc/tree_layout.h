// What a step of the loop asks about token trees on the host: are they sound, where do their nodes stand,
// what may each node see.
#pragma once

#include <cstdint>

namespace specfuse {

struct TreeBatch {
  const int64_t* tokens;     // [B, N]
  const int32_t* parents;    // [B, N], -1 at the root
  const int32_t* num_nodes;  // [B]
  int64_t B, N;
};

// Whether TokenTree.validate would accept the values: counts within [0, N], parents before children, no two
// siblings of one token.
bool sound_trees(const TreeBatch& trees);

// Whether a drafted node holds a token outside [0, limit) or one of `refused`; padding counts too.
bool foreign_tokens(const TreeBatch& trees, int64_t limit, const int64_t* refused, int64_t num_refused);

// position ids of the nodes: depth + roots[b], at most `largest`; padding stands at the root.
void node_positions(const TreeBatch& trees, const int64_t* roots, int64_t largest, int64_t* positions);

// bits[b, i] (N <= 64): bit j where j is i or an ancestor of i. Padding sees itself alone.
void ancestor_bits(const TreeBatch& trees, int64_t* bits);

struct StepMask {
  bool* cells;           // [B, N, slots], kept from step to step
  int64_t stride_row;    // of one row of the batch
  int64_t stride_node;   // of one node
  int64_t nodes;         // of the buffer, at least the trees' N
  const int64_t* done;   // [B] slots that every node sees already
  const int64_t* start;  // [B] committed slots: the tree's node 0 stands there
  int64_t end;           // slots of this step
};

// Brings the mask up to date: true at slots done .. start, the ancestors behind them, false up to `end`.
void write_step_mask(const TreeBatch& trees, const StepMask& mask);

struct NewRows {
  const char* source;
  int64_t source_b, source_g, source_s;  // strides in bytes
  char* target;
  int64_t target_b, target_g, target_s;
};

// Copies [B, G, q] rows of `row_bytes` to slots start[b] .. start[b] + q of a cache.
void write_rows(const NewRows& rows, const int64_t* start, int64_t B, int64_t G, int64_t q,
                int64_t row_bytes);

}  // namespace specfuse
