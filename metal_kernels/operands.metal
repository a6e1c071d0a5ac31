// What the attention kernels read of a store. operands.py builds it, in this order.
#pragma once

#include "codecs.metal"

// One side of the body. Planes that a format has not are never read.
struct Planes {
  const device uchar* codes0;
  const device uchar* codes1;
  const device half* scales;
  const device half* offsets;
};

// Numbers that hold for all lanes.
struct Shape {
  int n_kv_heads;
  int group;      // query heads that share a KV head
  int n_queries;
  int capacity;   // rows of the tail's buffer
  int end;        // of the tail, in its buffer
  int first;      // first row of the buffer that any lane has: column 0 of the mask
  int sinks;      // rows of the tail before the body, in columns of the mask
  int body_rows;  // of the longest body: columns of the mask between sinks and the rest of the tail
  int mask_batch;  // strides of the mask
  int mask_head;
  int mask_query;
  int window;     // newest tokens that a token sees, itself included; 0: all

  METAL_FUNC Shape(const constant int* p, const constant int* view)
      : n_kv_heads(p[0]), group(p[1]), n_queries(p[2]), capacity(p[3]), end(p[4]), first(p[5]), sinks(p[6]),
        body_rows(view[0]), mask_batch(view[1]), mask_head(view[2]), mask_query(view[3]), window(view[4]) {}

  // Column of the mask that a row of the body, or of the tail's buffer, has.
  METAL_FUNC int body_column(int row) const {
    return sinks + row;
  }
  METAL_FUNC int tail_column(int row) const {
    int column = row - first;
    return column < sinks ? column : column + body_rows;
  }

  // Whether new token `token` sees a column, as far as the sliding window goes.
  METAL_FUNC bool in_window(int column, int token) const {
    return window == 0 || column > end - first + body_rows - n_queries + token - window;
  }
};

// Rows of one (batch, KV head): start and length in the body's planes, begin in the tail's buffer.
struct Lane {
  int start;
  int length;
  int begin;

  METAL_FUNC Lane(const device int* p, int i)
      : start(p[3 * i]), length(p[3 * i + 1]), begin(p[3 * i + 2]) {}
};

// Logit, in units of log2, after the mask at `at`: 1 a bool of what is seen, 2 what is added.
template <int MASKED, typename M>
METAL_FUNC float masked(float s, const device M* mask, long at) {
  if constexpr (MASKED == 1) {
    return mask[at] ? s : -INFINITY;
  } else if constexpr (MASKED == 2) {
    return s + float(mask[at]) * M_LOG2E_F;
  } else {
    return s;
  }
}
