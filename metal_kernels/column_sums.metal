// The attention that each key receives, summed (or the largest) over the queries, without a matrix of it.
//
// query_sums   one threadgroup per (block of query rows x split of the keys, KV head, sequence): each query's largest
//              logit and sum of weights, over that part of the keys
// column_sums  one threadgroup per (block of keys, heads of a KV head, sequence): goes through the queries again, with
//              their peaks and totals known
//
// Both hold 8 rows to a simdgroup in registers and read tiles of the other side from threadgroup memory. A logit is
// the same sum in both, in the same order, so that a query which sees one key gives it exactly 1.
#pragma once

#include "tiles.metal"

template <int D>
struct Columns {
  static constexpr constant int SIMDGROUPS = 8;
  static constexpr constant int THREADS = SIMDGROUPS * LANES;
  static constexpr constant int BLOCK = 8 * SIMDGROUPS;          // rows held in registers
  static constexpr constant int ROWS = D > 128 ? 16 : 32;        // rows of a tile
  static constexpr constant int PARTS = D / 8;
  static constexpr constant int LOGITS = ROWS / 8;
  static constexpr constant int WIDTH = row_width(D);
  static constexpr constant int TILE = ROWS * WIDTH;
};

// Numbers of one call.
struct Sizes {
  int n_kv_heads;
  int group;      // query heads that share a KV head
  int n_queries;
  int n_keys;
  int n_splits;   // of the keys, in query_sums
  int split_keys;
  int n_heads;    // of the group, to a threadgroup of column_sums

  METAL_FUNC Sizes(const device int* p)
      : n_kv_heads(p[0]), group(p[1]), n_queries(p[2]), n_keys(p[3]), n_splits(p[4]), split_keys(p[5]), n_heads(p[6]) {}
};

// Row of a block that this lane has numbers of, as fragments; zeros where there is none.
template <int D, typename T>
METAL_FUNC void load_row(const device T* row, bool exists, float factor, Place at, thread float2* parts) {
  UNROLL
  for (int i = 0; i < D / 8; i++) {
    UNROLL
    for (int j = 0; j < 2; j++) {
      parts[i][j] = exists ? factor * float(row[summed_channel<D / 8>(i, at.column + j)]) : 0.0f;
    }
  }
}

template <int D, bool BIASED, typename T, typename S>
METAL_FUNC void query_sums(
    const device T* queries,    // [B, Hq, L, D]
    const device S* keys,       // [B, H, T, D]
    float scale,
    const device int* numbers,  // Sizes
    const device float* bias,   // [B, H, T]
    device float* peaks,        // [B, Hq, L, n_splits], in units of log2
    device float* totals,       // [B, Hq, L, n_splits]
    threadgroup float* tile,    // [TILE]
    uint3 group,
    uint simd_group,
    uint lane) {
  using C = Columns<D>;
  const Sizes sizes(numbers);
  const Place at(lane);
  const uint thread_index = simd_group * LANES + lane;
  const int i_lane = group.z * sizes.n_kv_heads + group.y;
  const int count = sizes.group * sizes.n_queries;
  const int split = int(group.x) % sizes.n_splits, first = int(group.x) / sizes.n_splits * C::BLOCK;
  keys += long(i_lane) * sizes.n_keys * D;
  bias += BIASED ? long(i_lane) * sizes.n_keys : 0;

  // Rows are the group's heads at one position after another: those of a block see about the same keys.
  const int row = first + 8 * simd_group + at.row;
  const bool exists = row < count;
  const int own = sizes.n_keys - sizes.n_queries;
  const long query = long(i_lane) * count + (row % sizes.group) * sizes.n_queries + row / sizes.group;
  const int seen = exists ? own + row / sizes.group + 1 : 0;
  const int last = metal::min(first + C::BLOCK, count) - 1;
  const int last_here = metal::min(first + 8 * int(simd_group) + 7, count - 1);
  const bool any = first + 8 * int(simd_group) < count;
  const int seen_here = any ? own + last_here / sizes.group + 1 : 0;
  const int begin = split * sizes.split_keys;
  const int stop = metal::min(begin + sizes.split_keys, own + last / sizes.group + 1);
  float2 parts[C::PARTS];
  load_row<D>(queries + query * D, exists, scale * M_LOG2E_F, at, parts);

  float highest = -INFINITY, total = 0;
  for (int key = begin; key < stop; key += C::ROWS) {
    load_tile<C::ROWS, D, C::WIDTH, C::THREADS>(
        exact_rows<D>(keys), key, metal::min(C::ROWS, stop - key), 1.0f, tile, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (key < seen_here) {
      float2 s[C::LOGITS];
      dot_rows<C::PARTS, C::LOGITS, C::WIDTH>(parts, tile, at, s);
      float peak = highest;
      UNROLL
      for (int f = 0; f < C::LOGITS; f++) {
        UNROLL
        for (int j = 0; j < 2; j++) {
          const int k = key + 8 * f + at.column + j;
          float x = k < seen ? s[f][j] : -INFINITY;
          if constexpr (BIASED) {
            x = k < seen ? metal::fma(bias[k], M_LOG2E_F, x) : x;
          }
          s[f][j] = x;
          peak = metal::max(peak, x);
        }
      }
      peak = row_max(peak);
      const float safe = peak == -INFINITY ? 0 : peak;
      float sum = 0;
      UNROLL
      for (int f = 0; f < C::LOGITS; f++) {
        s[f] = metal::exp2(s[f] - safe);
        sum += s[f].x + s[f].y;
      }
      total = metal::fma(total, metal::exp2(highest - safe), sum);
      highest = peak;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  total = row_sum(total);
  if (exists && at.column == 0) {
    peaks[query * sizes.n_splits + split] = highest;
    totals[query * sizes.n_splits + split] = total;
  }
}

// Peak of a query's logits, and one over its sum of weights, from those of the splits; 0 where it sees nothing.
METAL_FUNC float2 peak_and_inverse(const device float* peaks, const device float* totals, long at, int n_splits) {
  float peak = -INFINITY, total = 0;
  for (int split = 0; split < n_splits; split++) {
    peak = metal::max(peak, peaks[at + split]);
  }
  peak = peak == -INFINITY ? 0 : peak;
  for (int split = 0; split < n_splits; split++) {
    total = metal::fma(totals[at + split], metal::exp2(peaks[at + split] - peak), total);
  }
  return float2(peak, total > 0 ? 1 / total : 0);
}

// MAXIMA: the largest weight instead of their sum.
template <int D, bool BIASED, bool MAXIMA, typename T, typename S>
METAL_FUNC void column_sums(
    const device T* queries,      // [B, Hq, L, D]
    const device S* keys,         // [B, H, T, D]
    float scale,
    const device int* numbers,    // Sizes
    const device float* bias,     // [B, H, T]
    const device int* n_counted,  // [B]: queries that count
    const device float* peaks,
    const device float* totals,
    device float* out,            // [B, Hq, T]
    threadgroup float* tile,      // [TILE]
    threadgroup float2* known,    // [ROWS]: peak and inverse total of the tile's queries
    uint3 group,
    uint simd_group,
    uint lane) {
  using C = Columns<D>;
  const Sizes sizes(numbers);
  const Place at(lane);
  const uint thread_index = simd_group * LANES + lane;
  const int parts_of_group = sizes.group / sizes.n_heads;
  const int kv_head = int(group.y) / parts_of_group;
  const int first_head = int(group.y) % parts_of_group * sizes.n_heads;
  const int i_lane = group.z * sizes.n_kv_heads + kv_head;
  const int own = sizes.n_keys - sizes.n_queries;
  const int n_queries = metal::min(sizes.n_queries, n_counted[group.z]);

  const int first = group.x * C::BLOCK;
  const int key = first + 8 * simd_group + at.row;
  const bool exists = key < sizes.n_keys;
  const bool any = first + 8 * int(simd_group) < sizes.n_keys;
  const long row = long(i_lane) * sizes.n_keys + metal::min(key, sizes.n_keys - 1);
  float2 parts[C::PARTS];
  load_row<D>(keys + row * D, exists, 1.0f, at, parts);
  const float own_bias = BIASED ? bias[row] : 0;

  for (int head = first_head; head < first_head + sizes.n_heads; head++) {
    const long first_query = (long(i_lane) * sizes.group + head) * sizes.n_queries;
    float result = 0;
    // The first query that sees a key of this block.
    for (int query = metal::max(0, first - own); query < n_queries; query += C::ROWS) {
      const int n = metal::min(C::ROWS, n_queries - query);
      load_tile<C::ROWS, D, C::WIDTH, C::THREADS>(
          exact_rows<D>(queries + first_query * D), query, n, scale * M_LOG2E_F, tile, thread_index);
      if (thread_index < C::ROWS) {
        known[thread_index] = int(thread_index) < n
            ? peak_and_inverse(peaks, totals, (first_query + query + thread_index) * sizes.n_splits, sizes.n_splits)
            : float2(0);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (any) {
        float2 s[C::LOGITS];
        dot_rows<C::PARTS, C::LOGITS, C::WIDTH>(parts, tile, at, s);
        float sum = 0;
        UNROLL
        for (int f = 0; f < C::LOGITS; f++) {
          UNROLL
          for (int j = 0; j < 2; j++) {
            const int i = 8 * f + at.column + j;
            const float2 peak = known[i];
            const float x = BIASED ? metal::fma(own_bias, M_LOG2E_F, s[f][j]) : s[f][j];
            const float weight = i < n && key <= own + query + i ? metal::exp2(x - peak.x) * peak.y : 0;
            sum = MAXIMA ? metal::max(sum, weight) : sum + weight;
          }
        }
        result = MAXIMA ? metal::max(result, sum) : result + sum;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    result = MAXIMA ? row_max(result) : row_sum(result);
    if (exists && at.column == 0) {
      out[(long(i_lane) * sizes.group + head) * sizes.n_keys + key] = result;
    }
  }
}
