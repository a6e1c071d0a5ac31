"""Planted faults: the harness reports each by name, and its sound twin passes."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal.device import Device, Launch, MetalFault

SEEDS = range(1, 9)


def run(
    body: str,
    *,
    n: int = 64,
    threadgroup: int = 64,
    device: Device | None = None,
    header: str = "",
    extra: str = "",
    outputs: int | None = None,
    **options: Any,
) -> Launch:
    """Run a kernel of `x` (float, n elements) and `y` (float, `outputs` or n), one thread for each element.

    Args:
        body: statements; `i` is the thread in the grid, `t` in the threadgroup, `lane` in the simdgroup.
        extra: more kernel arguments.
    """
    source = (
        '#include <metal_stdlib>\nusing namespace metal;\n# 1 "kernel"\n'
        f"{header}\n[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],{extra}\n"
        "uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],"
        "uint lane [[thread_index_in_simdgroup]], uint g [[threadgroup_position_in_grid]]) {\n"
        f"{body}\n}}"
    )
    return (device or Device(seed=1)).launch_source(
        source,
        "k",
        buffers=[("x", mx.arange(n).astype(mx.float32))],
        output_names=["y"],
        output_shapes=[(n if outputs is None else outputs,)],
        output_dtypes=[mx.float32],
        grid=(n, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        **options,
    )


def faults(pattern: str, body: str, **options: Any) -> None:
    with pytest.raises(MetalFault, match=pattern):
        run(body, **options)


def values(launch: Launch) -> np.ndarray:
    return np.array(launch.outputs[0])


MIRROR = "threadgroup float s[64]; s[t] = x[i]; {barrier} y[i] = s[63 - t];"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def test_missing_threadgroup_barrier() -> None:
    assert np.array_equal(values(run(MIRROR.format(barrier=BARRIER))), np.arange(64)[::-1])
    for seed in SEEDS:
        faults(
            r"(race: (read|write)|read of unwritten memory: ).*threadgroup array 's' at byte \d+ .*by thread \d+ of",
            MIRROR.format(barrier=""),
            device=Device(seed=seed),
        )


FILLED = f"threadgroup float s[64]; s[t] = -1; {BARRIER} s[t] = x[i]; {{barrier}} y[i] = s[63 - t];"


def test_missing_barrier_is_a_race_even_where_all_was_written() -> None:
    assert np.array_equal(values(run(FILLED.format(barrier=BARRIER))), np.arange(64)[::-1])
    for seed in SEEDS:
        faults(
            r"race: (read|write) of threadgroup array 's' at byte (\d+) .* by thread \d+ of threadgroup 0.*, "
            r"(written|read) before by thread \d+ of threadgroup 0 with no barrier between",
            FILLED.format(barrier=""),
            device=Device(seed=seed),
        )


def test_missing_barrier_changes_the_result() -> None:
    def wrong(barrier: str) -> int:
        runs = [run(FILLED.format(barrier=barrier), device=Device(seed=s, races=False)) for s in SEEDS]
        return sum(not np.array_equal(values(r), np.arange(64)[::-1]) for r in runs)

    assert wrong(BARRIER) == 0
    assert wrong("") > 0


def test_missing_barrier_between_simdgroups_only() -> None:
    """Within a simdgroup the order is right, and simdgroup_barrier does not help across."""
    body = f"threadgroup float s[64]; s[t] = -1; {BARRIER} s[t] = x[i]; {{barrier}} y[i] = s[t ^ 32];"
    run(body.format(barrier=BARRIER))
    for barrier in ("", "simdgroup_barrier(mem_flags::mem_threadgroup);"):
        for seed in SEEDS:
            faults("race: .*'s'", body.format(barrier=barrier), device=Device(seed=seed))


def test_a_simdgroup_barrier_orders_no_other_simdgroup() -> None:
    """In one direction only: what is read is written before, in every order."""
    body = (
        "threadgroup float s[32]; if (t < 32) {{ s[t] = x[i]; }} {barrier} y[i] = t < 32 ? 0 : s[t - 32]; "
        "simdgroup_barrier(mem_flags::mem_threadgroup);"
    )
    assert np.array_equal(values(run(body.format(barrier=BARRIER), device=Device()))[32:], np.arange(32))
    what = "race: read of threadgroup array 's' at byte 0 .* by thread 32 .*, written before by thread 0 of"
    faults(what, body.format(barrier="simdgroup_barrier(mem_flags::mem_threadgroup);"), device=Device())


def test_missing_simdgroup_barrier() -> None:
    body = f"threadgroup float s[64]; s[t] = -1; {BARRIER} s[t] = x[i]; {{barrier}} y[i] = s[t ^ 1];"
    good = body.format(barrier="simdgroup_barrier(mem_flags::mem_threadgroup);")
    assert np.array_equal(values(run(good)), np.arange(64) ^ 1)
    for seed in SEEDS:
        assert np.array_equal(values(run(good, device=Device(seed=seed, races=False))), np.arange(64) ^ 1)
        faults("race: .*'s'.*no barrier between", body.format(barrier=""), device=Device(seed=seed))
    changed = [run(body.format(barrier=""), device=Device(seed=s, races=False)) for s in SEEDS]
    assert any(not np.array_equal(values(r), np.arange(64) ^ 1) for r in changed)


def test_simd_functions_order_no_memory() -> None:
    body = (
        f"threadgroup float s[64]; s[t] = -1; {BARRIER} s[t] = x[i]; float q = simd_sum(x[i]); y[i] = s[t ^ 1] + 0 * q;"
    )
    for seed in SEEDS:
        faults("race: .*'s'", body, device=Device(seed=seed))


def test_barrier_orders_only_the_memory_that_it_names() -> None:
    threadgroup = (
        f"threadgroup float s[64]; s[t] = -1; {BARRIER} s[t] = x[i]; threadgroup_barrier({{}}); y[i] = s[63 - t];"
    )
    device = "y[i] = x[i]; threadgroup_barrier({}); float v = y[63 - t]; threadgroup_barrier({}); y[i] = v;"
    run(threadgroup.format("mem_flags::mem_threadgroup"))
    run(threadgroup.format("mem_flags::mem_device | mem_flags::mem_threadgroup"))
    run(device.format("mem_flags::mem_device", "mem_flags::mem_device"))
    for flags in ("mem_flags::mem_none", "mem_flags::mem_device"):
        faults("race: .*threadgroup array 's'", threadgroup.format(flags))
    for first, second in (("none", "device"), ("threadgroup", "device"), ("device", "threadgroup")):
        faults("race: .*buffer 'y'", device.format(f"mem_flags::mem_{first}", f"mem_flags::mem_{second}"))


def test_write_after_read_needs_a_barrier() -> None:
    body = f"threadgroup float s[64]; s[t] = x[i]; {BARRIER} float v = s[63 - t]; {{barrier}} s[t] = v; y[i] = v;"
    run(body.format(barrier=BARRIER))
    for seed in SEEDS:
        faults("race: (write|read) of threadgroup array 's'", body.format(barrier=""), device=Device(seed=seed))


@pytest.mark.parametrize("turns", ["01", "10"])
def test_every_reader_counts(turns: str) -> None:
    """Lane 0 writes what it and lane 1 read before, whoever read first."""
    reads = "".join(f"if (lane == {r}) {{ v = s; }} v += 0 * simd_sum(v); " for r in turns)
    body = f"threadgroup float s; if (t == 0) {{ s = 1; }} {BARRIER} float v = 0; {reads} "
    write = "if (t == 0) { s = 2; } y[i] = v;"
    run(body + BARRIER + write, n=32, threadgroup=32)
    what = "race: write of threadgroup array 's' .* by thread 0 .*, read before by thread 1 of"
    faults(what, body + write, n=32, threadgroup=32)


def test_a_threadgroup_writes_what_another_has_read() -> None:
    options: dict[str, Any] = {"n": 128, "init_value": 1, "device": Device()}
    run("float v = y[i]; y[i] = v + x[i];", **options)
    what = r"race: .*buffer 'y' at byte 256 .* by thread 0 of threadgroup 1.*, read before by thread 0 of threadgroup 0"
    for rest in ("y[i] = x[i];", "y[i] += x[i];"):
        faults(what, f"if (g == 0) {{ y[i] = y[i + 64]; }} else {{ {rest} }}", **options)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (
            "y[i] = x[i + 1];",
            r"out of bounds: read of 4 bytes, buffer 'x' at byte 256 \(element 64\) of 256 bytes, by thread 63",
        ),
        ("y[i] = x[int(i) - 1];", r"out of bounds: read of 4 bytes, buffer 'x' at byte -4 \(element -1\)"),
        ("y[i + 1] = x[i];", r"out of bounds: write of 4 bytes, buffer 'y' at byte 256 \(element 64\)"),
        ("y[i] = x[i + (1 << 20)];", r"out of bounds: read of 4 bytes, buffer 'x' at byte 419"),
        (
            "threadgroup float s[64]; s[t + 1] = x[i]; y[i] = 0;",
            r"out of bounds: write .* threadgroup array 's' at byte 256",
        ),
        (
            f"threadgroup float s[64], r[64]; r[t] = s[t] = x[i]; {BARRIER} y[i] = r[63 - t] + s[t + 1];",
            r"out of bounds: read .* threadgroup array 's' at byte 256",
        ),
        (
            f"threadgroup float s[64]; s[t] = x[i]; {BARRIER} y[i] = (*(threadgroup packed_float4*)(s + t)).x;",
            r"out of bounds: read of 16 bytes, threadgroup array 's' at byte (244|248|252) ",
        ),
        (
            "float a[4] = {1, 2, 3, 4}; a[t & 3] = 5; y[i] = a[t & 7];",
            r"out of bounds: read .* a thread's own array at byte (16|20|24|28),",
        ),
        (
            "y[i] = table[t & 7];",
            r"out of bounds: read of 4 bytes, constant array 'table' at byte (16|20|24|28) of 16 bytes",
        ),
    ],
)
def test_out_of_bounds(body: str, what: str) -> None:
    faults(what, body, header="constant float table[4] = {1, 2, 3, 4};")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("float a[4] = {x[i]}; y[i] = a[5];", "array index 5 is past the end of the array"),
        ("float a; y[i] = a;", "variable 'a' is uninitialized when used here"),
        ("y[i] = f(x[i]);", "does not return a value"),
    ],
)
def test_what_the_compiler_sees(body: str, what: str) -> None:
    header = "float f(float v) { if (v > 0) { return 1; } }" if "f(" in body else ""
    faults(f"does not compile:(.|\n)*{what}", body, header=header)


def test_in_bounds() -> None:
    run("y[i] = i < 63 ? x[i + 1] : 0;")
    run("y[i] = i > 0 ? x[i - 1] : 0;")
    run("if (i < 63) { y[i + 1] = x[i]; } else { y[0] = 0; }")
    run(
        f"threadgroup float s[64]; threadgroup float r[64]; r[t] = s[t] = x[i]; {BARRIER} y[i] = r[63 - t] + s[63 - t];"
    )
    run("float a[4] = {1, 2, 3, 4}; a[t & 3] = 5; y[i] = a[(t + 1) & 3];")
    got = run("y[i] = table[t & 3];", header="constant float table[4] = {1, 2, 3, 4};")
    assert np.array_equal(values(got), np.arange(64) % 4 + 1)


def test_the_line_of_the_kernel_is_named() -> None:
    faults(r"\(line 5: `y\[i\] = x\[i \+ 1\];`\)", "float a = 0;\ny[i] = x[i + 1];")


@pytest.mark.parametrize(
    "body",
    [
        "threadgroup float s[64]; device float* p = s; y[i] = p[t];",
        "threadgroup float s[64]; y[i] = f(s, t);",
        "thread float* p = y; p[i] = 0;",
        "constant float* p = x; y[i] = p[i];",
        "device float* p = x; p[i] = 0;",
        "float v = x[i]; float& r = v; y[i] = r;",
        "float v[2] = {x[i], 0}; const float* r = v; y[i] = r[0];",
    ],
    ids=[
        *("threadgroup as device", "as an argument", "device as thread", "device as constant", "const lost"),
        *("reference without", "pointer without"),
    ],
)
def test_wrong_address_space(body: str) -> None:
    faults("does not compile", body, header="float f(const device float* p, uint i) { return p[i]; }")


def test_right_address_space() -> None:
    run("y[i] = f(x, t);", header="float f(const device float* p, uint i) { return p[i]; }")
    run("device float* p = y; p[i] = 0;")
    run("float v = x[i]; thread float& r = v; const thread float* p = &r; y[i] = *p;")


@pytest.mark.parametrize(
    "body",
    [
        "y[i] = erf(x[i]);",
        "y[i] = simd_median(x[i]);",
        "double d = x[i]; y[i] = d;",
        "y[i] = __builtin_nonsense(x[i]);",
        "y[i] = simd_sum(long(i));",
        "y[i] = std::max(x[i], 0.0f);",
        "threadgroup_barrier();",
        "y[i] = metal::lgamma(x[i]);",
    ],
)
def test_what_metal_does_not_have(body: str) -> None:
    faults(r"does not compile:\n.*error: ", body)


def test_bfloat_is_converted_to_only_when_told() -> None:
    faults("does not compile:\n.*bfloat", "bfloat b = x[i]; y[i] = float(b);")
    run("bfloat b = static_cast<bfloat>(x[i]); half h = x[i]; y[i] = float(b) + h;")


def test_threadgroup_memory_limit() -> None:
    body = "threadgroup char s[{}]; threadgroup char r[1024]; s[t] = r[t] = 0; y[i] = s[t] + r[t];"
    assert run(body.format(31 * 1024)).threadgroup_bytes == 32768
    faults(r"33792 bytes of threadgroup memory \(s 32768, r 1024\): Metal allows 32768", body.format(32 * 1024))
    faults("32784 bytes", body.format(31 * 1024 + 16))


def test_threadgroup_variables_are_a_kernels() -> None:
    header = "float f(float v, uint t) { threadgroup float s[64]; s[t] = v; return s[t]; }"
    faults("a threadgroup variable outside of a kernel: 'float s.64.'", "y[i] = f(x[i], t);", header=header)
    faults("a threadgroup variable has no initialiser", "threadgroup float s = 0; y[i] = s;")
    header = "float f(threadgroup float* s, float v, uint t) { s[t] = v; return s[t]; }"
    run("threadgroup float s[64]; y[i] = f(s, x[i], t);", header=header)


def test_thread_limit() -> None:
    run("y[i] = x[i];", n=2048, threadgroup=1024)
    faults("1025 threads per threadgroup: Metal allows 1024", "y[i] = x[i];", n=2048, threadgroup=1025)
    faults("must be positive", "y[i] = x[i];", threadgroup=0)


def test_the_thread_limit_of_a_kernel() -> None:
    source = (
        "[[kernel, max_total_threads_per_threadgroup(64)]] void k(device float* y [[buffer(0)]], "
        "uint i [[thread_position_in_grid]]) { y[i] = i; }"
    )

    def launch(threads: int) -> Launch:
        return Device().launch_source(
            "#include <metal_stdlib>\n" + source,
            "k",
            output_names=["y"],
            output_shapes=[(128,)],
            output_dtypes=[mx.float32],
            grid=(128, 1, 1),
            threadgroup=(threads, 1, 1),
        )

    assert np.array_equal(values(launch(64)), np.arange(128))
    with pytest.raises(MetalFault, match="128 threads per threadgroup: the kernel allows 64"):
        launch(128)


def test_buffer_limit() -> None:
    def launch(count: int) -> Launch:
        names = [f"x{i}" for i in range(count - 1)]
        kernel = mx.fast.metal_kernel(
            name=f"many{count}", input_names=names, output_names=["y"], source="y[thread_position_in_grid.x] = x0[0];"
        )
        return Device().launch(
            kernel,
            inputs=[mx.ones((8,))] * (count - 1),
            input_names=names,
            output_names=["y"],
            output_shapes=[(32,)],
            output_dtypes=[mx.float32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )

    assert np.array_equal(np.array(launch(31).outputs[0]), np.ones(32))
    with pytest.raises(MetalFault, match="32 buffers: Metal allows 31"):
        launch(32)


def test_several_lanes_write_one_address() -> None:
    for seed in SEEDS:
        faults(
            r"race: write of buffer 'y' at byte 0 .*written before by thread",
            "y[0] = i; y[i] = 0;",
            device=Device(seed=seed),
        )
    last = {values(run("y[0] = i;", device=Device(seed=s, races=False), init_value=0))[0] for s in SEEDS}
    assert len(last) > 1
    orders = {
        "lanes": ("y[0] = i;", 32),
        "simdgroups": ("if (lane == 0) { y[0] = i; }", 64),
        "threadgroups": ("if (t == 0) { y[0] = g; }", 1024),
    }
    for what, (body, n) in orders.items():
        runs = [run(body, n=n, threadgroup=min(n, 64), device=Device(seed=s, races=False), init_value=0) for s in SEEDS]
        assert len({values(r)[0] for r in runs}) > 1, what
    alone = {values(run("if (i == 5) { y[0] = i; }", device=Device(seed=s), init_value=0))[0] for s in SEEDS}
    assert alone == {5}


def test_bytes_beside_each_other_are_not_a_race() -> None:
    run("device uchar* p = (device uchar*)y; for (uint j = 0; j < 4; j++) { p[i + 64 * j] = i; }")
    faults(
        "race: .*buffer 'y'",
        "device uchar* p = (device uchar*)y; for (uint j = 0; j < 4; j++) { p[(i + 64 * j) / 2] = i; }",
    )
    run("threadgroup half s[64]; s[t] = x[i]; y[i] = s[t];")


def test_output_that_is_not_written() -> None:
    faults(
        r"output 'y' is not written: 4 of 256 bytes, the first at byte 252 \(element 63\)",
        "if (i < 63) { y[i] = x[i]; }",
    )
    assert values(run("if (i < 63) { y[i] = x[i]; }", init_value=7))[63] == 7
    assert np.isnan(values(run("if (i < 63) { y[i] = x[i]; }", allow_unwritten=True))[63])
    faults("read of unwritten memory: buffer 'y' at byte", "y[i] += x[i];")
    assert np.array_equal(values(run("y[i] += x[i];", init_value=1)), np.arange(64) + 1)


def test_threadgroup_memory_that_is_not_written() -> None:
    body = "threadgroup float s[64]; if ({}) {{ s[t] = x[i]; }} y[i] = s[t];"
    run(body.format("t < 64"))
    faults(
        r"read of unwritten memory: threadgroup array 's' at byte \d+ \(element (3[2-9]|[45]\d|6[0-3])\)",
        body.format("t < 32"),
    )
    # A threadgroup finds nothing of the one before it.
    body = "threadgroup float s[64]; if (g == 0) { s[t] = 1; } y[i] = s[t];"
    for seed in (0, *SEEDS):
        faults("read of unwritten memory: .*'s'", body, n=128, device=Device(seed=seed))


def test_barrier_in_divergent_control_flow() -> None:
    run(f"if (i < 64) {{ {BARRIER} }} y[i] = x[i];")
    for seed in SEEDS:
        device = Device(seed=seed)
        faults(
            "divergent barrier: thread .* waits at a threadgroup_barrier and thread .* returned; 32 of 64 threads wait",
            f"y[i] = x[i]; if (t < 32) {{ {BARRIER} }}",
            device=device,
        )
        faults("divergent barrier", f"y[i] = x[i]; if (t < 16) {{ return; }} {BARRIER}", device=device)
        faults(
            "divergent barrier",
            f"y[i] = x[i]; if (t % 2) {{ {BARRIER} y[i] += 1; }} else {{ {BARRIER} }}",
            device=device,
        )
        faults(
            "divergent barrier",
            f"y[i] = x[i]; if (t < 32) {{ {BARRIER} y[i] += 1; }} else {{ {BARRIER} }}",
            device=device,
        )


def test_simd_function_in_divergent_control_flow() -> None:
    """Lanes that have returned take no part; lanes that wait elsewhere are a fault."""
    got = values(run("if (lane >= 16) { y[i] = 0; return; } y[i] = simd_sum(x[i]);"))
    assert got[0] == sum(range(16)) and got[40] == sum(range(32, 48))
    faults(
        "divergent barrier: .*a simd reduction",
        f"float v = 0; if (lane < 16) {{ v = simd_sum(x[i]); }} {BARRIER} y[i] = v;",
    )
    faults("divergent barrier", "y[i] = lane < 16 ? simd_sum(x[i]) : simd_shuffle_xor(x[i], 1);")


def test_shuffle_from_a_lane_that_does_not_exist() -> None:
    got = values(run("y[i] = simd_shuffle(x[i], 20);", n=48, threadgroup=48))
    assert np.array_equal(got[:32], np.full(32, 20)) and np.isnan(got[32:]).all()


def test_matrix_functions_need_the_whole_simdgroup() -> None:
    body = (
        "simdgroup_float8x8 a = make_filled_simdgroup_matrix<float, 8>(2.0f); simdgroup_multiply(a, a, a); "
        "y[i] = a.thread_elements()[0];"
    )
    assert np.array_equal(values(run(body)), np.full(64, 32))
    faults("fewer than 32 active lanes", body, n=48, threadgroup=48)


def test_write_to_an_input() -> None:
    faults(
        r"write to input: buffer 'x' at byte \d+ \(element \d+\) of 256 bytes, by thread",
        "((device float*)x)[i] = 0; y[i] = 0;",
    )


def test_two_threadgroups_write_one_address() -> None:
    run("if (t == 0) { y[g] = g; }", n=256, outputs=4)
    for seed in SEEDS:
        faults(
            r"race: write of buffer 'y' at byte 0 .* by thread 0 of threadgroup \d.*, written before by thread 0 of",
            "if (t == 0) { y[0] = g; }",
            n=256,
            outputs=1,
            device=Device(seed=seed),
        )


def test_no_barrier_orders_threadgroups() -> None:
    body = "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); if (t == 0) {{ y[(i + {}) % 128] += 1; }}"
    assert values(run(body.format(1), n=128, init_value=0))[1] == 2
    for seed in SEEDS:
        faults("race: .*buffer 'y'", body.format(64), n=128, device=Device(seed=seed), init_value=0)


def atomic(body: str, kind: str = "uint", seed: int = 3, **options: Any) -> Launch:
    source = (
        '#include <metal_stdlib>\nusing namespace metal;\n# 1 "kernel"\n'
        f"[[kernel]] void k(device atomic_{kind}* c [[buffer(0)]], uint i [[thread_position_in_grid]],"
        f"uint t [[thread_index_in_threadgroup]]) {{ {body} }}"
    )
    return Device(seed=seed).launch_source(
        source,
        "k",
        output_names=["c"],
        output_shapes=[(2,)],
        output_dtypes=[{"uint": mx.uint32, "int": mx.int32, "float": mx.float32}[kind]],
        grid=(128, 1, 1),
        threadgroup=(64, 1, 1),
        init_value=0,
        **options,
    )


def test_atomics() -> None:
    order = "memory_order_relaxed"
    add = f"atomic_fetch_add_explicit(&c[0], {{}}, {order});"
    assert values(atomic(add.format("i")))[0] == sum(range(128))
    assert values(atomic(add.format("0.5f"), kind="float"))[0] == 64
    assert values(atomic(f"atomic_fetch_max_explicit(&c[0], int(i) - 60, {order});", kind="int"))[0] == 67
    local = (
        f"threadgroup atomic_uint s; if (t == 0) {{ atomic_store_explicit(&s, 0u, {order}); }} {BARRIER} "
        f"atomic_fetch_add_explicit(&s, 1u, {order}); {BARRIER} if (t == 0) {{ "
        f"atomic_fetch_add_explicit(&c[1], atomic_load_explicit(&s, {order}), {order}); }}"
    )
    assert values(atomic(local))[1] == 128
    swap = f"uint e = 0; while (!atomic_compare_exchange_weak_explicit(&c[0], &e, e + 2, {order}, {order})) {{}}"
    assert values(atomic(swap))[0] == 256


def test_atomics_and_plain_accesses_race() -> None:
    with pytest.raises(MetalFault, match=r"race: .*buffer 'c'"):
        atomic("atomic_fetch_add_explicit(&c[0], 1u, memory_order_relaxed); ((device uint*)c)[0] = 1;")
    add = "atomic_fetch_add_explicit(&s, 1u, memory_order_relaxed);"
    body = f"threadgroup atomic_uint s; if (t == 0) {{ *(threadgroup uint*)&s = 0; }} {BARRIER} "
    atomic(body + f"if (t != 5) {{ {add} }}")
    for plain in ("*(threadgroup uint*)&s = 1;", "uint v = *(threadgroup uint*)&s; if (v > 999) { c[0].__s = v; }"):
        with pytest.raises(MetalFault, match=r"race: .*threadgroup array 's'"):
            atomic(body + f"if (t == 5) {{ {plain} }} else {{ {add} }}")
        with pytest.raises(MetalFault, match=r"race: .*threadgroup array 's'.* before by thread 31 "):
            atomic(body + f"if (t < 32) {{ {add} }} if (t == 63) {{ {plain} }}", seed=0)


def test_misaligned_vector() -> None:
    run("y[i] = (*(const device float4*)(x + 4 * (i / 4))).x;")
    run("y[i] = i < 60 ? (*(const device packed_float4*)(x + i)).x : 0;")
    faults(
        r"misaligned: read of 16 bytes that needs a multiple of 16, buffer 'x' at byte 4",
        "y[i] = (*(const device float4*)(x + 1)).x;",
    )


def test_memory_that_is_copied_whole_is_checked() -> None:
    header = "struct S { float v[8]; };"
    body = "S s = ((const device S*)x)[i / 8 + {}]; y[i] = s.v[i % 8];"
    assert np.array_equal(values(run(body.format(0), header=header)), np.arange(64))
    faults("out of bounds: read .*buffer 'x' at byte 256", body.format(1), header=header)


def test_a_kernel_without_end_is_stopped() -> None:
    device = Device(limit_s=0.3)
    run("y[i] = x[i];", device=device)
    faults("no end: thread", "volatile uint a = 1; while (a > 0) { a = a | 1; } y[i] = 0;", device=device)
    run("y[i] = x[i];", device=device)


def test_stack_overflow_is_a_fault() -> None:
    faults("crash of thread", "volatile float a[40000]; a[t] = 1; a[0] = 2; y[i] = a[t];")
    run("volatile float a[4000]; a[t] = 1; y[i] = a[t];")


def test_unbound_and_unknown_names() -> None:
    faults("nothing is bound to n", "y[i] = n;", extra="constant int& n [[buffer(2)]],")
    with pytest.raises(MetalFault, match="no kernel 'other' in the source; it has k"):
        Device().launch_source(
            "[[kernel]] void k(device float* y [[buffer(0)]]) {}", "other", threadgroup=(1, 1, 1), grid=(1, 1, 1)
        )


def test_a_function_constant_without_value_cannot_be_used() -> None:
    header = "constant bool flag [[function_constant(3)]];"
    assert values(run("y[i] = flag ? 1 : 2;", header=header, function_constants={3: True}))[0] == 1
    assert values(run("y[i] = flag ? 1 : 2;", header=header, function_constants={"flag": False}))[0] == 2
    faults("does not link|undefined", "y[i] = flag ? 1 : 2;", header=header)
    run("y[i] = is_function_constant_defined(flag) ? 1 : 2;", header=header)


def test_the_message_of_a_compile_error_is_short_and_has_the_line() -> None:
    with pytest.raises(MetalFault) as caught:
        run("float a = 1;\ny[i] = b;")
    assert re.search(r"kernel:5:8: error: use of undeclared identifier 'b'", str(caught.value))
    assert len(str(caught.value).split("\n")) < 8
