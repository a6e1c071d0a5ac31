// Attention of one or a few new tokens over a compressed cache, split over the sequence.
//
// attend_decode   one threadgroup per (split, block of query rows, batch x KV head): a partial result and its log-sum-exp
// attend_merge    one threadgroup per query row: merges the splits, leaves the values' basis, adds the sinks
//
// The R query rows of a threadgroup (heads of the group x new tokens) share every code that is unpacked. Each
// simdgroup takes tiles of 32 rows of the sequence by itself and keeps its own running softmax; the threadgroup meets
// only before and after. Within a tile:
//   keys    KL lanes to a row; partial dots of a lane's KC channels, then an exchange that leaves lane = row
//   logits  lane = row: scale, bias, mask, running maximum; weights go to threadgroup memory
//   values  VC channels to a lane; accumulators [R, VC] stay in registers until the end
#pragma once

#include "operands.metal"

constexpr constant int TILE = 32;
constexpr constant int MAX_SPLITS = 128;

METAL_FUNC constexpr int gcd(int a, int b) {
  return b == 0 ? a : gcd(b, a % b);
}

// Lanes to a row of keys: a power of two, each with at least 24 channels (48 where many query rows need the registers),
// in whole bytes of every plane.
METAL_FUNC constexpr int key_lanes(int dim, int n_rows, int lanes = 8) {
  return lanes == 1 || (dim % (8 * lanes) == 0 && dim / lanes >= (n_rows > 2 ? 48 : 24))
      ? lanes
      : key_lanes(dim, n_rows, lanes / 2);
}

// Channels that a lane loads at a time: whole bytes, at most 32 of them.
METAL_FUNC constexpr int piece(int channels, int bits, int n = 1) {
  return channels % (8 * n) == 0 && channels / n * bits <= 256 ? channels / n : piece(channels, bits, n + 1);
}

// Channels of the values to a lane: its R accumulators for each have to fit in registers.
METAL_FUNC constexpr int value_channels(int dim, int n_rows) {
  return n_rows <= 2 && dim % 16 == 0 ? 16 : 8;
}

METAL_FUNC constexpr int blocks_per_tile(int group) {
  return group == 0 ? 0 : group >= TILE ? 1 : TILE / group;
}

// Sizes, in floats, of what lies in threadgroup memory; attend.py computes the same to choose N_SIMD.
template <typename T, int KIND, int BITS, int GROUP, int D, int R>
struct KeyLayout {
  static constexpr constant int KL = key_lanes(D, R);
  static constexpr constant int KC = D / KL;
  static constexpr constant int PIECE = piece(KC, BITS);
  static constexpr constant int STEP = KIND == AFFINE ? gcd(PIECE, GROUP) : PIECE;  // channels of one scale
  // s (q . c) + z sum(q) cancels: what is lost is below a half's precision, but not below a float's.
  static constexpr constant bool FACTORED = KIND == AFFINE && sizeof(T) == 2;
  static constexpr constant int ROW = KL * (KC + 4);  // a query: 4 floats between lanes' parts spread the banks
  static constexpr constant int SUMS = FACTORED ? R * (D / STEP) : 0;  // of queries, and of what offsets add
  using Codes = Raw<KIND, BITS, PIECE, sizeof(T) == 2>;
  static constexpr constant int META = KIND == AFFINE ? TILE * (D / GROUP)
      : KIND == CHANNEL                               ? blocks_per_tile(GROUP) * D
      : KIND == CODEBOOK                              ? blocks_per_tile(GROUP) * R
                                                      : 0;
};

template <typename T, int KIND, int BITS, int GROUP, int DV, int R>
struct ValueLayout {
  static constexpr constant int VC = value_channels(DV, R);
  static constexpr constant int VL = DV / VC;
  static constexpr constant int SIZE = GROUP;
  static constexpr constant int SLOTS = LANES / VL;  // rows at a time
  static constexpr constant int STEP = KIND == AFFINE ? gcd(VC, GROUP) : VC;
  // With few groups the scales are multiplied into the weights, once per row and group instead of once per lane.
  static constexpr constant bool FACTORED = KIND == AFFINE && sizeof(T) == 2;
  static constexpr constant bool FOLDED = FACTORED && DV <= 2 * GROUP && GROUP % VC == 0;
  static constexpr constant int COPIES = FOLDED ? DV / GROUP : 1;  // of the weights
  static constexpr constant int GROUPS = FOLDED ? COPIES : VC / STEP;
  static constexpr constant int META = KIND == AFFINE && !FOLDED ? TILE * (DV / GROUP) : 0;
  using Codes = Raw<KIND, BITS, VC, sizeof(T) == 2>;
};

// Floats of threadgroup memory of attend_decode.
template <typename T, int K_KIND, int K_BITS, int K_GROUP, int V_KIND, int V_BITS, int V_GROUP, int D, int DV, int R,
          int N_SIMD>
METAL_FUNC constexpr int attend_shared() {
  using K = KeyLayout<T, K_KIND, K_BITS, K_GROUP, D, R>;
  using V = ValueLayout<T, V_KIND, V_BITS, V_GROUP, DV, R>;
  constexpr int common = R * K::ROW + 2 * K::SUMS + 128;
  constexpr int loop = common + N_SIMD * (K::META + V::META + V::COPIES * TILE * R);
  constexpr int start = common + R * D;
  constexpr int last = N_SIMD * (LANES * V::VC + 2 * R);
  return loop > start ? (loop > last ? loop : last) : start > last ? start : last;
}

// Load the N halves of a row's scales and of its zeros beside each other; N is even or 1.
template <int N>
METAL_FUNC void load_meta(
    const device half* scales, const device half* zeros, long row, threadgroup half2* meta) {
  if constexpr (N % 2 == 0) {
    const device half2* s = (const device half2*)(scales + row * N);
    const device half2* z = (const device half2*)(zeros + row * N);
    UNROLL
    for (int g = 0; g < N / 2; g++) {
      half2 a = s[g], b = z[g];
      meta[2 * g] = half2(a.x, b.x);
      meta[2 * g + 1] = half2(a.y, b.y);
    }
  } else {
    UNROLL
    for (int g = 0; g < N; g++) {
      meta[g] = half2(scales[row * N + g], zeros[row * N + g]);
    }
  }
}

// One simdgroup's softmax over the rows that it takes, for R query rows and this lane's VC channels.
template <int R, int VC, int GROUPS>
struct Running {
  float peak[R];
  float total[R];          // of this lane's rows only
  float out[R][VC];        // of raw codes, until `finish`
  float zeros[GROUPS][R];   // weighted zeros of groups of channels
  float scales[GROUPS][R];  // and weighted scales, by which offsets of raw codes are too many

  METAL_FUNC Running() {
    UNROLL
    for (int r = 0; r < R; r++) {
      peak[r] = -INFINITY;
      total[r] = 0;
      UNROLL
      for (int i = 0; i < VC; i++) {
        out[r][i] = 0;
      }
      UNROLL
      for (int g = 0; g < GROUPS; g++) {
        zeros[g][r] = 0;
        scales[g][r] = 0;
      }
    }
  }

  // Take in a logit of this lane's row (-inf: none); return its weight. The peak is the simdgroup's.
  METAL_FUNC float take(int r, float s) {
    const float highest = metal::max(peak[r], metal::simd_max(s));
    const float safe = highest == -INFINITY ? 0 : highest;
    if (highest > peak[r]) {
      const float shrink = metal::fast::exp2(peak[r] - safe);
      peak[r] = highest;
      total[r] *= shrink;
      UNROLL
      for (int i = 0; i < VC; i++) {
        out[r][i] *= shrink;
      }
      UNROLL
      for (int g = 0; g < GROUPS; g++) {
        zeros[g][r] *= shrink;
        scales[g][r] *= shrink;
      }
    }
    const float weight = metal::fast::exp2(s - safe);
    total[r] += weight;
    return weight;
  }

  // Make values of raw codes. V: the ValueLayout; part, slot: which channels the lane has, and of which rows.
  template <typename V>
  METAL_FUNC void finish(int part, int slot) {
    if constexpr (!V::FACTORED) {
      return;
    }
    UNROLL
    for (int r = 0; r < R; r++) {
      if constexpr (V::FOLDED) {
        UNROLL
        for (int g = 0; g < GROUPS; g++) {
          zeros[g][r] = metal::simd_sum(zeros[g][r]);
          scales[g][r] = metal::simd_sum(scales[g][r]);
        }
      }
      UNROLL
      for (int i = 0; i < VC; i++) {
        float zero = zeros[V::FOLDED ? 0 : i / V::STEP][r];
        float scale = scales[V::FOLDED ? 0 : i / V::STEP][r];
        if constexpr (V::FOLDED) {
          // Sums over all rows of the simdgroup: one slot takes them.
          zero = slot > 0 ? 0 : part * VC < V::SIZE ? zero : zeros[GROUPS - 1][r];
          scale = slot > 0 ? 0 : part * VC < V::SIZE ? scale : scales[GROUPS - 1][r];
        }
        const float sum = V::Codes::OFFSET ? metal::fma(-float(V::Codes::OFFSET), scale, out[r][i]) : out[r][i];
        out[r][i] = metal::fma(sum, V::Codes::unshift(i), zero);
      }
    }
  }
};

// Add up the partial sums of 2 M lanes for 2 M rows so that each lane is left with one row's, in score[0]: a butterfly
// in which a lane gives away the half that it does not need. As a loop, halving M would keep the array out of registers.
template <int M, int R, typename S>
METAL_FUNC void exchange(thread S& score, int part) {
  if constexpr (M > 0) {
    const bool upper = part & M;
    UNROLL
    for (int p = 0; p < M; p++) {
      UNROLL
      for (int r = 0; r < R; r++) {
        const float given = upper ? score[p][r] : score[p + M][r];
        const float kept = upper ? score[p + M][r] : score[p][r];
        score[p][r] = kept + metal::simd_shuffle_xor(given, ushort(M));
      }
    }
    exchange<M / 2, R>(score, part);
  }
}

// Partial dots of R queries with this lane's channels of KL rows, exchanged so that `logit` is of the lane's own row.
template <typename T, int KIND, int BITS, int GROUP, int D, int R>
METAL_FUNC void dot_keys(
    Planes planes,
    long first,        // entry of the tile's first row
    int n_rows,        // rows of the tile that exist
    const threadgroup float* q,
    const threadgroup float* q_sums,
    const threadgroup float* levels,
    const threadgroup half2* meta,
    int lane,
    thread float* logit) {
  using K = KeyLayout<T, KIND, BITS, GROUP, D, R>;
  constexpr int KL = K::KL, KC = K::KC, PIECE = K::PIECE, STEP = K::STEP;
  const int part = lane % KL;
  float score[KL][R];
  UNROLL
  for (int p = 0; p < KL; p++) {
    UNROLL
    for (int r = 0; r < R; r++) {
      score[p][r] = 0;
    }
  }
  q += part * (KC + 4);

  UNROLL
  for (int i_piece = 0; i_piece < KC / PIECE; i_piece++) {
    Chunk<KIND, BITS, PIECE> chunk[KL];
    int row[KL];
    UNROLL
    for (int p = 0; p < KL; p++) {
      row[p] = metal::min(p * (TILE / KL) + lane / KL, n_rows - 1);
      chunk[p].load(planes.codes0, planes.codes1, first + row[p], part * (KC / PIECE) + i_piece, D);
    }
    UNROLL
    for (int i_step = 0; i_step < PIECE / STEP; i_step++) {
      const int at = i_piece * PIECE + i_step * STEP;  // channel, within the lane's part
      float dot[KL][R];
      UNROLL
      for (int p = 0; p < KL; p++) {
        UNROLL
        for (int r = 0; r < R; r++) {
          dot[p][r] = K::Codes::OFFSET && K::FACTORED
              ? q_sums[K::SUMS + r * (D / STEP) + (part * KC + at) / STEP]
              : 0.0f;
        }
      }
      UNROLL
      for (int i = 0; i < STEP; i += 4) {
        float x[KL][4];
        UNROLL
        for (int p = 0; p < KL; p++) {
          UNROLL
          for (int j = 0; j < 4; j++) {
            x[p][j] = K::Codes::at(chunk[p], i_step * STEP + i + j, levels);
            if constexpr (KIND == CHANNEL || (KIND == AFFINE && !K::FACTORED)) {
              const int channel = part * KC + at + i + j;
              const int block = GROUP >= TILE ? 0 : row[p] / GROUP;
              const float2 sz = float2(meta[KIND == CHANNEL ? block * D + channel : (row[p] * D + channel) / GROUP]);
              const float scale = sz.x * K::Codes::unshift(i_step * STEP + i + j);
              x[p][j] = metal::fma(x[p][j], scale, metal::fma(-float(K::Codes::OFFSET), scale, sz.y));
            }
          }
        }
        UNROLL
        for (int r = 0; r < R; r++) {
          const float4 y = *(const threadgroup float4*)(q + r * K::ROW + at + i);
          UNROLL
          for (int p = 0; p < KL; p++) {
            dot[p][r] = metal::fma(x[p][0], y.x, dot[p][r]);
            dot[p][r] = metal::fma(x[p][1], y.y, dot[p][r]);
            dot[p][r] = metal::fma(x[p][2], y.z, dot[p][r]);
            dot[p][r] = metal::fma(x[p][3], y.w, dot[p][r]);
          }
        }
      }
      UNROLL
      for (int p = 0; p < KL; p++) {
        if constexpr (K::FACTORED) {
          const int channel = part * KC + at;
          float2 sz = float2(meta[row[p] * (D / GROUP) + channel / GROUP]);
          UNROLL
          for (int r = 0; r < R; r++) {
            float zeros = metal::fma(sz.y, q_sums[r * (D / STEP) + channel / STEP], score[p][r]);
            score[p][r] = metal::fma(sz.x, dot[p][r], zeros);
          }
        } else {
          UNROLL
          for (int r = 0; r < R; r++) {
            score[p][r] += dot[p][r];
          }
        }
      }
    }
  }
  exchange<KL / 2, R>(score, part);
  UNROLL
  for (int r = 0; r < R; r++) {
    logit[r] = score[0][r];
  }
}

// Add the weighted rows of a tile to the accumulators.
template <typename T, int KIND, int BITS, int GROUP, int DV, int R, typename Run>
METAL_FUNC void add_values(
    Planes planes,
    long first,
    int n_rows,
    const threadgroup float* weights,  // [COPIES, TILE, R]
    const threadgroup float* levels,
    const threadgroup half2* meta,
    int lane,
    thread Run& run) {
  using V = ValueLayout<T, KIND, BITS, GROUP, DV, R>;
  constexpr int VC = V::VC, STEP = V::STEP;
  const int part = lane % V::VL;
  const int slot = lane / V::VL;
  if (slot >= V::SLOTS) {
    return;
  }
  if constexpr (V::FOLDED) {
    weights += part * VC / GROUP * TILE * R;
  }
#pragma unroll(4)
  for (int row = slot; row < n_rows; row += V::SLOTS) {
    Chunk<KIND, BITS, VC> chunk;
    chunk.load(planes.codes0, planes.codes1, first + row, part, DV);
    float w[R];
    UNROLL
    for (int r = 0; r < R; r++) {
      w[r] = weights[row * R + r];
    }
    UNROLL
    for (int g = 0; g < VC / STEP; g++) {
      float ws[R];
      float2 sz = float2(1, 0);
      if constexpr (KIND == AFFINE && !V::FOLDED) {
        sz = float2(meta[row * (DV / GROUP) + (part * VC + g * STEP) / GROUP]);
      }
      if constexpr (V::FACTORED && !V::FOLDED) {
        UNROLL
        for (int r = 0; r < R; r++) {
          ws[r] = w[r] * sz.x;
          run.zeros[g][r] = metal::fma(w[r], sz.y, run.zeros[g][r]);
          if constexpr (V::Codes::OFFSET > 0) {
            run.scales[g][r] += ws[r];
          }
        }
      } else {
        UNROLL
        for (int r = 0; r < R; r++) {
          ws[r] = w[r];
        }
      }
      UNROLL
      for (int i = 0; i < STEP; i++) {
        float x = V::Codes::at(chunk, g * STEP + i, levels);
        if constexpr (KIND == AFFINE && !V::FACTORED) {
          x = metal::fma(x, sz.x * V::Codes::unshift(g * STEP + i), sz.y);
        }
        UNROLL
        for (int r = 0; r < R; r++) {
          run.out[r][g * STEP + i] = metal::fma(ws[r], x, run.out[r][g * STEP + i]);
        }
      }
    }
  }
}

// What a segment of the sequence (the body, or the tail) adds to its rows' logits.
template <int MASKED, typename M>
struct Logits {
  const device float* bias;  // of the segment's first row, or unused
  const device M* mask;
  Shape shape;
  int first_row;    // tail: row of the buffer that is row 0 here
  int seen;         // tail: rows that the first of the new tokens sees
  long mask_lane;   // of this sequence and KV head

  // Logit of row i for query row `query`; `is_tail` is known at compile time.
  template <bool BIASED, bool TAIL>
  METAL_FUNC float at(float s, int i, int query) const {
    const int head = shape.n_queries == 1 ? query : query / shape.n_queries;
    const int token = query - head * shape.n_queries;
    if constexpr (BIASED) {
      s += bias[i] * M_LOG2E_F;
    }
    if constexpr (TAIL) {
      s = i < seen + token ? s : -INFINITY;
    }
    const int column = TAIL ? shape.tail_column(first_row + i) : shape.body_column(i);
    s = shape.in_window(column, token) ? s : -INFINITY;
    if constexpr (MASKED) {
      s = masked<MASKED>(s, mask, mask_lane + long(head) * shape.mask_head + long(token) * shape.mask_query + column);
    }
    return s;
  }
};

// Run the online softmax over rows `begin .. stop` of a segment; `first` is the planes' entry of row 0.
template <typename T, int K_KIND, int K_BITS, int K_GROUP, int V_KIND, int V_BITS, int V_GROUP, int D, int DV, int R,
          int N_SIMD, bool BIASED, bool TAIL, typename L, typename Run>
METAL_FUNC void attend_rows(
    Planes keys,
    Planes values,
    long first,
    int begin,
    int stop,
    int first_query,
    int n_queries,  // query rows of this KV head
    L logits,
    threadgroup float* shared,
    uint simd_group,
    uint lane,
    thread Run& run) {
  using K = KeyLayout<T, K_KIND, K_BITS, K_GROUP, D, R>;
  using V = ValueLayout<T, V_KIND, V_BITS, V_GROUP, DV, R>;
  constexpr int UNIT = (K_KIND == CHANNEL || K_KIND == CODEBOOK) && K_GROUP > TILE ? K_GROUP : TILE;
  threadgroup float* q = shared;
  threadgroup float* q_sums = q + R * K::ROW;
  threadgroup float* k_levels = q_sums + 2 * K::SUMS;
  threadgroup float* v_levels = k_levels + 64;
  threadgroup float* own = v_levels + 64 + simd_group * (K::META + V::META + V::COPIES * TILE * R);
  threadgroup half2* k_meta = (threadgroup half2*)own;
  threadgroup float* k_means = own;
  threadgroup half2* v_meta = (threadgroup half2*)(own + K::META);
  threadgroup float* weights = own + K::META + V::META;

  for (int unit = begin + simd_group * UNIT; unit < stop; unit += N_SIMD * UNIT) {
    if constexpr (K_KIND == CHANNEL) {
      const int n_blocks = metal::min(blocks_per_tile(K_GROUP), (stop - unit + K_GROUP - 1) / K_GROUP);
      const long at = (first + unit) / K_GROUP * D;
      for (int i = lane; i < n_blocks * D / 2; i += LANES) {
        half2 s = ((const device half2*)(keys.scales + at))[i];
        half2 z = ((const device half2*)(keys.offsets + at))[i];
        k_meta[2 * i] = half2(s.x, z.x);
        k_meta[2 * i + 1] = half2(s.y, z.y);
      }
    }
    if constexpr (K_KIND == CODEBOOK && K_GROUP > 0) {
      // Every row of a block has the block's mean in it: its dot with the query is one number for all of them.
      for (int block = 0; block < blocks_per_tile(K_GROUP) && unit + block * K_GROUP < stop; block++) {
        const device half* mean = keys.offsets + ((first + unit) / K_GROUP + block) * D;
        float dot[R] = {0};
        for (int c = 2 * lane; c < D; c += 2 * LANES) {
          const float2 x = float2(*(const device half2*)(mean + c));
          UNROLL
          for (int r = 0; r < R; r++) {
            const threadgroup float* y = q + r * K::ROW + c / K::KC * (K::KC + 4) + c % K::KC;
            dot[r] = metal::fma(x.x, y[0], metal::fma(x.y, y[1], dot[r]));
          }
        }
        UNROLL
        for (int r = 0; r < R; r++) {
          const float sum = metal::simd_sum(dot[r]);
          if (lane == 0) {
            k_means[block * R + r] = sum;
          }
        }
      }
    }
    for (int tile = unit; tile < metal::min(unit + UNIT, stop); tile += TILE) {
      const int n_rows = metal::min(TILE, stop - tile);
      if constexpr (K_KIND == AFFINE) {
        if (int(lane) < n_rows) {
          load_meta<D / K_GROUP>(keys.scales, keys.offsets, first + tile + lane, k_meta + lane * (D / K_GROUP));
        }
      }
      if constexpr (V::META > 0) {
        if (int(lane) < n_rows) {
          load_meta<DV / V_GROUP>(values.scales, values.offsets, first + tile + lane, v_meta + lane * (DV / V_GROUP));
        }
      }
      metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);

      float logit[R];
      dot_keys<T, K_KIND, K_BITS, K_GROUP, D, R>(
          keys, first + tile, n_rows, q, q_sums, k_levels, k_meta, lane, logit);

      const int row = (lane % K::KL) * (TILE / K::KL) + lane / K::KL;
      const bool exists = row < n_rows;
      float k_scale = 1, v_scale = 1;
      if (exists) {
        if constexpr (K_KIND == CODEBOOK) {
          k_scale = keys.scales[first + tile + row];
        }
        if constexpr (V_KIND == CODEBOOK) {
          v_scale = values.scales[first + tile + row];
        }
      }
      float2 v_affine[V::COPIES];
      if constexpr (V::FOLDED) {
        UNROLL
        for (int g = 0; g < V::COPIES; g++) {
          const long at = (first + tile + row) * V::COPIES + g;
          v_affine[g] = exists ? float2(values.scales[at], values.offsets[at]) : float2(0, 0);
        }
      }
      UNROLL
      for (int r = 0; r < R; r++) {
        float s = -INFINITY;
        if (exists && first_query + r < n_queries) {
          s = logit[r] * k_scale;
          if constexpr (K_KIND == CODEBOOK && K_GROUP > 0) {
            s += k_means[(K_GROUP >= TILE ? 0 : row / K_GROUP) * R + r];
          }
          s = logits.template at<BIASED, TAIL>(s, tile + row, first_query + r);
        }
        const float weight = run.take(r, s);
        if constexpr (V::FOLDED) {
          UNROLL
          for (int g = 0; g < V::COPIES; g++) {
            const float scaled = weight * v_affine[g].x;
            weights[(g * TILE + row) * R + r] = scaled;
            run.scales[g][r] += scaled;
            run.zeros[g][r] = metal::fma(weight, v_affine[g].y, run.zeros[g][r]);
          }
        } else {
          weights[row * R + r] = weight * v_scale;
        }
      }
      metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
      add_values<T, V_KIND, V_BITS, V_GROUP, DV, R>(
          values, first + tile, n_rows, weights, v_levels, v_meta, lane, run);
      metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
    }
  }
  run.template finish<V>(lane % V::VL, lane / V::VL);
}

// Put the queries into threadgroup memory: scaled, in the keys' basis, in lanes' parts, with the sums that zeros need.
template <typename T, int KIND, int BITS, int GROUP, bool ROTATED, int D, int R>
METAL_FUNC void load_queries(
    const device T* queries,  // of query row 0 of this KV head
    float scale,
    const device float* signs,
    int first_query,
    int n_queries,
    threadgroup float* shared,
    uint thread_index,
    uint n_threads) {
  using K = KeyLayout<T, KIND, BITS, GROUP, D, R>;
  threadgroup float* q_sums = shared + R * K::ROW;
  threadgroup float* plain = q_sums + 2 * K::SUMS + 128;
  for (int i = thread_index; i < R * D; i += n_threads) {
    const int query = first_query + i / D;
    float x = query < n_queries ? float(queries[long(query) * D + i % D]) * scale * M_LOG2E_F : 0.0f;
    if constexpr (ROTATED) {
      x *= signs[i % D];
    }
    plain[i] = x;
  }
  if constexpr (ROTATED) {
    hadamard<D>(plain, R, thread_index, n_threads);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int i = thread_index; i < R * D; i += n_threads) {
    const int c = i % D;
    const float unshift = K::FACTORED ? K::Codes::unshift(c % K::KC % K::PIECE) : 1.0f;
    shared[i / D * K::ROW + c / K::KC * (K::KC + 4) + c % K::KC] = plain[i] * unshift;
  }
  if constexpr (K::FACTORED) {
    for (int i = thread_index; i < R * (D / K::STEP); i += n_threads) {
      float sum = 0, offset = 0;
      for (int j = 0; j < K::STEP; j++) {
        const float x = plain[i * K::STEP + j];
        sum += x;
        offset -= x * (K::Codes::OFFSET * K::Codes::unshift((i * K::STEP + j) % D % K::KC % K::PIECE));
      }
      q_sums[i] = sum;
      q_sums[K::SUMS + i] = offset;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Merge the simdgroups' softmaxes and write the partial result and its log-sum-exp (base 2).
template <typename T, int DV, int R, int VC, int N_SIMD, typename Run>
METAL_FUNC void write_partial(
    thread Run& run,
    device T* partial,      // [rows, n_splits, DV] at (query row 0 of this block, split)
    device float* lse,      // [rows, n_splits]
    int n_splits,
    int n_rows,             // query rows of this block that exist
    threadgroup float* shared,
    uint simd_group,
    uint lane) {
  constexpr int VL = DV / VC, SLOTS = LANES / VL;
  threadgroup float* peaks = shared + N_SIMD * LANES * VC;
  threadgroup float* totals = peaks + N_SIMD * R;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int r = 0; r < R; r++) {
    const float total = metal::simd_sum(run.total[r]);
    if (lane == 0) {
      peaks[simd_group * R + r] = run.peak[r];
      totals[simd_group * R + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int part = lane % VL;
  const int slot = lane / VL;
  UNROLL
  for (int r = 0; r < R; r++) {
    if (r >= n_rows) {
      continue;
    }
    const bool there = lane < N_SIMD;
    const float own = there ? peaks[lane * R + r] : -INFINITY;
    const float peak = metal::simd_max(own);
    const float safe = peak == -INFINITY ? 0 : peak;
    const float total = metal::simd_sum(there ? totals[lane * R + r] * metal::fast::exp2(own - safe) : 0.0f);
    const float shrink = metal::fast::exp2(run.peak[r] - safe);
    if (slot < SLOTS) {
      UNROLL
      for (int i = 0; i < VC; i++) {
        shared[(simd_group * SLOTS + slot) * DV + part * VC + i] = run.out[r][i] * shrink;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int c = simd_group * LANES + lane; c < DV; c += N_SIMD * LANES) {
      float sum = 0;
      for (int s = 0; s < N_SIMD * SLOTS; s++) {
        sum += shared[s * DV + c];
      }
      partial[long(r) * n_splits * DV + c] = T(total > 0 ? sum / total : 0.0f);
    }
    if (simd_group == 0 && lane == 0) {
      lse[long(r) * n_splits] = total > 0 ? safe + metal::precise::log2(total) : -INFINITY;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

template <typename T, int D, int DV, int K_KIND, int K_BITS, int K_GROUP, bool K_ROTATED, int V_KIND, int V_BITS,
          int V_GROUP, bool V_ROTATED, bool BIASED, int MASKED, int R, int N_SIMD, typename M>
METAL_FUNC void attend_decode(
    const device T* queries,      // [B, Hq, L, D]
    float scale,
    Shape shape,
    const constant int* splits,   // splits of the body and rows of one, then of the tail
    const device int* lanes,      // [B * H, 3]
    Planes keys,
    const device float* k_levels,
    const device float* k_signs,
    Planes values,
    const device float* v_levels,
    const device float* body_bias,
    const device T* tail_keys,    // [B, H, capacity, D]
    const device T* tail_values,  // [B, H, capacity, DV]
    const device float* tail_bias,
    const device M* mask,
    device T* partial,            // [B * Hq * L, splits, DV]
    device float* lse,            // [B * Hq * L, splits]
    threadgroup float* shared,
    uint3 group,
    uint simd_group,
    uint lane) {
  using V = ValueLayout<T, V_KIND, V_BITS, V_GROUP, DV, R>;
  constexpr int TAIL = kind_of<T>();
  constexpr int TAIL_BITS = sizeof(T) * 8;
  static_assert(attend_shared<T, K_KIND, K_BITS, K_GROUP, V_KIND, V_BITS, V_GROUP, D, DV, R, N_SIMD>() <= 8192, "32 KB");
  const int n_body = splits[0], body_step = splits[1];
  const int n_tail = splits[2], tail_step = splits[3];
  const int i_lane = group.z;
  const Lane where(lanes, i_lane);
  const int n_queries = shape.group * shape.n_queries;
  const int first_query = group.y * R;
  const int split = group.x;
  const uint thread_index = simd_group * LANES + lane;
  const int i_batch = i_lane / shape.n_kv_heads;
  const long mask_lane = long(i_batch) * shape.mask_batch + long(i_lane % shape.n_kv_heads) * shape.group * shape.mask_head;
  queries += long(i_lane) * n_queries * D;

  Running<R, V::VC, V::GROUPS> run;
  if (split < n_body) {
    using K = KeyLayout<T, K_KIND, K_BITS, K_GROUP, D, R>;
    const int begin = split * body_step;
    const int stop = metal::min(begin + body_step, where.length);
    if (begin < stop) {
      threadgroup float* tables = shared + R * K::ROW + 2 * K::SUMS;
      for (int i = thread_index; i < 64; i += N_SIMD * LANES) {
        if constexpr (K_KIND == CODEBOOK) {
          if (i < (1 << K_BITS)) {
            tables[i] = k_levels[i];
          }
        }
        if constexpr (V_KIND == CODEBOOK) {
          if (i < (1 << V_BITS)) {
            tables[64 + i] = v_levels[i];
          }
        }
      }
      load_queries<T, K_KIND, K_BITS, K_GROUP, K_ROTATED, D, R>(
          queries, scale, k_signs, first_query, n_queries, shared, thread_index, N_SIMD * LANES);
      Logits<MASKED, M> logits{body_bias + where.start, mask, shape, 0, 0, mask_lane};
      attend_rows<T, K_KIND, K_BITS, K_GROUP, V_KIND, V_BITS, V_GROUP, D, DV, R, N_SIMD, BIASED, false>(
          keys, values, where.start, begin, stop, first_query, n_queries, logits, shared, simd_group, lane, run);
    }
  } else {
    const int n_rows = shape.end - where.begin;
    const int begin = (split - n_body) * tail_step;
    const int stop = metal::min(begin + tail_step, n_rows);
    if (begin < stop) {
      load_queries<T, TAIL, TAIL_BITS, 0, false, D, R>(
          queries, scale, k_signs, first_query, n_queries, shared, thread_index, N_SIMD * LANES);
      const long first = long(i_lane) * shape.capacity + where.begin;
      const Planes k = {(const device uchar*)tail_keys, nullptr, nullptr, nullptr};
      const Planes v = {(const device uchar*)tail_values, nullptr, nullptr, nullptr};
      Logits<MASKED, M> logits{
          tail_bias + first, mask, shape, where.begin, n_rows - shape.n_queries + 1, mask_lane};
      attend_rows<T, TAIL, TAIL_BITS, 0, TAIL, TAIL_BITS, 0, D, DV, R, N_SIMD, BIASED, true>(
          k, v, first, begin, stop, first_query, n_queries, logits, shared, simd_group, lane, run);
    }
  }
  const int n_splits = n_body + n_tail;
  const long at = (long(i_lane) * n_queries + first_query) * n_splits + split;
  write_partial<T, DV, R, V::VC, N_SIMD>(
      run, partial + at * DV, lse + at, n_splits, metal::min(R, n_queries - first_query), shared, simd_group, lane);
}

// Merge the splits of one query row: those of the body first, in the values' basis, then those of the tail.
template <typename T, int DV, bool V_ROTATED, int N_THREADS>
METAL_FUNC void attend_merge(
    const device T* partial,     // [B * Hq * L, splits, DV]
    const device float* lse,     // [B * Hq * L, splits]
    const device float* sinks,   // [Hq]
    const device float* signs,   // [DV]
    const constant int* numbers,  // Hq, L, splits of the body, of the tail, whether there are sinks
    device T* out,               // [B * Hq * L, DV]
    threadgroup float* x,        // [DV]
    threadgroup float* weights,  // [MAX_SPLITS]
    int i_row,
    uint thread_index) {
  const int n_heads = numbers[0], n_queries = numbers[1], n_body = numbers[2], n_splits = n_body + numbers[3];
  const bool has_sinks = numbers[4];
  lse += long(i_row) * n_splits;
  partial += long(i_row) * n_splits * DV;
  for (int s = thread_index; s < n_splits; s += N_THREADS) {
    weights[s] = lse[s];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float sink = has_sinks ? sinks[i_row / n_queries % n_heads] * M_LOG2E_F : -INFINITY;
  float peak = sink;
  for (int s = 0; s < n_splits; s++) {
    peak = metal::max(peak, weights[s]);
  }
  const float safe = peak == -INFINITY ? 0 : peak;
  float total = metal::fast::exp2(sink - safe);
  for (int s = 0; s < n_splits; s++) {
    total += metal::fast::exp2(weights[s] - safe);
  }
  for (int c = thread_index; c < DV; c += N_THREADS) {
    float sum = 0;
    for (int s = 0; s < n_body; s++) {
      sum = metal::fma(metal::fast::exp2(weights[s] - safe), float(partial[s * DV + c]), sum);
    }
    x[c] = sum;
  }
  if constexpr (V_ROTATED) {
    hadamard<DV>(x, 1, thread_index, N_THREADS);
  }
  for (int c = thread_index; c < DV; c += N_THREADS) {
    float sum = V_ROTATED ? x[c] * signs[c] : x[c];
    for (int s = n_body; s < n_splits; s++) {
      sum = metal::fma(metal::fast::exp2(weights[s] - safe), float(partial[s * DV + c]), sum);
    }
    out[long(i_row) * DV + c] = T(total > 0 ? sum / total : 0.0f);
  }
}
