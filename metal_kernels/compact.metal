// Move what is kept of a ragged body to new spans. Bytes are moved as they are, whatever they mean.
#pragma once

#include <metal_stdlib>

template <int BYTES>
struct Word {};
template <>
struct Word<1> {
  using type = uchar;
};
template <>
struct Word<2> {
  using type = ushort;
};
template <>
struct Word<4> {
  using type = uint;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

constexpr constant int LANE_NUMBERS = 5;

// Write words of lane `i_lane`'s new span: EACH of them a thread, n_threads apart.
//   shape: words of a unit; units of `plane`
//   lanes [., LANE_NUMBERS]: first unit of the lane in the source and in `out`, units of its span, and of those it
//     keeps the number and the first in `units`
//   units: kept units, relative to their lane's first
//   plane, fresh: the source, one behind the other
// What a span has beyond the units kept becomes zero.
template <int BYTES, int EACH>
METAL_FUNC void compact(
    const device uchar* plane,
    const device uchar* fresh,
    const device int* units,
    const device int* lanes,
    const device int* shape,
    device uchar* out,
    uint i_threadgroup,
    uint i_lane,
    uint thread_index,
    uint n_threads) {
  using W = typename Word<BYTES>::type;
  const uint n_words = shape[0];
  const int base = shape[1];
  const device int* lane = lanes + LANE_NUMBERS * i_lane;
  const int start = lane[0];
  const int n_kept = lane[3];
  const uint end = lane[2] * n_words;
  const device int* kept = units + lane[4];
  device W* to = (device W*)out + long(lane[1]) * n_words;

  uint i = i_threadgroup * EACH * n_threads + thread_index;
  for (int k = 0; k < EACH; k++, i += n_threads) {
    if (i >= end) {
      return;
    }
    const int i_unit = i / n_words;
    W word = W(0);
    if (i_unit < n_kept) {
      int source = start + kept[i_unit];
      const device uchar* from = plane;
      if (source >= base) {
        source -= base;
        from = fresh;
      }
      word = ((const device W*)from)[long(source) * n_words + i % n_words];
    }
    to[i] = word;
  }
}
