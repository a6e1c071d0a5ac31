// Rows to planes in one pass: rotate, find scales, quantize, pack. docs/format.md states the bytes.
#pragma once

// The bytes are those of the plain operations, so a * b + c must keep both of its roundings. The first line is what
// the Metal specification documents, the second what every clang knows, off-Mac too.
#pragma METAL fp contract(off)
#pragma clang fp contract(off)

#include "codecs.metal"

// The planes that a kernel writes. Those that a format has not are null.
struct Encoded {
  device uchar* codes0;
  device uchar* codes1;
  device half* scales;
  device half* offsets;
};

METAL_FUNC constexpr int power_of_two_up_to(int n) {
  int p = 1;
  while (2 * p <= n) {
    p *= 2;
  }
  return p;
}

METAL_FUNC constexpr int odd_part(int n) {
  while (n % 2 == 0) {
    n /= 2;
  }
  return n;
}

// How rows lie in a simdgroup: a lane holds WIDTH consecutive channels of a row, so that loads and stores are of
// neighbouring words, and PARTS lanes hold CHANNELS channels of it: whole rows, or a slab of CHANNELS of the D where
// channels are independent. In a simdgroup there are ROWS rows.
template <int CHANNELS, int BLOCK>
struct Tile {
  static constexpr constant int WIDTH = CHANNELS <= 256 ? 8 : 16;
  static constexpr constant int PARTS = CHANNELS / WIDTH;
  static constexpr constant int MOST = LANES / PARTS;
  // The rows of a block are folded by halves, so there it is a power of two.
  static constexpr constant int ROWS =
      BLOCK == 1 ? MOST : power_of_two_up_to(MOST) < BLOCK ? power_of_two_up_to(MOST) : BLOCK;
  // Floats of threadgroup memory that `fold_channels` takes per simdgroup.
  static constexpr constant int FOLD = odd_part(PARTS) == 1 ? 0 : ROWS * odd_part(PARTS) * WIDTH;

  int row;    // of the simdgroup's
  int first;  // lane that holds the row's first channels
  int part;   // lane's place in the row; lanes from PARTS on are idle

  METAL_FUNC Tile(uint lane) {
    int i = int(lane) / PARTS;
    row = i < ROWS ? i : ROWS - 1;
    first = row * PARTS;
    part = int(lane) - first;
  }
};

// Threadgroup memory, in floats: levels and borders of a code book, scratch of the folds, statistics of a block.
template <int KIND, int BITS, int CHANNELS, int BLOCK, int SIMDGROUPS>
struct Memory {
  static constexpr constant int BOOK = KIND == CODEBOOK ? 1 << BITS : 0;
  static constexpr constant int FOLD = KIND == CODEBOOK ? SIMDGROUPS * Tile<CHANNELS, BLOCK>::FOLD : 0;
  static constexpr constant int STATISTICS = BLOCK == 1 ? 0 : SIMDGROUPS * CHANNELS;
  static constexpr constant int ALL = 2 * BOOK + FOLD + STATISTICS * (KIND == CHANNEL ? 2 : 1);
  static constexpr constant int FLOATS = ALL > 0 ? ALL : 1;
};

// Store BYTES bytes, a power of two up to 16, in one store.
template <int BYTES>
METAL_FUNC void store_bytes(device uchar* p, const thread uint* w) {
  if constexpr (BYTES == 16) {
    *(device uint4*)p = uint4(w[0], w[1], w[2], w[3]);
  } else if constexpr (BYTES == 8) {
    *(device uint2*)p = uint2(w[0], w[1]);
  } else if constexpr (BYTES == 4) {
    *(device uint*)p = w[0];
  } else if constexpr (BYTES == 2) {
    *(device ushort*)p = ushort(w[0]);
  } else {
    *p = uchar(w[0]);
  }
}

// Pack the codes of one lane and store them in the planes of rows of `dim` channels.
template <int BITS, int WIDTH>
METAL_FUNC void store_codes(const thread uint* codes, long row, int part, int dim, Encoded out) {
  constexpr int LOW = low_bits(BITS);
  constexpr int HIGH = BITS - LOW;
  constexpr int LOW_BYTES = WIDTH * LOW / 8;
  uint low[words(LOW_BYTES)] = {0};
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    low[i * LOW / 32] |= (codes[i] & ((1u << LOW) - 1)) << (i * LOW % 32);
  }
  store_bytes<LOW_BYTES>(out.codes0 + row * (dim * LOW / 8) + part * LOW_BYTES, low);
  if constexpr (HIGH > 0) {
    constexpr int HIGH_BYTES = WIDTH * HIGH / 8;
    uint high[words(HIGH_BYTES)] = {0};
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      high[i * HIGH / 32] |= (codes[i] >> LOW) << (i * HIGH % 32);
    }
    store_bytes<HIGH_BYTES>(out.codes1 + row * (dim * HIGH / 8) + part * HIGH_BYTES, high);
  }
}

// 1 / sqrt(block) as float32: powers of two scale it exactly.
METAL_FUNC constexpr float orthonormal(int block) {
  float scale = 1.0f;
  while (block >= 4) {
    scale *= 0.5f;
    block /= 4;
  }
  return block == 2 ? scale * 0.707106781186547524f : scale;
}

// The butterflies between registers, of strides STRIDE, 2 * STRIDE, ... below WIDTH.
template <int WIDTH, int STRIDE>
METAL_FUNC void butterflies(thread float* y) {
  if constexpr (STRIDE < WIDTH) {
    UNROLL
    for (int i = 0; i < WIDTH / 2; i++) {
      int at = i / STRIDE * 2 * STRIDE + i % STRIDE;
      float a = y[at], b = y[at + STRIDE];
      y[at] = a + b;
      y[at + STRIDE] = a - b;
    }
    butterflies<WIDTH, 2 * STRIDE>(y);
  }
}

// Multiply a row by the Hadamard matrix within blocks of BLOCK channels: butterflies between registers, then between
// lanes. A row starts at a multiple of the lanes of a block.
template <int BLOCK, int WIDTH>
METAL_FUNC void hadamard_row(thread float* y, uint lane) {
  butterflies<WIDTH, 1>(y);
  for (int step = 1; step < BLOCK / WIDTH; step *= 2) {
    bool upper = (lane & step) != 0;
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      float other = simd_shuffle_xor(y[i], ushort(step));
      y[i] = upper ? other - y[i] : y[i] + other;
    }
  }
  constexpr float scale = orthonormal(BLOCK);
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    y[i] *= scale;
  }
}

// Number i of the words `w` of a row. X: what they hold (FLOAT16, BFLOAT16, FLOAT32).
template <int X>
METAL_FUNC float number(const thread uint* w, int i) {
  if constexpr (X == FLOAT32) {
    return as_type<float>(w[i]);
  } else if constexpr (X == FLOAT16) {
    return float(as_type<half2>(w[i / 2])[i % 2]);
  } else {
    return as_type<float>(i % 2 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
  }
}

// Words that hold WIDTH numbers of x.
template <int X, int WIDTH>
METAL_FUNC constexpr int input_words() {
  return X == FLOAT32 ? WIDTH : WIDTH / 2;
}

// Load a lane's channels of a row as they are; zeros where there is no row.
template <int X, int D, int WIDTH>
METAL_FUNC void load_row(const device uchar* x, long row, int part, bool exists, thread uint* w) {
  constexpr int BYTES = 4 * input_words<X, WIDTH>();
  UNROLL
  for (int i = 0; i < BYTES / 4; i++) {
    w[i] = 0;
  }
  if (exists) {
    load_bytes<BYTES>(x + (row * (D / WIDTH) + part) * BYTES, w);
  }
}

// Bring a lane's channels of a row into the codec's basis. All lanes take part.
// signs: a bit per channel of the lane, set where the rotation's sign is negative.
template <int X, int D, int WIDTH, bool ROTATED>
METAL_FUNC void to_basis(const thread uint* w, uint signs, uint lane, thread float* y) {
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    y[i] = number<X>(w, i);
    if constexpr (ROTATED) {
      y[i] = (signs >> i) & 1 ? -y[i] : y[i];
    }
  }
  if constexpr (ROTATED) {
    hadamard_row<(D & -D), WIDTH>(y, lane);
  }
}

template <int WIDTH, bool ROTATED>
METAL_FUNC uint load_signs(const device uchar* signs, int part, bool exists) {
  uint w[1] = {0};
  if constexpr (ROTATED) {
    if (exists) {
      load_bytes<WIDTH / 8>(signs + part * (WIDTH / 8), w);
    }
  }
  return w[0];
}

// Sum N registers by halves into the first.
template <int N>
METAL_FUNC void fold_registers(thread float* v) {
  if constexpr (N > 1) {
    UNROLL
    for (int i = 0; i < N / 2; i++) {
      v[i] += v[i + N / 2];
    }
    fold_registers<N / 2>(v);
  }
}

// Sum N registers of 2 * STEP lanes by halves: registers of lanes STEP apart, of lanes STEP / 2 apart, ..., then those
// of a lane. A lane goes on with every other register only, its partner with those between: that is a third of the
// shuffles, and the halves of a lane's registers still meet before the two of them, which are added last.
template <int N, int STEP>
METAL_FUNC float fold_lanes(thread float* v, uint lane) {
  if constexpr (STEP == 0) {
    fold_registers<N>(v);
    return v[0];
  } else if constexpr (N == 1) {
    v[0] += simd_shuffle_xor(v[0], ushort(STEP));
    return fold_lanes<1, STEP / 2>(v, lane);
  } else {
    bool odd = (lane & STEP) != 0;
    UNROLL
    for (int i = 0; i < N; i += 2) {
      float mine = odd ? v[i + 1] : v[i];
      float other = odd ? v[i] : v[i + 1];
      v[i / 2] = mine + simd_shuffle_xor(other, ushort(STEP));
    }
    float sum = fold_lanes<N / 2, STEP / 2>(v, lane);
    return sum + simd_shuffle_xor(sum, ushort(STEP));
  }
}

// Sum over a row's channels in the order of layout.fold_sum, by halves; all its lanes get the sum. Uses up `v`.
// scratch: the simdgroup's, Rows::FOLD floats.
template <typename Rows>
METAL_FUNC float fold_channels(thread float* v, const thread Rows& tile, threadgroup float* scratch) {
  constexpr int WIDTH = Rows::WIDTH;
  constexpr int ODD = odd_part(Rows::PARTS);
  if constexpr (ODD == 1) {
    return fold_lanes<WIDTH, Rows::PARTS / 2>(v, tile.part);
  } else {
    // Halves of whole lanes while there are such. Lanes of the upper half go on with what nobody reads.
    for (int n = Rows::PARTS; n > ODD; n /= 2) {
      int other = min(tile.first + tile.part + n / 2, LANES - 1);
      UNROLL
      for (int i = 0; i < WIDTH; i++) {
        v[i] += simd_shuffle(v[i], ushort(other));
      }
    }
    // ODD * WIDTH numbers are left. Numbers ODD apart meet in one lane, which folds them,
    threadgroup float* left = scratch + tile.row * (ODD * WIDTH);
    if (tile.part < ODD) {
      UNROLL
      for (int i = 0; i < WIDTH; i++) {
        left[tile.part * WIDTH + i] = v[i];
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    int mine = min(tile.part, ODD - 1);
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      v[i] = left[mine + i * ODD];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    fold_registers<WIDTH>(v);
    // and the ODD sums fold between lanes; an odd last one waits for the next round.
    float sum = v[0];
    for (int n = ODD; n > 1; n = n / 2 + n % 2) {
      int other = tile.part < n / 2 ? tile.part + n / 2 : n - 1;
      float from = simd_shuffle(sum, ushort(tile.first + other));
      sum = tile.part < n / 2 ? sum + from : from;
    }
    return simd_shuffle(sum, ushort(tile.first));
  }
}

METAL_FUNC half rounded(float x) {
  return half(clamp(x, -65504.0f, 65504.0f));
}

METAL_FUNC float nonzero(float x) {
  return x > 0.0f ? x : 1.0f;
}

METAL_FUNC float inverse_of(half scale) {
  float step = float(scale);
  return step > 0.0f ? 1.0f / step : step;
}

// Largest code, as a float.
template <int BITS>
METAL_FUNC constexpr float top() {
  return float((1 << BITS) - 1);
}

template <int BITS>
METAL_FUNC uint affine_code(float x, float zero, float inverse) {
  return uint(clamp(rint((x - zero) * inverse), 0.0f, top<BITS>()));
}

// Affine codes of a row: a scale and a zero for every GROUP channels.
template <int BITS, int GROUP, int D, typename Rows>
METAL_FUNC void encode_affine(const thread float* y, const thread Rows& tile, long row, bool exists, Encoded out) {
  constexpr int WIDTH = Rows::WIDTH;
  constexpr int IN_LANE = GROUP < WIDTH ? GROUP : WIDTH;
  constexpr int IN_LANES = GROUP / IN_LANE;
  uint codes[WIDTH];
  UNROLL
  for (int at = 0; at < WIDTH; at += IN_LANE) {
    float low = y[at], high = y[at];
    UNROLL
    for (int i = 1; i < IN_LANE; i++) {
      low = min(low, y[at + i]);
      high = max(high, y[at + i]);
    }
    for (int step = 1; step < IN_LANES; step *= 2) {
      low = min(low, simd_shuffle_xor(low, ushort(step)));
      high = max(high, simd_shuffle_xor(high, ushort(step)));
    }
    half scale = rounded((high - low) / top<BITS>()), zero = rounded(low);
    if (exists && tile.part % IN_LANES == 0) {
      long group = row * (D / GROUP) + (tile.part * WIDTH + at) / GROUP;
      out.scales[group] = scale;
      out.offsets[group] = zero;
    }
    float inverse = inverse_of(scale);
    UNROLL
    for (int i = at; i < at + IN_LANE; i++) {
      codes[i] = affine_code<BITS>(y[i], float(zero), inverse);
    }
  }
  if (exists) {
    store_codes<BITS, WIDTH>(codes, row, tile.part, D, out);
  }
}

// Code book codes of a row and its scale.
// book: the 2**BITS levels, then the 2**BITS - 1 borders between them in units of N(0, 1).
template <int BITS, int D, bool UNBIASED, typename Rows>
METAL_FUNC void encode_codebook(
    const thread float* y,
    const thread Rows& tile,
    long row,
    bool exists,
    const threadgroup float* book,
    threadgroup float* scratch,
    Encoded out) {
  constexpr int WIDTH = Rows::WIDTH;
  const threadgroup float* borders = book + (1 << BITS);
  float v[WIDTH];
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    v[i] = y[i] * y[i];
  }
  float energy = fold_channels(v, tile, scratch);
  float norm = precise::sqrt(energy);
  float unit = precise::sqrt(float(D)) / nonzero(norm);
  uint codes[WIDTH];
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    v[i] = y[i] * unit;
    codes[i] = 0;
  }
  for (uint step = 1 << (BITS - 1); step > 0; step /= 2) {
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      codes[i] += borders[codes[i] + step - 1] < v[i] ? step : 0;
    }
  }
  float scale = norm;
  if constexpr (UNBIASED) {
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      v[i] = y[i] * book[codes[i]];
    }
    scale = energy / nonzero(fold_channels(v, tile, scratch));
  }
  if (exists) {
    store_codes<BITS, WIDTH>(codes, row, tile.part, D, out);
    if (tile.part == 0) {
      out.scales[row] = rounded(scale);
    }
  }
}

// Copy the code book to threadgroup memory. Without a barrier: one must follow.
template <int BITS>
METAL_FUNC void load_book(const device float* book, threadgroup float* to, uint thread_index, uint n_threads) {
  for (uint i = thread_index; i < (2u << BITS) - 1; i += n_threads) {
    to[i] = book[i];
  }
}

// Encode rows x [shape[0], D] whose scales are their own: AFFINE and, without means, CODEBOOK.
// A simdgroup takes Tile::ROWS rows. shared: Memory::FLOATS floats.
template <int KIND, int BITS, int GROUP, bool UNBIASED, int X, int D, bool ROTATED, int SIMDGROUPS>
METAL_FUNC void encode_rows(
    const device uchar* x,
    const device uchar* signs,
    const device float* book,
    const device int* shape,
    Encoded out,
    threadgroup float* shared,
    uint i_threadgroup,
    uint i_simdgroup,
    uint lane) {
  using Rows = Tile<D, 1>;
  if constexpr (KIND == CODEBOOK) {
    load_book<BITS>(book, shared, i_simdgroup * LANES + lane, SIMDGROUPS * LANES);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  Rows tile(lane);
  long row = (long(i_threadgroup) * SIMDGROUPS + i_simdgroup) * Rows::ROWS + tile.row;
  bool exists = tile.part < Rows::PARTS && row < shape[0];
  uint w[input_words<X, Rows::WIDTH>()];
  float y[Rows::WIDTH];
  load_row<X, D, Rows::WIDTH>(x, row, tile.part, exists, w);
  to_basis<X, D, Rows::WIDTH, ROTATED>(w, load_signs<Rows::WIDTH, ROTATED>(signs, tile.part, exists), lane, y);
  if constexpr (KIND == CODEBOOK) {
    threadgroup float* scratch = shared + (2 << BITS) + i_simdgroup * Rows::FOLD;
    encode_codebook<BITS, D, UNBIASED>(y, tile, row, exists, shared, scratch, out);
  } else {
    encode_affine<BITS, GROUP, D>(y, tile, row, exists, out);
  }
}

// What a lane keeps of its rows in registers, up to HELD_WORDS: with what else it needs these must stay within the 128
// registers that a thread can have.
constexpr constant int NOTHING = 0;  // rows are read twice, the second time soon after
constexpr constant int INPUT = 1;    // as they were read; they are rotated twice
constexpr constant int BASIS = 2;    // in the codec's basis
constexpr constant int HELD_WORDS = 32;

// Rows of a block that one lane goes through, COUNT of them. The highest bits of a row's number choose among them: a
// fold by halves over the block begins with them.
template <int X, int D, int CHANNELS, int ROWS, bool ROTATED, int SIMDGROUPS>
struct Block {
  using Rows = Tile<CHANNELS, ROWS>;
  static constexpr constant int WIDTH = Rows::WIDTH;
  static constexpr constant int WORDS = input_words<X, WIDTH>();
  static constexpr constant int COUNT = ROWS / (Rows::ROWS * SIMDGROUPS);
  static constexpr constant int HELD =
      COUNT * WIDTH <= HELD_WORDS ? BASIS : COUNT * WORDS <= HELD_WORDS ? INPUT : NOTHING;

  const device uchar* x;
  long row;
  int part;  // of the whole row
  bool exists;
  uint signs;
  uint lane;
  float rows[HELD == BASIS ? COUNT : 1][WIDTH];
  uint words[HELD == INPUT ? COUNT : 1][WORDS];

  METAL_FUNC long row_of(int i) const {
    return row + i * (Rows::ROWS * SIMDGROUPS);
  }

  METAL_FUNC void hold(int i) {
    uint w[WORDS];
    load_row<X, D, WIDTH>(x, row_of(i), part, exists, w);
    if constexpr (HELD == BASIS) {
      float y[WIDTH];
      to_basis<X, D, WIDTH, ROTATED>(w, signs, lane, y);
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        rows[i][j] = y[j];
      }
    } else {
      UNROLL
      for (int j = 0; j < WORDS; j++) {
        words[i][j] = w[j];
      }
    }
  }

  METAL_FUNC void hold() {
    if constexpr (HELD != NOTHING) {
#pragma clang loop unroll(full)
      for (int i = 0; i < COUNT; i++) {
        hold(i);
      }
    }
  }

  METAL_FUNC void get(int i, thread float* y) const {
    if constexpr (HELD == BASIS) {
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        y[j] = rows[i][j];
      }
    } else {
      uint w[WORDS];
      if constexpr (HELD == INPUT) {
        UNROLL
        for (int j = 0; j < WORDS; j++) {
          w[j] = words[i][j];
        }
      } else {
        load_row<X, D, WIDTH>(x, row_of(i), part, exists, w);
      }
      to_basis<X, D, WIDTH, ROTATED>(w, signs, lane, y);
    }
  }

  METAL_FUNC void widen(int i, thread float* low, thread float* high) const {
    float y[WIDTH];
    get(i, y);
    UNROLL
    for (int j = 0; j < WIDTH; j++) {
      low[j] = min(low[j], y[j]);
      high[j] = max(high[j], y[j]);
    }
  }

  // Minimum and maximum of each channel over the lane's rows.
  METAL_FUNC void range(thread float* low, thread float* high) const {
    UNROLL
    for (int j = 0; j < WIDTH; j++) {
      low[j] = INFINITY;
      high[j] = -INFINITY;
    }
    if constexpr (HELD != NOTHING) {
#pragma clang loop unroll(full)
      for (int i = 0; i < COUNT; i++) {
        widen(i, low, high);
      }
    } else {
      UNROLL
      for (int i = 0; i < COUNT; i++) {
        widen(i, low, high);
      }
    }
  }

  // Sum rows FIRST, FIRST + STEP, ... by halves: the last two to be added are the sums over every other row.
  template <int FIRST, int STEP>
  METAL_FUNC void fold(thread float* sum) const {
    if constexpr (STEP == COUNT) {
      get(FIRST, sum);
    } else {
      float other[WIDTH];
      fold<FIRST, 2 * STEP>(sum);
      fold<FIRST + STEP, 2 * STEP>(other);
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        sum[j] += other[j];
      }
    }
  }
};

// Write row i of a block after the statistics. a, b: [CHANNELS] means, or zeros and inverse scales.
template <int KIND, int BITS, bool UNBIASED, int D, typename Block>
METAL_FUNC void encode_row_of(
    const thread Block& block,
    int i,
    const thread typename Block::Rows& tile,
    const threadgroup float* a,
    const threadgroup float* b,
    const threadgroup float* book,
    threadgroup float* scratch,
    Encoded out) {
  constexpr int WIDTH = Block::WIDTH;
  const int column = block.exists ? tile.part * WIDTH : 0;
  float y[WIDTH];
  block.get(i, y);
  if constexpr (KIND == CODEBOOK) {
    UNROLL
    for (int j = 0; j < WIDTH; j++) {
      y[j] -= a[column + j];
    }
    encode_codebook<BITS, D, UNBIASED>(y, tile, block.row_of(i), block.exists, book, scratch, out);
  } else {
    uint codes[WIDTH];
    UNROLL
    for (int j = 0; j < WIDTH; j++) {
      codes[j] = affine_code<BITS>(y[j], a[column + j], b[column + j]);
    }
    if (block.exists) {
      store_codes<BITS, WIDTH>(codes, block.row_of(i), block.part, D, out);
    }
  }
}

// Encode a block of BLOCK rows that share numbers per channel: CHANNEL, and CODEBOOK with means.
// A threadgroup takes CHANNELS channels of a block, the slab `slab` of them. x is read once, but for whole rows in
// blocks too large for the registers of a threadgroup (Block::HELD): 256 rows of 256 channels, or of 128 in float32.
template <int KIND, int BITS, int ROWS, bool UNBIASED, int X, int D, int CHANNELS, bool ROTATED, int SIMDGROUPS>
METAL_FUNC void encode_block(
    const device uchar* x,
    const device uchar* signs,
    const device float* book,
    Encoded out,
    threadgroup float* shared,
    uint i_block,
    uint slab,
    uint i_simdgroup,
    uint lane) {
  using Rows = Tile<CHANNELS, ROWS>;
  using Sizes = Memory<KIND, BITS, CHANNELS, ROWS, SIMDGROUPS>;
  using Held = Block<X, D, CHANNELS, ROWS, ROTATED, SIMDGROUPS>;
  constexpr int WIDTH = Rows::WIDTH;
  const uint thread_index = i_simdgroup * LANES + lane;
  Rows tile(lane);
  Held block;
  block.x = x;
  // A fold by halves goes on between the rows of a simdgroup, then between simdgroups. Minima have no order: there
  // a simdgroup has neighbouring rows.
  block.row = long(i_block) * ROWS +
      (KIND == CODEBOOK ? tile.row * SIMDGROUPS + i_simdgroup : i_simdgroup * Rows::ROWS + tile.row);
  block.part = slab * Rows::PARTS + tile.part;
  block.exists = tile.part < Rows::PARTS && block.part * WIDTH < D;
  block.signs = load_signs<WIDTH, ROTATED>(signs, block.part, block.exists);
  block.lane = lane;
  block.hold();

  if constexpr (KIND == CODEBOOK) {
    load_book<BITS>(book, shared, thread_index, SIMDGROUPS * LANES);
  }
  threadgroup float* scratch = shared + 2 * Sizes::BOOK + i_simdgroup * Rows::FOLD;
  threadgroup float* a = shared + 2 * Sizes::BOOK + Sizes::FOLD;  // [SIMDGROUPS, CHANNELS] sums or minima,
  threadgroup float* b = a + Sizes::STATISTICS;                   // and maxima
  const int at = i_simdgroup * CHANNELS + tile.part * WIDTH;
  const bool writes = tile.row == 0 && tile.part < Rows::PARTS;

  // Statistics of each channel over the rows of the simdgroup,
  if constexpr (KIND == CODEBOOK) {
    float sum[WIDTH];
    block.template fold<0, 1>(sum);
    for (int step = Rows::ROWS / 2; step > 0; step /= 2) {
      int other = (tile.row ^ step) * Rows::PARTS + tile.part;
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        sum[j] += simd_shuffle(sum[j], ushort(other));
      }
    }
    if (writes) {
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        a[at + j] = sum[j];
      }
    }
  } else {
    float low[WIDTH], high[WIDTH];
    block.range(low, high);
    for (int step = Rows::ROWS / 2; step > 0; step /= 2) {
      int other = (tile.row ^ step) * Rows::PARTS + tile.part;
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        low[j] = min(low[j], simd_shuffle(low[j], ushort(other)));
        high[j] = max(high[j], simd_shuffle(high[j], ushort(other)));
      }
    }
    if (writes) {
      UNROLL
      for (int j = 0; j < WIDTH; j++) {
        a[at + j] = low[j];
        b[at + j] = high[j];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // then over the simdgroups. Column c is one thread's, so its first entry can take the result.
  for (int c = thread_index; c < CHANNELS; c += SIMDGROUPS * LANES) {
    const int channel = slab * CHANNELS + c;
    const long entry = long(i_block) * D + channel;
    if constexpr (KIND == CODEBOOK) {
      float sums[SIMDGROUPS];
      for (int s = 0; s < SIMDGROUPS; s++) {
        sums[s] = a[s * CHANNELS + c];
      }
      fold_registers<SIMDGROUPS>(sums);
      half mean = rounded(sums[0] / float(ROWS));
      a[c] = float(mean);
      if (channel < D) {
        out.offsets[entry] = mean;
      }
    } else {
      float low = a[c], high = b[c];
      for (int s = 1; s < SIMDGROUPS; s++) {
        low = min(low, a[s * CHANNELS + c]);
        high = max(high, b[s * CHANNELS + c]);
      }
      half scale = rounded((high - low) / top<BITS>()), zero = rounded(low);
      a[c] = float(zero);
      b[c] = inverse_of(scale);
      if (channel < D) {
        out.scales[entry] = scale;
        out.offsets[entry] = zero;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if constexpr (Held::HELD != NOTHING) {
    // Unrolled: registers have no index.
#pragma clang loop unroll(full)
    for (int i = 0; i < Held::COUNT; i++) {
      encode_row_of<KIND, BITS, UNBIASED, D>(block, i, tile, a, b, shared, scratch, out);
    }
  } else {
    UNROLL
    for (int i = 0; i < Held::COUNT; i++) {
      encode_row_of<KIND, BITS, UNBIASED, D>(block, i, tile, a, b, shared, scratch, out);
    }
  }
}

// Convert element i of x to what the rows of an Exact codec hold; bfloat16 is stored as its bits.
template <int TO, typename T, typename O>
METAL_FUNC void convert(const device T* x, device O* rows, long i) {
  const float number = float(x[i]);
  if constexpr (TO == BFLOAT16) {
    const uint word = as_type<uint>(number);
    rows[i] = O((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
  } else {
    rows[i] = O(number);
  }
}
