// Tiles of decoded rows in threadgroup memory, and products of 8 x 8 fragments with them.
#pragma once

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

#include "operands.metal"

// Floats between rows of a tile of `dim` channels, dim a multiple of 8. The 4 of padding spread what a simdgroup reads
// at a time over all banks.
METAL_FUNC constexpr int row_width(int dim) {
  return dim + 4;
}

// Rows that a thread decodes one after another, so that blocks of rows have their scales read once for all of them.
METAL_FUNC constexpr int run_of_rows(int chunks, int threads, int run = 1) {
  return 2 * run * threads <= chunks && run < 8 ? run_of_rows(chunks, threads, 2 * run) : run;
}

// Rows of DIM channels in planes of a format.
template <int DIM_, int KIND_, int BITS_, int GROUP_>
struct Source {
  static constexpr constant int DIM = DIM_;
  static constexpr constant int KIND = KIND_;
  static constexpr constant int BITS = BITS_;
  static constexpr constant int GROUP = GROUP_;

  Planes planes;
  const threadgroup float* levels;
  long first;  // entry of row 0
};

template <int DIM, typename T>
METAL_FUNC Source<DIM, kind_of<T>(), 8 * sizeof(T), 0> exact_rows(const device T* rows) {
  return {{(const device uchar*)rows, nullptr, nullptr, nullptr}, nullptr, 0};
}

METAL_FUNC void load_halves(const device half* p, thread float* x) {
  const float4 low = float4(((const device half4*)p)[0]), high = float4(((const device half4*)p)[1]);
  for (int i = 0; i < 4; i++) {
    x[i] = low[i];
    x[4 + i] = high[i];
  }
}

// Decode rows `row .. row + n` to a tile of ROWS rows of CHANNELS channels, times `factor` where they are exact, and
// clear what has no row or no channel: it is multiplied too.
template <int ROWS, int CHANNELS, int WIDTH, int THREADS, typename S>
METAL_FUNC void load_tile(S source, int row, int n, float factor, threadgroup float* tile, uint thread_index) {
  constexpr int KIND = S::KIND, GROUP = S::GROUP, DIM = S::DIM;
  constexpr int CHUNKS = CHANNELS / 8;
  constexpr int RUN = run_of_rows(ROWS * CHUNKS, THREADS);
  constexpr bool BY_CHANNEL = KIND == CHANNEL || (KIND == CODEBOOK && GROUP > 0);
  static_assert(ROWS % RUN == 0 && CHANNELS % 8 == 0 && WIDTH % 4 == 0, "whole chunks");
  for (uint i = thread_index; i < ROWS / RUN * CHUNKS; i += THREADS) {
    const int chunk_index = i % CHUNKS;
    float scales[8], offsets[8];
    UNROLL
    for (int j = 0; j < RUN; j++) {
      const int r = int(i / CHUNKS) * RUN + j;
      float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (r < n && (CHANNELS == DIM || chunk_index < DIM / 8)) {
        const long at = source.first + row + r;
        Chunk<KIND, S::BITS, 8> chunk;
        chunk.load(source.planes.codes0, source.planes.codes1, at, chunk_index, DIM);
        if constexpr (BY_CHANNEL) {
          // A block has at least 8 rows and starts at a multiple of them, so a run of rows is within one.
          if (j == 0) {
            const long entry = long(uint(at) / GROUP) * DIM + 8 * chunk_index;
            load_halves(source.planes.offsets + entry, offsets);
            if constexpr (KIND == CHANNEL) {
              load_halves(source.planes.scales + entry, scales);
            }
          }
        }
        float scale = factor, offset = 0;
        if constexpr (KIND == AFFINE) {
          const long entry = at * (DIM / GROUP) + 8 * chunk_index / GROUP;
          scale = source.planes.scales[entry];
          offset = source.planes.offsets[entry];
        } else if constexpr (KIND == CODEBOOK) {
          scale = source.planes.scales[at];
        }
        UNROLL
        for (int c = 0; c < 8; c++) {
          x[c] = metal::fma(
              KIND == CHANNEL ? scales[c] : scale, chunk.value(c, source.levels), BY_CHANNEL ? offsets[c] : offset);
        }
      }
      threadgroup float4* to = (threadgroup float4*)(tile + r * WIDTH + 8 * chunk_index);
      to[0] = float4(x[0], x[1], x[2], x[3]);
      to[1] = float4(x[4], x[5], x[6], x[7]);
    }
  }
}

// The two neighbouring numbers of an 8 x 8 fragment that a lane holds: (row, column) and (row, column + 1).
struct Place {
  short row;
  short column;

  METAL_FUNC Place(uint lane)
      : row(((lane / 4) & 4) + (lane / 2) % 4), column(((lane / 4) & 2) * 2 + (lane % 2) * 2) {}
};

// a b + c.
METAL_FUNC float2 multiply_add(float2 a, float2 b, float2 c) {
  metal::simdgroup_matrix<float, 8, 8> x, y, z;
  reinterpret_cast<thread float2&>(x.thread_elements()) = a;
  reinterpret_cast<thread float2&>(y.thread_elements()) = b;
  reinterpret_cast<thread float2&>(z.thread_elements()) = c;
  simdgroup_multiply_accumulate(z, x, y, z);
  return reinterpret_cast<thread float2&>(z.thread_elements());
}

// N fragments hold 8 N channels. Which ones each holds is free, so it is chosen such that what a lane reads of a tile
// for several fragments lies side by side: 4 (or 2) of them where the channels are summed over, 2 where they stay.

METAL_FUNC constexpr int summed_together(int n) {
  return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
}

template <int N>
METAL_FUNC int summed_channel(int i, int column) {
  constexpr int V = summed_together(N);
  return i / V * 8 * V + column * V + i % V;
}

template <int N>
METAL_FUNC int kept_channel(int i, int column) {
  return N % 2 == 0 ? i / 2 * 16 + 2 * column + i % 2 * 2 : 8 * i + column;
}

// Logits [8, 8 * N_ROWS] of 8 rows with the rows of a tile, summed over the channels of the N fragments.
template <int N, int N_ROWS, int WIDTH>
METAL_FUNC void dot_rows(const thread float2* rows, const threadgroup float* tile, Place at, thread float2* logits) {
  constexpr int V = summed_together(N);
  using Vector = metal::vec<float, V == 1 ? 2 : V>;
  tile += at.column * WIDTH + at.row * V;
  UNROLL
  for (int f = 0; f < N_ROWS; f++) {
    logits[f] = float2(0);
  }
  UNROLL
  for (int i = 0; i < N; i += V) {
    // Two chains of sums side by side hide the latency of one, with little held in registers.
    UNROLL
    for (int pair = 0; pair < N_ROWS; pair += 2) {
      Vector x[2], y[2];
      UNROLL
      for (int f = 0; f < 2; f++) {
        const threadgroup float* from = tile + 8 * (pair + f) * WIDTH + 8 * i;
        if constexpr (V == 1) {
          x[f] = Vector(from[0]);
          y[f] = Vector(from[WIDTH]);
        } else {
          x[f] = *(const threadgroup Vector*)from;
          y[f] = *(const threadgroup Vector*)(from + WIDTH);
        }
      }
      UNROLL
      for (int j = 0; j < V; j++) {
        UNROLL
        for (int f = 0; f < 2; f++) {
          logits[pair + f] = multiply_add(rows[i + j], float2(x[f][j], y[f][j]), logits[pair + f]);
        }
      }
    }
  }
}

// Add weights [8, 8 * N_ROWS] times the rows of a tile to the N fragments of an output.
template <int N, int N_ROWS, int WIDTH>
METAL_FUNC void add_rows(const thread float2* weights, const threadgroup float* tile, Place at, thread float2* out) {
  constexpr int V = N % 2 == 0 ? 2 : 1;
  tile += at.row * WIDTH + at.column * V;
  UNROLL
  for (int f = 0; f < N_ROWS; f++) {
    UNROLL
    for (int i = 0; i < N; i += V) {
      const threadgroup float* from = tile + 8 * f * WIDTH + 8 * i;
      if constexpr (V == 1) {
        out[i] = multiply_add(weights[f], *(const threadgroup float2*)from, out[i]);
      } else {
        const float4 x = *(const threadgroup float4*)from;
        out[i] = multiply_add(weights[f], x.xy, out[i]);
        out[i + 1] = multiply_add(weights[f], x.zw, out[i + 1]);
      }
    }
  }
}

// Maximum and sum of a fragment's row, given the lane's own part.
METAL_FUNC float row_max(float x) {
  x = metal::max(x, metal::simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, metal::simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float row_sum(float x) {
  x += metal::simd_shuffle_xor(x, ushort(1));
  return x + metal::simd_shuffle_xor(x, ushort(8));
}
