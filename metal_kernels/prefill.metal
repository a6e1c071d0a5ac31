// Attention of a chunk of new tokens over a compressed cache, flash-style: no logit and no decoded row leaves the chip.
//
// attend_prefill  one threadgroup per (block of query rows, KV head, sequence), the rows of a KV head being its query
//                 heads at one position after another. All of its simdgroups decode a tile of keys, then of values, to
//                 threadgroup memory as float32; each multiplies it with its own 8 rows, in fragments in registers.
#pragma once

#include "tiles.metal"

// How a threadgroup divides its work.
template <int D_, int DV_>
struct Prefill {
  static constexpr constant int D = D_;
  static constexpr constant int DV = DV_;
  static constexpr constant int SIMDGROUPS = 8;
  static constexpr constant int THREADS = SIMDGROUPS * LANES;
  // Simdgroups that share 8 rows, each with a part of the channels: rows beyond 128 channels do not fit registers.
  static constexpr constant int SPLIT = (D > DV ? D : DV) > 128 ? 2 : 1;
  static constexpr constant int QUERIES = 8 * SIMDGROUPS / SPLIT;
  static constexpr constant int ROWS = 32 / SPLIT;  // of a tile
  static constexpr constant int LOGITS = ROWS / 8;  // fragments of a simdgroup: of logits,
  static constexpr constant int KEYS = (D / 8 + SPLIT - 1) / SPLIT;  // of queries, and thus of a key's channels,
  static constexpr constant int VALUES = (DV / 8 + SPLIT - 1) / SPLIT;  // of the output
  static constexpr constant int KEY_CHANNELS = 8 * SPLIT * KEYS;
  static constexpr constant int VALUE_CHANNELS = 8 * SPLIT * VALUES;
  static constexpr constant int WIDTH = row_width(KEY_CHANNELS > VALUE_CHANNELS ? KEY_CHANNELS : VALUE_CHANNELS);
  static constexpr constant int TILE = ROWS * WIDTH;
  static constexpr constant int PARTIAL = SPLIT > 1 ? SIMDGROUPS * LOGITS * LANES : 1;
};
constexpr constant int LEVELS = 64;

// What a simdgroup knows of its 8 rows; a lane holds two neighbouring numbers of one row in every fragment.
template <typename P>
struct Rows {
  float2 queries[P::KEYS];
  float2 out[P::VALUES];
  float peak;   // of the row's logits, in units of log2
  float total;  // of its weights, those in this lane
  Place at;
  int first;    // row of the block that is row 0 here
  int part;     // of the channels
  bool any;     // whether there is a row at all

  // Row of the block that this lane has numbers of.
  METAL_FUNC int row() const {
    return first + at.row;
  }
  // Channel of number j of fragment i of the queries, and of the first number of fragment i of the output.
  METAL_FUNC int key_channel(int i, int j) const {
    return 8 * part * P::KEYS + summed_channel<P::KEYS>(i, at.column + j);
  }
  METAL_FUNC int value_channel(int i) const {
    return 8 * part * P::VALUES + kept_channel<P::VALUES>(i, at.column);
  }
};

// What a segment of the sequence (the body, or the tail) adds to the logits of a lane's row.
template <bool TAIL, bool BIASED, int MASKED, typename M>
struct Logits {
  const device float* bias;
  const device M* mask;
  long mask_at;
  Shape shape;
  int start;  // rows of the segment that the row sees
  int stop;

  METAL_FUNC float at(float s, int row) const {
    if (row < start || row >= stop) {
      return -INFINITY;
    }
    if constexpr (BIASED) {
      s = metal::fma(bias[row], M_LOG2E_F, s);
    }
    return masked<MASKED>(s, mask, mask_at + (TAIL ? shape.tail_column(row) : shape.body_column(row)));
  }
};

// Run the online softmax over rows `begin .. stop` of a segment; this simdgroup's rows see `start_here .. stop_here`.
template <typename P, typename K, typename V, typename L>
METAL_FUNC void attend_segment(
    thread Rows<P>& rows,
    K keys,
    V values,
    L logits,
    int begin,
    int stop,
    int start_here,
    int stop_here,
    threadgroup float* tile,
    threadgroup float2* partial,  // [SIMDGROUPS, LOGITS, LANES]
    uint simd_group,
    uint lane) {
  const uint thread_index = simd_group * LANES + lane;
  for (int row = begin; row < stop; row += P::ROWS) {
    const int n = metal::min(P::ROWS, stop - row);
    const bool needed = rows.any && row < stop_here && row + P::ROWS > start_here;
    load_tile<P::ROWS, P::KEY_CHANNELS, P::WIDTH, P::THREADS>(keys, row, n, 1.0f, tile, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float2 s[P::LOGITS];
    if (needed) {
      dot_rows<P::KEYS, P::LOGITS, P::WIDTH>(rows.queries, tile + 8 * rows.part * P::KEYS, rows.at, s);
      if constexpr (P::SPLIT > 1) {
        UNROLL
        for (int f = 0; f < P::LOGITS; f++) {
          partial[(simd_group * P::LOGITS + f) * LANES + lane] = s[f];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    load_tile<P::ROWS, P::VALUE_CHANNELS, P::WIDTH, P::THREADS>(values, row, n, 1.0f, tile, thread_index);
    if (needed) {
      float peak = rows.peak;
      UNROLL
      for (int f = 0; f < P::LOGITS; f++) {
        if constexpr (P::SPLIT > 1) {
          s[f] += partial[((simd_group ^ 1) * P::LOGITS + f) * LANES + lane];
        }
        const int at = row + 8 * f + rows.at.column;
        s[f] = float2(logits.at(s[f].x, at), logits.at(s[f].y, at + 1));
        peak = metal::max(peak, metal::max(s[f].x, s[f].y));
      }
      peak = row_max(peak);
      const float safe = peak == -INFINITY ? 0 : peak;
      const float shrink = metal::exp2(rows.peak - safe);
      float total = 0;
      UNROLL
      for (int f = 0; f < P::LOGITS; f++) {
        s[f] = metal::exp2(s[f] - safe);
        total += s[f].x + s[f].y;
      }
      rows.peak = peak;
      rows.total = metal::fma(rows.total, shrink, total);
      UNROLL
      for (int i = 0; i < P::VALUES; i++) {
        rows.out[i] *= shrink;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (needed) {
      add_rows<P::VALUES, P::LOGITS, P::WIDTH>(s, tile + 8 * rows.part * P::VALUES, rows.at, rows.out);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Where the rows of a KV head lie in queries and output, and how many there are.
struct QueryRows {
  int n_heads;
  int n_tokens;

  METAL_FUNC int count() const {
    return n_heads * n_tokens;
  }
  METAL_FUNC int token(int row) const {
    return row / n_heads;
  }
  METAL_FUNC int head(int row) const {
    return row % n_heads;
  }
  METAL_FUNC long at(int row) const {
    return long(head(row)) * n_tokens + token(row);
  }
};

// Columns before those that a token sees, by the sliding window.
METAL_FUNC int hidden_columns(Shape shape, int token) {
  const int own = shape.end - shape.first + shape.body_rows - shape.n_queries + token;
  return shape.window == 0 ? 0 : metal::max(0, own + 1 - shape.window);
}

// First row of the body that a token sees, as far as the sliding window goes.
METAL_FUNC int body_start(Shape shape, int token) {
  return metal::max(0, hidden_columns(shape, token) - shape.sinks);
}

// The same of the tail's buffer, whose rows are columns before and after those of the body.
METAL_FUNC int tail_start(Shape shape, int token) {
  const int hidden = hidden_columns(shape, token);
  return shape.first + (hidden <= shape.sinks ? hidden : metal::max(shape.sinks, hidden - shape.body_rows));
}

// Queries of a lane's row to registers, as they are but for `scale`.
template <typename P, typename T>
METAL_FUNC void load_queries(thread Rows<P>& rows, const device T* queries, QueryRows of, int first, float scale) {
  const int row = first + rows.row();
  const device T* from = queries + of.at(metal::min(row, of.count() - 1)) * P::D;
  UNROLL
  for (int i = 0; i < P::KEYS; i++) {
    UNROLL
    for (int j = 0; j < 2; j++) {
      const int c = rows.key_channel(i, j);
      rows.queries[i][j] = row < of.count() && (P::KEY_CHANNELS == P::D || c < P::D) ? scale * float(from[c]) : 0.0f;
    }
  }
}

// The same in the keys' basis: through threadgroup memory, as many rows at a time as a tile has.
template <typename P, typename T>
METAL_FUNC void load_rotated_queries(
    thread Rows<P>& rows,
    const device T* queries,
    QueryRows of,
    int first,
    float scale,
    const device float* signs,
    threadgroup float* x,  // [ROWS, D]
    uint thread_index) {
  for (int some = 0; some < P::QUERIES; some += P::ROWS) {
    for (int i = thread_index; i < P::ROWS * P::D; i += P::THREADS) {
      const int row = first + some + i / P::D, c = i % P::D;
      x[i] = row < of.count() ? scale * float(queries[of.at(row) * P::D + c]) * signs[c] : 0.0f;
    }
    hadamard<P::D>(x, P::ROWS, thread_index, P::THREADS);
    if (rows.first >= some && rows.first < some + P::ROWS) {
      const threadgroup float* from = x + (rows.row() - some) * P::D;
      UNROLL
      for (int i = 0; i < P::KEYS; i++) {
        UNROLL
        for (int j = 0; j < 2; j++) {
          const int c = rows.key_channel(i, j);
          rows.queries[i][j] = P::KEY_CHANNELS == P::D || c < P::D ? from[c] : 0.0f;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Bring the outputs gathered so far back from the values' basis.
template <typename P>
METAL_FUNC void unrotate(
    thread Rows<P>& rows, const device float* signs, threadgroup float* x /* [ROWS, DV] */, uint thread_index) {
  for (int some = 0; some < P::QUERIES; some += P::ROWS) {
    const bool mine = rows.first >= some && rows.first < some + P::ROWS;
    threadgroup float* row = x + (rows.row() - some) * P::DV;
    if (mine) {
      UNROLL
      for (int i = 0; i < P::VALUES; i++) {
        const int c = rows.value_channel(i);
        if (P::VALUE_CHANNELS == P::DV || c < P::DV) {
          row[c] = rows.out[i].x;
          row[c + 1] = rows.out[i].y;
        }
      }
    }
    hadamard<P::DV>(x, P::ROWS, thread_index, P::THREADS);
    if (mine) {
      UNROLL
      for (int i = 0; i < P::VALUES; i++) {
        const int c = rows.value_channel(i);
        if (P::VALUE_CHANNELS == P::DV || c < P::DV) {
          rows.out[i] = float2(row[c] * signs[c], row[c + 1] * signs[c + 1]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

template <int D, int DV, int K_KIND, int K_BITS, int K_GROUP, bool K_ROTATED, int V_KIND, int V_BITS, int V_GROUP,
          bool V_ROTATED, bool BIASED, int MASKED, bool SINKS, typename T, typename M>
METAL_FUNC void attend_prefill(
    const device T* queries,      // [B, Hq, L, D]
    float scale,
    Shape shape,
    const device int* lanes,      // [B * H, 3]
    Planes key_planes,
    const device float* key_levels,
    const device float* key_signs,
    Planes value_planes,
    const device float* value_levels,
    const device float* value_signs,
    const device float* body_bias,
    const device T* tail_keys,    // [B, H, capacity, D]
    const device T* tail_values,  // [B, H, capacity, DV]
    const device float* tail_bias,
    const device M* mask,
    const device float* sinks,    // [Hq]
    device T* out,                // [B, Hq, L, DV]
    threadgroup float* tile,      // [TILE]
    threadgroup float* levels,    // [2, LEVELS]
    threadgroup float2* partial,  // [PARTIAL]
    uint3 group,
    uint simd_group,
    uint lane) {
  using P = Prefill<D, DV>;
  static_assert(4 * (P::TILE + 2 * LEVELS + 2 * P::PARTIAL) <= 32768, "32 KB of threadgroup memory");
  const QueryRows of{shape.group, shape.n_queries};
  const uint thread_index = simd_group * LANES + lane;
  const int first = group.x * P::QUERIES;
  const int kv_head = group.y, sequence = group.z;
  const int i_lane = sequence * shape.n_kv_heads + kv_head;
  const Lane where(lanes, i_lane);
  queries += long(i_lane) * of.count() * D;
  out += long(i_lane) * of.count() * DV;

  Rows<P> rows{{}, {}, -INFINITY, 0, Place(lane), int(simd_group) / P::SPLIT * 8, int(simd_group) % P::SPLIT, false};
  const int row = first + rows.row();
  const bool exists = row < of.count();
  rows.any = first + rows.first < of.count();
  const int head = of.head(row), token = of.token(row), first_token_here = of.token(first + rows.first);
  const long mask_at = long(sequence) * shape.mask_batch + long(kv_head * shape.group + head) * shape.mask_head +
      long(token) * shape.mask_query;
  const float factor = scale * M_LOG2E_F;

  if (where.length > 0) {
    if constexpr (K_ROTATED) {
      load_rotated_queries(rows, queries, of, first, factor, key_signs, tile, thread_index);
    } else {
      load_queries(rows, queries, of, first, factor);
    }
    if constexpr (K_KIND == CODEBOOK || V_KIND == CODEBOOK) {
      for (int i = thread_index; i < 2 * LEVELS; i += P::THREADS) {
        levels[i] = i < LEVELS ? key_levels[i] : value_levels[i - LEVELS];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const Source<D, K_KIND, K_BITS, K_GROUP> keys{key_planes, levels, where.start};
    const Source<DV, V_KIND, V_BITS, V_GROUP> values{value_planes, levels + LEVELS, where.start};
    const Logits<false, BIASED, MASKED, M> logits{
        body_bias + (BIASED ? where.start : 0), mask, mask_at, shape, body_start(shape, token),
        exists ? where.length : 0};
    const int begin = body_start(shape, of.token(first)) / P::ROWS * P::ROWS;
    attend_segment(
        rows, keys, values, logits, begin, where.length, body_start(shape, first_token_here), where.length, tile,
        partial, simd_group, lane);
    if constexpr (V_ROTATED) {
      unrotate(rows, value_signs, tile, thread_index);
    }
  }

  // A token sees the tail up to its own row; the chunk's are the newest.
  const long first_row = long(i_lane) * shape.capacity;
  const int own = shape.end - shape.n_queries;
  const int last = metal::min(first + P::QUERIES, of.count()) - 1;
  const int last_here = metal::min(first + rows.first + 7, of.count() - 1);
  if (K_ROTATED || where.length == 0) {
    load_queries(rows, queries, of, first, factor);
  }
  const Logits<true, BIASED, MASKED, M> logits{
      tail_bias + (BIASED ? first_row : 0), mask, mask_at, shape, tail_start(shape, token),
      exists ? own + token + 1 : 0};
  attend_segment(
      rows, exact_rows<D>(tail_keys + first_row * D), exact_rows<DV>(tail_values + first_row * DV), logits,
      metal::max(where.begin, tail_start(shape, of.token(first))), own + of.token(last) + 1,
      tail_start(shape, first_token_here), own + of.token(last_here) + 1, tile, partial, simd_group, lane);

  float total = row_sum(rows.total);
  float shrink = 1;
  if constexpr (SINKS) {
    if (exists) {
      const float sink = sinks[kv_head * shape.group + head] * M_LOG2E_F;
      const float peak = metal::max(rows.peak, sink);
      const float safe = peak == -INFINITY ? 0 : peak;
      shrink = metal::exp2(rows.peak - safe);
      total = metal::fma(total, shrink, metal::exp2(sink - safe));
    }
  }
  if (exists) {
    device T* to = out + of.at(row) * DV;
    UNROLL
    for (int i = 0; i < P::VALUES; i++) {
      const int c = rows.value_channel(i);
      if (P::VALUE_CHANNELS == DV || c < DV) {
        const float2 x = rows.out[i] * shrink / metal::max(total, 1e-30f);
        to[c] = T(x.x);
        to[c + 1] = T(x.y);
      }
    }
  }
}
