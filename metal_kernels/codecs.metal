// Rows as they are stored, read in chunks of channels. docs/format.md states the bytes; kvmlx/layout.py packs them.
#pragma once

#include <metal_stdlib>

// What a plane of codes holds. The launchers name the same numbers (formats.py).
constexpr constant int FLOAT16 = 0;
constexpr constant int BFLOAT16 = 1;
constexpr constant int FLOAT32 = 2;
constexpr constant int AFFINE = 3;    // scale * code + zero, a scale and a zero per group of channels of a row
constexpr constant int CHANNEL = 4;   // scale * code + zero, a scale and a zero per channel of a block of rows
constexpr constant int CODEBOOK = 5;  // scale * levels[code], a scale per row; with blocks, plus a mean per channel

constexpr constant int LANES = 32;

// Kind of rows of the model's dtype.
template <typename T>
METAL_FUNC constexpr int kind_of() {
  return sizeof(T) == 4 ? FLOAT32 : metal::is_same_v<T, half> ? FLOAT16 : BFLOAT16;
}

// Arrays that are to live in registers must be indexed by constants.
#define UNROLL _Pragma("clang loop unroll(full)")

// Codes of 3, 5 and 6 bits lie in two planes of widths that divide a byte: 2 + 1, 4 + 1, 4 + 2.
METAL_FUNC constexpr int low_bits(int bits) {
  return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits;
}

METAL_FUNC constexpr int words(int bytes) {
  return (bytes + 3) / 4;
}

METAL_FUNC float power_of_two(int n) {
  return as_type<float>(uint(127 + n) << 23);
}

// Load BYTES bytes into words w (a thread uint*), aligned to the largest power of two up to 16 that divides BYTES, in as few loads as there can be.
template <int BYTES, typename W>
METAL_FUNC void load_bytes(const device uchar* p, W w) {
  if constexpr (BYTES % 16 == 0) {
    UNROLL
    for (int i = 0; i < BYTES / 16; i++) {
      uint4 x = ((const device uint4*)p)[i];
      w[4 * i] = x.x;
      w[4 * i + 1] = x.y;
      w[4 * i + 2] = x.z;
      w[4 * i + 3] = x.w;
    }
  } else if constexpr (BYTES % 8 == 0) {
    UNROLL
    for (int i = 0; i < BYTES / 8; i++) {
      uint2 x = ((const device uint2*)p)[i];
      w[2 * i] = x.x;
      w[2 * i + 1] = x.y;
    }
  } else if constexpr (BYTES % 4 == 0) {
    UNROLL
    for (int i = 0; i < BYTES / 4; i++) {
      w[i] = ((const device uint*)p)[i];
    }
  } else if constexpr (BYTES % 2 == 0) {
    UNROLL
    for (int i = 0; i < BYTES / 2; i++) {
      uint x = ((const device ushort*)p)[i];
      w[i / 2] = i % 2 ? w[i / 2] | (x << 16) : x;
    }
  } else {
    UNROLL
    for (int i = 0; i < BYTES; i++) {
      uint x = p[i];
      w[i / 4] = i % 4 ? w[i / 4] | (x << (8 * (i % 4))) : x;
    }
  }
}

// CHANNELS consecutive codes of one row, in registers. Indices into it must be known when the loops are unrolled.
template <int KIND, int BITS, int CHANNELS>
struct Chunk {
  static constexpr constant int LOW = KIND <= FLOAT32 ? BITS : low_bits(BITS);
  static constexpr constant int HIGH = BITS - LOW;
  static constexpr constant int LOW_BYTES = CHANNELS * LOW / 8;
  static constexpr constant int HIGH_BYTES = CHANNELS * HIGH / 8;

  uint low[words(LOW_BYTES)];
  uint high[HIGH ? words(HIGH_BYTES) : 1];

  // Read chunk `i_chunk` of row `row`, of rows of `dim` channels.
  METAL_FUNC void load(const device uchar* p_low, const device uchar* p_high, long row, int i_chunk, int dim) {
    load_bytes<LOW_BYTES>(p_low + row * (dim * LOW / 8) + i_chunk * LOW_BYTES, low);
    if constexpr (HIGH > 0) {
      load_bytes<HIGH_BYTES>(p_high + row * (dim * HIGH / 8) + i_chunk * HIGH_BYTES, high);
    }
  }

  METAL_FUNC uint code(int i) const {
    uint c = (low[i * LOW / 32] >> (i * LOW % 32)) & ((1u << LOW) - 1);
    if constexpr (HIGH > 0) {
      c |= ((high[i * HIGH / 32] >> (i * HIGH % 32)) & ((1u << HIGH) - 1)) << LOW;
    }
    return c;
  }

  // The number at channel i, before scale and zero. `levels`: the code book, where there is one.
  METAL_FUNC float value(int i, const threadgroup float* levels) const {
    if constexpr (KIND == FLOAT32) {
      return as_type<float>(low[i]);
    } else if constexpr (KIND == FLOAT16) {
      return float(as_type<half2>(low[i / 2])[i % 2]);
    } else if constexpr (KIND == BFLOAT16) {
      return as_type<float>(i % 2 ? low[i / 2] & 0xffff0000u : low[i / 2] << 16);
    } else if constexpr (KIND == CODEBOOK) {
      return levels[code(i)];
    } else {
      return float(code(i));
    }
  }

};

// Codes as floats at the price of a mask: code(i) * 2^shift(i) + OFFSET. Who multiplies by it takes the power of two out
// of the other factor, which is exact, and the offset out of the sum.
//
// HALF, for 2, 4 and 8 bits: the codes of two channels are masked at once into the mantissas of a half2 of 1024s, two
// bits or more up so that 1024 does not drown them. There is no conversion to wait for: a GPU's float instructions
// read halves. Otherwise a code is masked where it stands and converted.
template <int KIND, int BITS, int CHANNELS, bool HALVES>
struct Raw {
  using C = Chunk<KIND, BITS, CHANNELS>;
  static constexpr constant bool AS_HALF = HALVES && (KIND == AFFINE || KIND == CHANNEL) && C::HIGH == 0;
  static constexpr constant int OFFSET = AS_HALF ? 1024 : 0;

  static METAL_FUNC constexpr int shift(int i) {
    if constexpr (AS_HALF) {
      return i * BITS % 16 < 8 ? i * BITS % 16 + 2 : i * BITS % 16 - 6;
    } else {
      return (KIND == AFFINE || KIND == CHANNEL) && C::HIGH == 0 ? i * BITS % 32 : 0;
    }
  }

  // Factor that makes a code of code(i) * 2^shift(i).
  static METAL_FUNC float unshift(int i) {
    return power_of_two(-shift(i));
  }

  static METAL_FUNC float at(const thread C& chunk, int i, const threadgroup float* levels) {
    if constexpr (AS_HALF) {
      const uint word = chunk.low[i * BITS / 32];
      const uint moved = i * BITS % 16 < 8 ? word << 2 : word >> 6;
      const uint mask = ((1u << BITS) - 1) << shift(i);
      return float(as_type<half2>((moved & (mask | mask << 16)) | 0x64006400u)[i * BITS / 16 % 2]);
    } else if constexpr ((KIND == AFFINE || KIND == CHANNEL) && C::HIGH == 0) {
      return float(chunk.low[i * BITS / 32] & (((1u << BITS) - 1) << (i * BITS % 32)));
    } else if constexpr (KIND == AFFINE || KIND == CHANNEL) {
      return as_type<float>(chunk.code(i) | 0x4b000000u) - 8388608.0f;  // 2^23, whose last bit is worth 1
    } else {
      return chunk.value(i, levels);
    }
  }
};

// Multiply each row of x [rows, D] by the orthonormal Hadamard matrix, within blocks of the largest power of two that
// divides D. Every thread of the threadgroup takes part; ends with a barrier.
template <int D>
METAL_FUNC void hadamard(threadgroup float* x, int rows, uint thread_index, uint n_threads) {
  constexpr int BLOCK = D & -D;
  for (int width = 1; width < BLOCK; width *= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < rows * D / 2; i += n_threads) {
      int at = 2 * i - (i & (width - 1));
      float a = x[at], b = x[at + width];
      x[at] = a + b;
      x[at + width] = a - b;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float scale = 1.0f / precise::sqrt(float(BLOCK));
  for (int i = thread_index; i < rows * D; i += n_threads) {
    x[i] *= scale;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
