"""The oracle against itself, the papers' numbers and random sampling: nothing here is code under test."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmlx import reference as ref
from kvmlx.types import Rotary


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotary(dim: int, factor: float = 1.0) -> Rotary:
    half = dim // 2
    frequency = tuple(float(f) for f in 10_000.0 ** (-np.arange(half) / half))
    return Rotary(tuple(range(half)), tuple(range(half, dim)), frequency, factor)


# Attention


def test_attention_by_hand() -> None:
    """Two keys, the second half as likely: weights 2/3 and 1/3; a sink of the first's logit takes 2/5."""
    q, k = np.array([[[[1.0]]]]), np.array([[[[math.log(2)], [0.0]]]])
    v = np.array([[[[3.0], [6.0]]]])
    out, lse = ref.attention(q, k, v, scale=1.0)
    np.testing.assert_allclose([out.item(), lse.item()], [4.0, math.log(3)], rtol=1e-15)
    out, lse = ref.attention(q, k, v, scale=1.0, sinks=np.array([math.log(2)]))
    np.testing.assert_allclose([out.item(), lse.item()], [12 / 5, math.log(5)], rtol=1e-15)
    out, lse = ref.attention(q, k, v, scale=1.0, bias=np.array([[[0.0, math.log(2)]]]))
    np.testing.assert_allclose([out.item(), lse.item()], [4.5, math.log(4)], rtol=1e-15)
    out, lse = ref.attention(q, k, v, scale=1.0, valid=np.array([[False, True]]))
    np.testing.assert_allclose([out.item(), lse.item()], [6.0, 0.0], atol=1e-15)


def test_attention_of_nothing_is_zero() -> None:
    q, kv = gaussian(0, 1, 2, 3, 8), np.zeros((1, 1, 0, 8))
    out, lse = ref.attention(q, kv, kv, scale=1.0, causal=False)
    assert (out == 0).all() and (lse == -np.inf).all()


def test_causal_is_lower_right_aligned() -> None:
    """The last query sees every key, and equals itself asked alone; no query sees a later key."""
    q, k, v = gaussian(1, 1, 6, 4, 8), gaussian(2, 1, 2, 7, 8), gaussian(3, 1, 2, 7, 8)
    out, lse = ref.attention(q, k, v, scale=0.3)
    alone, alone_lse = ref.attention(q[:, :, -1:], k, v, scale=0.3)
    np.testing.assert_allclose(out[:, :, -1:], alone)
    np.testing.assert_allclose(lse[:, :, -1:], alone_lse)
    changed = v.copy()
    changed[:, :, 5:] = 1e6
    np.testing.assert_array_equal(ref.attention(q, k, changed, scale=0.3)[0][:, :, :2], out[:, :, :2])


def test_query_heads_share_their_kv_head() -> None:
    """Query heads 3 h .. 3 h + 2 read KV head h."""
    q, k, v = gaussian(4, 2, 6, 1, 8), gaussian(5, 2, 2, 9, 8), gaussian(6, 2, 2, 9, 8)
    out, _ = ref.attention(q, k, v, scale=0.3)
    for head in range(6):
        one = slice(head // 3, head // 3 + 1)
        single, _ = ref.attention(q[:, head : head + 1], k[:, one], v[:, one], scale=0.3)
        np.testing.assert_allclose(out[:, head : head + 1], single)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 20), min_size=1, max_size=4), st.booleans())
def test_merged_segments_equal_the_whole(seed: int, lengths: list[int], with_sinks: bool) -> None:
    t = sum(lengths)
    q, k, v = gaussian(seed, 1, 3, 2, 8) * 3, gaussian(seed + 1, 1, 1, t, 8), gaussian(seed + 2, 1, 1, t, 8)
    bias, sinks = gaussian(seed + 3, 1, 1, t), gaussian(seed + 4, 3) if with_sinks else None
    whole = ref.attention(q, k, v, scale=1.0, causal=False, bias=bias, sinks=sinks)
    parts, start = [], 0
    for i, n in enumerate(lengths):
        rows = slice(start, start + n)
        own_sinks = sinks if i == 0 else None
        part = ref.attention(
            q, k[:, :, rows], v[:, :, rows], scale=1.0, causal=False, bias=bias[:, :, rows], sinks=own_sinks
        )
        parts.append(part)
        start += n
    out, lse = ref.merge_segments(parts)
    np.testing.assert_allclose(out, whole[0], atol=1e-13)
    np.testing.assert_allclose(lse, whole[1], atol=1e-13)


@pytest.mark.parametrize("block", [1, 7, 64, 200])
def test_two_pass_column_sums_equal_the_naive(block: int) -> None:
    q, k = gaussian(7, 1, 6, 20, 16), gaussian(8, 1, 2, 65, 16)
    naive = ref.column_sums(q, k, scale=0.25)
    np.testing.assert_allclose(ref.column_sums_two_pass(q, k, scale=0.25, block=block), naive, atol=1e-14)
    np.testing.assert_allclose(naive.sum(axis=-1), 20.0)


def test_column_sums_count_only_real_queries() -> None:
    q, k = gaussian(9, 2, 2, 5, 8), gaussian(10, 2, 2, 5, 8)
    some = ref.column_sums(q, k, scale=0.3, n_queries=np.array([5, 2]))
    np.testing.assert_allclose(some.sum(axis=-1), [[5, 5], [2, 2]])
    # Right padding: the sums of the short sequence are those of it alone.
    alone = ref.column_sums(q[1:, :, :2], k[1:, :, :2], scale=0.3)
    np.testing.assert_allclose(some[1:, :, :2], alone)


# Bytes


@pytest.mark.parametrize("bits", list(ref.PLANE_WIDTHS))
@pytest.mark.parametrize("dim", [8, 80, 96])
def test_packing_round_trip(bits: int, dim: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, dim)).astype(np.uint8)
    planes = ref.pack(codes, bits)
    assert sum(p.shape[-1] for p in planes) == dim * bits // 8
    np.testing.assert_array_equal(ref.unpack(planes, bits, dim), codes)


def test_packing_by_hand() -> None:
    codes = np.arange(8, dtype=np.uint8)
    low, high = ref.pack(codes, 3)
    assert low.tolist() == [0b11100100, 0b11100100] and high.tolist() == [0b11110000]
    assert ref.pack(codes, 4)[0].tolist() == [0x10, 0x32, 0x54, 0x76]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_as_uint32_is_mlx_order(bits: int) -> None:
    """Element i of a word starts at bit ``i * bits`` of the little-endian uint32."""
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 64)).astype(np.uint8)
    words = ref.pack(codes, bits)[0].view("<u4")
    per_word = 32 // bits
    shifts = (np.arange(per_word) * bits).astype(np.uint32)
    expected = (codes.reshape(2, -1, per_word).astype(np.uint32) << shifts).sum(axis=-1, dtype=np.uint32)
    np.testing.assert_array_equal(words, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([8, 32]), st.floats(1e-3, 1e3))
def test_affine_error_is_bounded(seed: int, bits: int, group: int, size: float) -> None:
    """Half a step, plus what the rounding of scale and zero to float16 takes away at the ends."""
    x = gaussian(seed, 5, 64) * size
    codes, scales, zeros = ref.affine_encode(x, bits, group)
    error = np.abs(ref.affine_decode(codes, scales, zeros) - x)
    step = np.repeat(scales.astype(np.float64), group, axis=-1)
    assert codes.max() < 2**bits
    # Float16 rounds to 2^-11 of the value (or 2^-25, below its normal range): the zero, and codes x scale.
    rounding = (np.abs(x).max() * 3 + step * 2**bits) * 2.0**-11 + 2**bits * 2.0**-25
    assert (error <= step / 2 + rounding).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 4]))
def test_kivi_error_is_bounded(seed: int, bits: int) -> None:
    x = gaussian(seed, 2, 64, 16)
    codes, scales, zeros = ref.channel_encode(x, bits, 32)
    assert scales.shape == (2, 2, 16)
    error = np.abs(ref.channel_decode(codes, scales, zeros) - x)
    step = np.repeat(scales.astype(np.float64), 32, axis=-2)
    assert (error <= step / 2 + 2.0**-11 * (3 * np.abs(x).max() + step * 2**bits)).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 65504.0])
def test_constant_groups_are_exact(value: float) -> None:
    x = np.full((1, 32, 64), value)
    for encode, decode, size in (
        (ref.affine_encode, ref.affine_decode, 64),
        (ref.channel_encode, ref.channel_decode, 32),
    ):
        codes, scales, zeros = encode(x, 4, size)
        assert (codes == 0).all() and (scales == 0).all()
        np.testing.assert_array_equal(decode(codes, scales, zeros), x)


def test_channel_codes_are_affine_codes_of_the_transpose() -> None:
    x = gaussian(11, 64, 24)
    by_channel = ref.channel_encode(x, 3, 32)
    by_row = ref.affine_encode(x.T, 3, 32)
    for a, b in zip(by_channel, by_row, strict=True):
        np.testing.assert_array_equal(a, b.T)


def test_half_is_clamped() -> None:
    assert ref.to_half([1e9, -1e9, 65519.0]).tolist() == [65504.0, -65504.0, 65504.0]


# Rotation and code book


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_rotation_is_orthogonal(dim: int) -> None:
    x, y = gaussian(12, 3, dim), gaussian(13, 3, dim)
    for seed in (None, 0, 7):
        a, b = ref.rotate(x, seed), ref.rotate(y, seed)
        np.testing.assert_allclose(a @ b.T, x @ y.T, atol=1e-12)
        np.testing.assert_allclose(ref.unrotate(a, seed), x, atol=1e-13)


def test_hadamard_by_hand() -> None:
    np.testing.assert_allclose(ref.hadamard_matrix(2) * math.sqrt(2), [[1, 1], [1, -1]])
    h = ref.hadamard_matrix(4)
    np.testing.assert_allclose(h, np.kron(ref.hadamard_matrix(2), ref.hadamard_matrix(2)))
    assert [ref.hadamard_block(d) for d in (64, 80, 96, 128, 256)] == [64, 16, 32, 128, 256]


def test_signs_are_splitmix64() -> None:
    """The first outputs of splitmix64 from 0, as published with the generator."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert ref.signs(0, 4).tolist() == [-1.0 if z >> 63 else 1.0 for z in published]
    assert abs(ref.signs(0, 256).sum()) < 48
    np.testing.assert_array_equal(ref.signs(0, 256)[:64], ref.signs(0, 64))


def test_lloyd_max_tables() -> None:
    levels = {
        1: [0.79788],
        2: [0.45278, 1.51042],
        3: [0.24509, 0.75601, 1.34391, 2.15195],
        4: [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259],
    }
    for bits, half in levels.items():
        np.testing.assert_allclose(ref.lloyd_max(bits)[0][2 ** (bits - 1) :], half, atol=6e-6)
    np.testing.assert_allclose(ref.lloyd_max(3)[1][3:], [0, 0.50055, 1.04996, 1.74793], atol=6e-6)


@pytest.mark.parametrize(
    "bits, mse", [(1, 0.36338), (2, 0.11748), (3, 0.03455), (4, 0.00950), (5, 0.00251), (6, 0.00064)]
)
def test_lloyd_max_distortion(bits: int, mse: float) -> None:
    """The integral of the squared error over N(0, 1), by the midpoint rule."""
    levels, thresholds = (np.array(a) for a in ref.lloyd_max(bits))
    x = (np.arange(400_000) + 0.5) / 20_000 - 10
    error = (x - levels[np.searchsorted(thresholds, x)]) ** 2
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert (error * density).sum() / 20_000 == pytest.approx(mse, rel=8e-3)


@pytest.mark.parametrize("bits, mse", [(1, 0.361), (2, 0.116), (3, 0.034), (4, 0.0093)])
def test_codebook_distortion_on_the_sphere(bits: int, mse: float) -> None:
    """Relative error at D = 128 of rows whose direction is uniform; 'norm' is the paper's scale."""
    x = gaussian(14, 2000, 128)
    codes, scales, _ = ref.codebook_encode(x, bits, scale="norm")
    error = ((ref.codebook_decode(codes, scales, None, bits) - x) ** 2).sum() / (x * x).sum()
    assert error == pytest.approx(mse, rel=0.02)


@pytest.mark.parametrize("bits, shrunk", [(1, 0.64), (2, 0.883), (3, 0.966), (4, 0.991)])
def test_unbiased_scale(bits: int, shrunk: float) -> None:
    """The slope of <q, x^> on <q, x>: 1, where the paper's scale gives one minus the distortion."""
    x, q = gaussian(15, 3000, 128), gaussian(16, 50, 128)
    true = x @ q.T
    for scale, slope in (("unbiased", 1.0), ("norm", shrunk)):
        codes, scales, _ = ref.codebook_encode(x, bits, scale=scale)
        estimate = ref.codebook_decode(codes, scales, None, bits) @ q.T
        assert (estimate * true).sum() / (true * true).sum() == pytest.approx(slope, abs=0.01)


def test_codebook_of_zero_rows_and_means() -> None:
    x = np.zeros((64, 16))
    codes, scales, means = ref.codebook_encode(x, 4, center=32)
    assert means is not None and means.shape == (2, 16) and (scales == 0).all() and (codes == 7).all()
    # A common offset goes to the means, and costs the codes nothing.
    y = gaussian(17, 64, 128)
    plain = ref.codebook_decode(*ref.codebook_encode(y, 3, center=64), 3)
    moved = ref.codebook_decode(*ref.codebook_encode(y + 8.0, 3, center=64), 3)
    assert np.abs(moved - 8.0 - plain).mean() < 0.02


# Scores, rows, budgets


def test_snapkv_pools_zeros_at_the_edges() -> None:
    """Uniform attention: the two rows at either end of the prefix lack neighbours, 3/5 and 4/5 remain."""
    q, k = np.zeros((1, 2, 4, 8)), gaussian(18, 1, 2, 20, 8)
    scores = ref.snapkv_scores(q, k, scale=1.0)[0, 0]
    shares = scores[:16] / scores[5]
    np.testing.assert_allclose(shares, [0.6, 0.8, *[1] * 12, 0.8, 0.6])
    assert (scores[16:] == np.inf).all()


def test_h2o_and_tova_by_hand() -> None:
    """Uniform attention over the visible: H2O favours the old, TOVA is even over heads and rows."""
    q, k = np.zeros((1, 2, 4, 8)), gaussian(19, 1, 2, 4, 8)
    h2o = ref.h2o_scores(q, k, scale=1.0)[0, 0]
    np.testing.assert_allclose(h2o, [1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4])
    np.testing.assert_allclose(ref.tova_scores(q, k, scale=1.0), 0.25)


def test_leverage_is_that_of_a_regression() -> None:
    """The rank of the keys in all, 1 for a row that alone spans a direction, less with a ridge."""
    k = gaussian(23, 1, 2, 50, 8)
    scores = ref.leverage_scores(k, ridge=1e-12)
    np.testing.assert_allclose(scores.sum(axis=2), 8.0, rtol=1e-6)
    k[..., 5] = 0.0
    k[:, :, 20, 5] = 1.0
    # Nothing else has that direction but the mean, which is 1/T of it.
    assert ref.leverage_scores(k, ridge=1e-12)[0, 0, 20] == pytest.approx(1 - 1 / 50)
    assert (ref.leverage_scores(k, ridge=0.1) < ref.leverage_scores(k, ridge=0.01)).all()


def test_keydiff_and_knorm_find_the_odd_one() -> None:
    k = np.ones((1, 1, 9, 8)) * 3
    k[0, 0, 4] = -np.arange(8.0)
    k[0, 0, 6] *= 0.1
    assert ref.keydiff_scores(k).argmax() == 4
    assert ref.knorm_scores(k).argmax() == 6


def test_expected_attention_equals_sampling() -> None:
    """exp(z) is the mean of exp(q.k scale) over q ~ N(mu, Sigma) turned by the mean rotation."""
    d, rng = 8, np.random.default_rng(20)
    k, v = gaussian(21, 1, 1, 3, d), gaussian(22, 1, 1, 3, d)
    mu, root = gaussian(23, 1, 1, d), gaussian(24, d, d) * 0.4
    rot = rotary(d)
    args = {"scale": 0.35, "rotary": rot, "length": 100, "n_future": 16}
    score = ref.expected_attention_scores(k, v, mu, (root @ root.T)[None, None], **args)
    r = np.mean([ref.rope(np.eye(d), np.full(d, p), rot).T for p in range(100, 116)], axis=0)
    q = (mu[0, 0] + rng.standard_normal((200_000, d)) @ root.T) @ r.T
    e = np.exp(0.35 * q @ k[0, 0].T).mean(axis=0)
    expected = e / e.sum() * np.linalg.norm(v[0, 0], axis=-1)
    np.testing.assert_allclose(score[0, 0], expected, rtol=0.01)


def test_rows_kept_are_sorted_and_protected() -> None:
    scores = np.array([[[0, 9, 1, 8, 8, 7, 0, 0.0]]])
    assert ref.keep_rows(scores, 5, sinks=1, recent=2).tolist() == [[[0, 1, 3, 6, 7]]]
    assert ref.keep_rows(scores, 8, sinks=1, recent=2).tolist() == [[list(range(8))]]


def test_pyramid_paper_numbers() -> None:
    capacities = ref.pyramid_paper_capacities(32, 2048, 32, 32768)
    assert (capacities[0], capacities[-1], sum(capacities) / 32) == (3964, 151, 2057.5)
    capacities = ref.pyramid_paper_capacities(32, 128, 8, 32768)
    assert (capacities[0], capacities[-1], sum(capacities) / 32) == (242, 25, 133.5)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pyramid_budgets_sum_exactly(data: st.DataObject) -> None:
    layers, protected = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 70))
    tokens = data.draw(st.integers(protected + 1, 3000))
    limit = data.draw(st.integers(tokens, 5000))
    budgets = ref.pyramid_budgets(layers, tokens, limit, protected)
    assert sum(budgets) == layers * tokens
    assert all(protected <= b <= limit for b in budgets)
    assert budgets == sorted(budgets, reverse=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 50), st.booleans())
def test_adakv_budgets_sum_exactly(seed: int, heads: int, tokens: int, normalize: bool) -> None:
    scores = np.exp(gaussian(seed, heads, 50) * np.arange(1, heads + 1)[:, None])
    budgets = ref.adakv_budgets(scores, tokens, normalize=normalize)
    assert budgets.sum() == heads * tokens
    assert (budgets >= tokens // 5).all() and (budgets <= 50).all()


def test_largest_remainder_gives_ties_to_the_first() -> None:
    assert ref.largest_remainder([Fraction(3, 2)] * 4, 6) == [2, 2, 1, 1]


# Merging


def attention_over(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    out, lse = ref.attention(q[None, None, None], k[None, None], v[None, None], bias=bias[None, None], scale=scale)
    return out[0, 0, 0], lse[0, 0]


@pytest.mark.parametrize("form", ["zip", "bias"])
@pytest.mark.parametrize("at_once", [True, False])
def test_merge_keeps_the_output_of_its_query(form: str, at_once: bool) -> None:
    """Fold 11 rows into one, together or in a chain: output and log-sum-exp stay."""
    q, k, v = gaussian(25, 16) * 2, gaussian(26, 20, 16), gaussian(27, 20, 16)
    k[:12] += q / 4
    bias = np.log(1.0 + np.arange(20) % 3)
    before = attention_over(q, k, v, bias, 0.25)
    chunks = [list(range(12))] if at_once else [[0, i] for i in range(1, 12)]
    for rows in chunks:
        k[0], v[0], bias[0] = ref.merge_rows(k[rows], v[rows], bias[rows], q[None], scale=0.25, form=form)
    rest = [0, *range(12, 20)]
    after = attention_over(q, k[rest], v[rest], bias[rest], 0.25)
    np.testing.assert_allclose(after[0], before[0], atol=1e-12)
    np.testing.assert_allclose(after[1], before[1], atol=1e-12)
    if form == "zip":
        assert np.exp(bias[rest]).sum() == pytest.approx((1.0 + np.arange(20) % 3).sum())


def test_guard_bounds_the_key() -> None:
    """A mean logit near zero makes the paper's factor huge; guarded, the key stays among its members."""
    q, k, v = np.array([[1.0, 0.0]]), np.array([[0.2, 1.0], [-0.345, 1.2]]), np.eye(2)
    free = ref.merge_rows(k, v, np.zeros(2), q, scale=1.0, form="zip")[0]
    guarded = ref.merge_rows(k, v, np.zeros(2), q, scale=1.0, form="guarded")[0]
    assert np.linalg.norm(free) > 5 and np.linalg.norm(guarded) < 1.3


def test_fold_moves_only_similar_rows() -> None:
    k = np.zeros((1, 1, 4, 4))
    k[0, 0] = [[1, 0, 0, 0], [0, 1, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 0, 1]]
    v, q = gaussian(28, 1, 1, 4, 4), gaussian(29, 1, 2, 1, 4)
    kept, dropped = np.array([[[0, 1]]]), np.array([[[2, 3]]])
    folded = ref.keepkv_fold(k, v, q, kept, dropped, scale=0.5, similarity=0.8, form="bias")
    np.testing.assert_array_equal(folded.keys[0, 0, 1], k[0, 0, 1])
    assert folded.bias[0, 0, 1] == 0 and folded.bias[0, 0, 0] > 0
    paper = ref.keepkv_fold(k, v, q, kept, dropped, scale=0.5, similarity=0.8, form="paper")
    np.testing.assert_allclose(paper.bias[0, 0], [math.log(2), 0])


# Rotary positions


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_rope_inverse_and_relative(factor: float) -> None:
    rot, x, y = rotary(16, factor), gaussian(30, 3, 16), gaussian(31, 3, 16)
    at = np.array([0, 5, 70_000])
    np.testing.assert_allclose(ref.unrope(ref.rope(x, at, rot), at, rot), x, atol=1e-13)
    near = (ref.rope(x, at + 3, rot) * ref.rope(y, at, rot)).sum(axis=-1)
    far = (ref.rope(x, at + 1003, rot) * ref.rope(y, at + 1000, rot)).sum(axis=-1)
    np.testing.assert_allclose(near, far, atol=1e-9)
    np.testing.assert_allclose(ref.rope(x, np.zeros(3), rot), x * factor)


def test_rope_leaves_other_channels() -> None:
    rot = Rotary(first=(0, 2), second=(1, 3), frequency=(1.0, 0.1))
    x = gaussian(32, 2, 8)
    turned = ref.rope(x, np.array([3, 4]), rot)
    np.testing.assert_array_equal(turned[:, 4:], x[:, 4:])
    z = (x[:, 0] + 1j * x[:, 1]) * np.exp(1j * np.array([3, 4]))
    np.testing.assert_allclose(turned[:, 0] + 1j * turned[:, 1], z)
