// Runs the threads of a compiled kernel as fibers, checks and counts what they touch.
//
// One threadgroup at a time. A thread runs until it waits (a barrier, a simdgroup function); the lanes of a simdgroup
// take turns in an order drawn from the seed, and so do the simdgroups between barriers. Each round of a simdgroup ends
// when every lane that has not returned waits: at one and the same place, or the launch stops with a fault.
//
// The compiled kernel calls __kvm_device & co. before each access (see ir.py) and __kvm_* for what crosses threads.

#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define COLD __attribute__((cold, noinline))

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;

static const u32 LANES = 32;
static const u32 MAX_THREADS = 1024;
static const u32 MAX_BUFFERS = 31;
static const u64 STACK_BYTES = 128 * 1024;
static const u64 SLOT_BYTES = 1ull << 30;
static const u64 ORIGIN = SLOT_BYTES / 2;  // of a buffer in its slot: what misses a buffer hits no other one

enum Flags { RACES = 1, COUNTERS = 2 };
enum Mem { DEVICE = 1, THREADGROUP = 2 };
enum FaultKind {
  OK,
  OUT_OF_BOUNDS,
  READ_ONLY,
  MISALIGNED,
  RACE,
  UNWRITTEN_READ,
  DIVERGENT,
  BARRIER_MISSED,
  SEGMENT,
  PARTIAL_SIMDGROUP,
  WILD,
  TIMEOUT,
  REFINE,  // not a fault: an access smaller than the granule of the race detector
};

// What touched a granule (1, 2, 4 or 8 bytes) last. Epochs only grow, over all threadgroups of a launch.
struct Cell {
  u32 writer, write_epoch, write_simd_epoch, write_atomic;
  u32 reader, reader2, read_epoch, read_simd_epoch;
  u32 foreign_reader;  // a reader of an earlier threadgroup
  u32 read_atomic;
};

struct Buffer {
  u64 bytes;
  u32 writable;
  u32 granule_shift;
  u64 read, written, unique_read, unique_written;
  u32 initialised;  // false: to read a byte that nothing wrote is a fault
  u32 pad;
  Cell* cells;
  u64* read_stamps;   // per 4 bytes: (threadgroup + 1) << 8 | mask of bytes
  u64* write_stamps;  // the same, and the bytes ever written in bits 4 to 7
};

struct Launch {
  void (*entry)();
  u32 grid[3], group[3];
  u32 buffers;
  u32 flags;
  u64 seed;
  u64 limit_ms;  // of processor time
  u8* arena;
  u32 arena_bytes;
  u32 arena_granule_shift;
  const u8* arena_owner;  // per byte: 0 between arrays, else 1 + the array's number
  const u64* constants;   // pairs: address, bytes
  u32 constant_count;
  u32 fault;
  u64 fault_info;    // the access that failed
  i64 fault_offset;  // in the buffer or the arena
  u32 fault_buffer;  // index; 100: threadgroup memory, 101: stack, 102: a constant array
  u32 fault_other;   // the other thread of a race
  u32 fault_other_kind;  // 0 read, 1 write
  u32 fault_thread;
  u32 fault_live, fault_waiting;
  u64 barriers, simd_barriers, simd_ops;
  u64 threads_run;
  Buffer buffer[MAX_BUFFERS];
};

struct Thread {
  void* sp;
  u32 position[3];
  u32 global;  // linear over the grid's threadgroups, as numbered in fault messages
};

// Where a lane waits, in one word: the return address, 12 bits of detail, and the kind of operation in the highest 4.
typedef u64 Op;
static inline u32 op_kind(Op op) { return (u32)(op >> 60); }
static inline u32 op_detail(Op op) { return (u32)(op >> 48) & 0xfff; }
static inline u64 op_site(Op op) { return op & 0xffffffffffff; }

struct Simdgroup {
  u32 first, count, live, started;
  u32 turn, parity;
  u32 op_mask[2];
  u32 blocked;
  u32 epoch[2];  // [0] device, [1] threadgroup memory
  u8 order[LANES];
  Op op[LANES];
  u64 value[2][LANES];
  u64 extra[LANES];
  u64 result[2][LANES];
  float mma[2][LANES][4];
};

static const u32 OP_BARRIER = 1, OP_SIMD_BARRIER = 2, OP_SHUFFLE = 3, OP_FILL = 4, OP_REDUCE = 5, OP_MMA = 6;

static Launch* L;
static u8* slots;
static u8* stacks;
static void* main_sp;
static volatile int in_fibers;
static pthread_t owner;
static Thread threads[MAX_THREADS];
static Simdgroup simdgroups[MAX_THREADS / LANES];
static u32 group_size[3], group_position[3], groups[3];
static u32 thread_count, simdgroup_count;
static u32 me;           // index in the threadgroup of the running thread
static u32 lane;
static Simdgroup* mine;
static u64 rng;
static u32 group_number;     // linear, from 1
static u32 group_epoch;      // first epoch of this threadgroup
static u32 epoch[2];         // [0] device, [1] threadgroup memory
static u32 next_epoch;
static Cell* arena_cells;
static u8* arena_written;

// ---- fibers

extern "C" void __kvm_switch(void** save, void* load);
#if defined(__x86_64__)
__asm__(
    ".text\n.p2align 4\n"
#if defined(__APPLE__)
    ".globl ___kvm_switch\n___kvm_switch:\n"
#else
    ".globl __kvm_switch\n.type __kvm_switch,@function\n__kvm_switch:\n"
#endif
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\n"
    "popq %rcx\njmpq *%rcx\n");
static void* fresh_stack(u8* top, void (*start)()) {
  u64* sp = (u64*)((u64)top & ~15ull);
  *--sp = 0;
  *--sp = (u64)start;
  sp -= 6;
  return sp;
}
#elif defined(__aarch64__)
__asm__(
    ".text\n.p2align 4\n"
#if defined(__APPLE__)
    ".globl ___kvm_switch\n___kvm_switch:\n"
#else
    ".globl __kvm_switch\n.type __kvm_switch,%function\n__kvm_switch:\n"
#endif
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
static void* fresh_stack(u8* top, void (*start)()) {
  u64* sp = (u64*)((u64)top & ~15ull) - 20;
  memset(sp, 0, 160);
  sp[11] = (u64)start;
  return sp;
}
#else
#error "fibers are written for x86_64 and aarch64"
#endif

INLINE u64 random64() {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return rng;
}

static void to_scheduler() {
  void** save = &threads[me].sp;
  __kvm_switch(save, main_sp);
}

static COLD void fault(u32 kind, u64 info, u32 buffer, i64 offset) {
  L->fault = kind;
  L->fault_info = info;
  L->fault_buffer = buffer;
  L->fault_offset = offset;
  L->fault_thread = threads[me].global;
  to_scheduler();
}

static COLD void race(u64 info, u32 buffer, i64 offset, u32 other, u32 other_wrote) {
  L->fault_other = other;
  L->fault_other_kind = other_wrote;
  fault(RACE, info, buffer, offset);
}

// ---- the schedule of one simdgroup

static void start_round(Simdgroup* g) {
  if (L->seed) {
    for (u32 i = g->count; i > 1; i--) {
      u32 j = (u32)((random64() >> 33) % i);
      u8 t = g->order[i - 1];
      g->order[i - 1] = g->order[j];
      g->order[j] = t;
    }
  }
  g->turn = 0;
}

static void thread_main();

INLINE void resume(Simdgroup* g, u32 next_lane, void** save) {
  u32 t = g->first + next_lane;
  if (t == me && save != &main_sp) {
    return;
  }
  me = t;
  lane = next_lane;
  mine = g;
  __kvm_switch(save, threads[t].sp);
}

static void resolve(Simdgroup* g);

// Lets the next lane of this simdgroup run; returns when the calling lane's turn comes after the operation is done.
INLINE void wait(Simdgroup* g, void** save) {
  while (g->turn < g->count) {
    u32 next = g->order[g->turn++];
    if (g->live >> next & 1) {
      resume(g, next, save);
      return;
    }
  }
  resolve(g);
  if (g->blocked) {
    __kvm_switch(save, main_sp);
    return;
  }
  start_round(g);
  while (g->turn < g->count) {
    u32 next = g->order[g->turn++];
    if (g->live >> next & 1) {
      resume(g, next, save);
      return;
    }
  }
}

static void thread_main() {
  L->entry();
  mine->live &= ~(1u << lane);
  wait(mine, &threads[me].sp);
  __builtin_unreachable();
}

template <typename T>
static u64 bits_of(T v) {
  u64 r = 0;
  memcpy(&r, &v, sizeof v);
  return r;
}
template <typename T>
static T from_bits(u64 b) {
  T v;
  memcpy(&v, &b, sizeof v);
  return v;
}
template <typename T, u32 OPERATION>
INLINE T combine(T a, T b) {
  if constexpr (OPERATION == 0) {
    return (T)(a + b);
  } else if constexpr (OPERATION == 1) {
    return (T)(a * b);
  } else if constexpr (OPERATION == 2) {
    return a != a ? b : b < a ? b : a;
  } else if constexpr (OPERATION == 3) {
    return a != a ? b : a < b ? b : a;
  } else if constexpr (OPERATION == 4) {
    return a & b;
  } else if constexpr (OPERATION == 5) {
    return a | b;
  } else {
    return a ^ b;
  }
}

// Sums and products combine lanes 16 apart, then 8, 4, 2 and 1; an absent lane contributes nothing.
template <typename T, u32 OPERATION>
static void tree(Simdgroup* g, u32 width) {
  u64* in = g->value[g->parity];
  u64* out = g->result[g->parity];
  T v[LANES];
  for (u32 i = 0; i < LANES; i++) {
    v[i] = from_bits<T>(in[i]);
  }
  u32 present = g->live;
  for (u32 step = width / 2; step; step /= 2) {
    for (u32 i = 0; i < LANES; i++) {
      if ((i & (width - 1)) < step) {
        u32 j = i + step;
        bool mine = present >> i & 1, theirs = present >> j & 1;
        T both = combine<T, OPERATION>(v[i], v[j]);
        v[i] = mine && theirs ? both : theirs ? v[j] : v[i];
        present |= (u32)theirs << i;
      }
    }
  }
  for (u32 i = 0; i < LANES; i++) {
    out[i] = bits_of(v[i & ~(width - 1)]);
  }
}

template <typename T, u32 OPERATION>
static void prefix(Simdgroup* g, bool exclusive) {
  T sum = (T)OPERATION;
  for (u32 i = 0; i < LANES; i++) {
    if (g->live >> i & 1) {
      T next = combine<T, OPERATION>(sum, from_bits<T>(g->value[g->parity][i]));
      g->result[g->parity][i] = bits_of(exclusive ? sum : next);
      sum = next;
    }
  }
}

template <typename T, bool INTEGER>
static void reduce(Simdgroup* g, u32 operation) {
  u32 width = operation >= 16 ? 4 : LANES;
  switch (operation) {
    case 0:
    case 16: tree<T, 0>(g, width); return;
    case 1:
    case 17: tree<T, 1>(g, width); return;
    case 2:
    case 18: tree<T, 2>(g, width); return;
    case 3:
    case 19: tree<T, 3>(g, width); return;
    case 7:
    case 8: prefix<T, 0>(g, operation == 8); return;
    case 9:
    case 10: prefix<T, 1>(g, operation == 10); return;
  }
  if constexpr (INTEGER) {
    switch (operation) {
      case 4: tree<T, 4>(g, width); return;
      case 5: tree<T, 5>(g, width); return;
      default: tree<T, 6>(g, width); return;
    }
  }
}

static void resolve(Simdgroup* g) {
  if (!g->live) {
    g->blocked = 2;
    return;
  }
  u32 first = __builtin_ctz(g->live);
  Op op = g->op[first];
  u64 differ = 0;
  for (u32 i = 0; i < LANES; i++) {
    differ |= (g->op[i] ^ op) & -(u64)(g->live >> i & 1);
  }
  if (__builtin_expect(differ != 0, 0)) {
    u32 other = first;
    while (!(g->live >> other & 1) || g->op[other] == op) {
      other++;
    }
    L->fault = DIVERGENT;
    L->fault_buffer = op_kind(op) << 8 | op_kind(g->op[other]);
    L->fault_thread = threads[g->first + first].global;
    L->fault_other = threads[g->first + other].global;
    g->blocked = 3;
    return;
  }
  u32 kind = op_kind(op), detail = op_detail(op);
  if (kind == OP_BARRIER) {
    g->blocked = 1;
    return;
  }
  if (kind == OP_SIMD_BARRIER) {
    L->simd_barriers++;
    if (detail & DEVICE) {
      g->epoch[0] = next_epoch++;
    }
    if (detail & THREADGROUP) {
      g->epoch[1] = next_epoch++;
    }
    return;
  }
  g->op_mask[g->parity] = g->live;
  if (kind == OP_REDUCE) {
    u32 operation = detail & 31;
    if (operation == 11) {
      u64 votes = 0;
      for (u32 i = 0; i < LANES; i++) {
        votes |= (u64)((g->live >> i & 1) && g->value[g->parity][i]) << i;
      }
      for (u32 i = 0; i < LANES; i++) {
        g->result[g->parity][i] = votes;
      }
    } else {
      switch (detail >> 5) {
        case 0: reduce<float, false>(g, operation); break;
        case 1: reduce<_Float16, false>(g, operation); break;
        case 2: reduce<int32_t, true>(g, operation); break;
        case 3: reduce<u32, true>(g, operation); break;
        case 4: reduce<int16_t, true>(g, operation); break;
        case 5: reduce<u16, true>(g, operation); break;
        case 6: reduce<int8_t, true>(g, operation); break;
        default: reduce<u8, true>(g, operation); break;
      }
    }
  }
  if (kind == OP_MMA && g->live != 0xffffffffu) {
    L->fault = PARTIAL_SIMDGROUP;
    L->fault_thread = threads[g->first + first].global;
    g->blocked = 3;
    return;
  }
  g->parity ^= 1;
}

INLINE u32 arrive(u32 kind, u32 detail, u64 site) {
  Simdgroup* g = mine;
  g->op[lane] = (u64)kind << 60 | (u64)detail << 48 | op_site(site);
  u32 parity = g->parity;
  wait(g, &threads[me].sp);
  return parity;
}

#define SITE ((u64)__builtin_return_address(0))

EXPORT u32 __kvm_lane() { return lane; }

EXPORT void __kvm_barrier(u32 flags) {
  arrive(OP_BARRIER, flags, SITE);
}

EXPORT void __kvm_simd_barrier(u32 flags) {
  arrive(OP_SIMD_BARRIER, flags, SITE);
}

EXPORT u64 __kvm_shuffle(u64 bits, u32 source, u32 counted) {
  Simdgroup* g = mine;
  L->simd_ops += counted;
  g->value[g->parity][lane] = bits;
  u32 parity = arrive(OP_SHUFFLE, 0, SITE);
  return source < LANES && (g->op_mask[parity] >> source & 1) ? g->value[parity][source] : ~0ull;
}

EXPORT u64 __kvm_shuffle_fill(u64 bits, u64 fill, int source) {
  Simdgroup* g = mine;
  L->simd_ops++;
  g->value[g->parity][lane] = bits;
  u32 parity = arrive(OP_FILL, 0, SITE);
  if (source < 0 || source >= (int)LANES) {
    return fill;
  }
  return g->op_mask[parity] >> source & 1 ? g->value[parity][source] : ~0ull;
}

EXPORT u64 __kvm_reduce(u64 bits, u32 operation, u32 type) {
  Simdgroup* g = mine;
  L->simd_ops++;
  g->value[g->parity][lane] = bits;
  u32 parity = arrive(OP_REDUCE, operation | type << 5, SITE);
  return g->result[parity][lane];
}

INLINE u32 matrix_row(u32 l) { return ((l / 4) & 4) + (l / 2) % 4; }
INLINE u32 matrix_column(u32 l) { return ((l / 4) & 2) * 2 + (l % 2) * 2; }
INLINE u32 matrix_lane(u32 row, u32 column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column / 2 & 1);
}

EXPORT u64 __kvm_mma(float a0, float a1, float b0, float b1, float c0, float c1) {
  Simdgroup* g = mine;
  L->simd_ops++;
  float* m = g->mma[g->parity][lane];
  m[0] = a0;
  m[1] = a1;
  m[2] = b0;
  m[3] = b1;
  u32 parity = arrive(OP_MMA, 0, SITE);
  u32 row = matrix_row(lane), column = matrix_column(lane);
  float r[2] = {c0, c1};
  for (u32 k = 0; k < 8; k++) {
    float a = g->mma[parity][matrix_lane(row, k)][k & 1];
    float* b = g->mma[parity][matrix_lane(k, column)];
    r[0] += a * b[2];
    r[1] += a * b[3];
  }
  u64 bits;
  memcpy(&bits, r, 8);
  return bits;
}

// ---- positions and arguments

EXPORT u64 __kvm_buffer(u32 index) { return (u64)(slots + index * SLOT_BYTES + ORIGIN); }

EXPORT u32 __kvm_builtin(u32 what, u32 axis) {
  switch (what) {
    case 0: return group_position[axis] * L->group[axis] + threads[me].position[axis];
    case 1: return group_position[axis];
    case 2: return threads[me].position[axis];
    case 3: return me;
    case 4: return group_size[axis];
    case 5: return L->group[axis];
    case 6: return groups[axis];
    case 7: return L->grid[axis];
    case 8: return lane;
    case 9: return me / LANES;
    case 10: return simdgroup_count;
    case 11: return LANES;
    case 12: return me % 4;
    case 13: return me / 4;
    case 14: return (thread_count + 3) / 4;
    case 15: return (L->group[0] * L->group[1] * L->group[2] + LANES - 1) / LANES;
    case 16: return (L->group[0] * L->group[1] * L->group[2] + 3) / 4;
    default: return 0;
  }
}

// ---- accesses. info: bytes, 16 bits; alignment, 8 bits; 1 for a write, 8 bits; site, 32 bits

INLINE u32 info_bytes(u64 info) { return info & 0xffff; }
INLINE u32 info_align(u64 info) { return info >> 16 & 0xff; }
INLINE u32 info_write(u64 info) { return info >> 24 & 1; }
INLINE u32 info_atomic(u64 info) { return info >> 25 & 1; }

INLINE u32 simdgroup_of(u32 global) { return (global - threads[0].global) / LANES; }

INLINE void check_cell(Cell* c, u64 info, u32 memory, u32 buffer, i64 offset) {
  u32 who = threads[me].global;
  u32 now = epoch[memory], simd_now = mine->epoch[memory];
  u32 atomic = info_atomic(info);
  if (c->write_epoch) {
    if (c->write_epoch < group_epoch) {
      if (!(atomic && c->write_atomic)) {
        race(info, buffer, offset, c->writer, 1);
      }
    } else if (c->writer != who && c->write_epoch == now && !(atomic && c->write_atomic)) {
      if (!(simdgroup_of(c->writer) == me / LANES && c->write_simd_epoch != simd_now)) {
        race(info, buffer, offset, c->writer, 1);
      }
    }
  }
  if (!info_write(info)) {
    if (c->read_epoch && c->read_epoch < group_epoch && !c->read_atomic) {
      c->foreign_reader = c->reader + 1;
    }
    u32 same = c->read_epoch == now;
    if (!same || (simdgroup_of(c->reader) == me / LANES && c->read_simd_epoch != simd_now &&
                  simdgroup_of(c->reader2) == me / LANES)) {
      c->reader = c->reader2 = who;
      c->read_epoch = now;
      c->read_atomic = atomic;
    } else if (c->reader != who) {
      if (c->reader2 == c->reader || simdgroup_of(c->reader) == simdgroup_of(c->reader2)) {
        c->reader2 = who;
      }
      c->read_atomic &= atomic;
    }
    c->read_simd_epoch = simd_now;
    return;
  }
  if (c->foreign_reader) {
    race(info, buffer, offset, c->foreign_reader - 1, 0);
  }
  if (c->read_epoch && !(atomic && c->read_atomic)) {
    if (c->read_epoch < group_epoch) {
      race(info, buffer, offset, c->reader, 0);
    } else if (c->read_epoch == now) {
      u32 ordered = c->read_simd_epoch != simd_now;
      if (c->reader != who && !(ordered && simdgroup_of(c->reader) == me / LANES)) {
        race(info, buffer, offset, c->reader, 0);
      }
      if (c->reader2 != who && !(ordered && simdgroup_of(c->reader2) == me / LANES)) {
        race(info, buffer, offset, c->reader2, 0);
      }
    }
  }
  c->writer = who;
  c->write_epoch = now;
  c->write_simd_epoch = simd_now;
  c->write_atomic = atomic;
}

INLINE u32 stamp(u64* stamps, u64 offset, u32 bytes, u32 ever) {
  u64 generation = (u64)group_number << 8;
  u32 fresh = 0;
  u64 end = offset + bytes;
  while (offset < end) {
    u64 word = offset >> 2;
    u64 stop = (word + 1) * 4 < end ? (word + 1) * 4 : end;
    u32 mask = ((1u << (stop - offset)) - 1) << (offset & 3);
    u64 s = stamps[word];
    u32 seen = (s & ~0xffull) == generation ? s & 15 : 0;
    fresh += __builtin_popcount(mask & ~seen);
    stamps[word] = generation | (s & 0xf0) | (ever ? mask << 4 : 0) | seen | mask;
    offset = stop;
  }
  return fresh;
}

static void on_device(u64 address, u64 info) {
  u32 bytes = info_bytes(info);
  u64 relative = address - (u64)slots;
  u32 index = (u32)(relative / SLOT_BYTES);
  if (__builtin_expect(relative >= (u64)SLOT_BYTES * L->buffers, 0)) {
    fault(WILD, info, 0, (i64)address);
  }
  i64 offset = (i64)(relative & (SLOT_BYTES - 1)) - (i64)ORIGIN;
  Buffer* b = &L->buffer[index];
  if (__builtin_expect((u64)offset + bytes > b->bytes || offset < 0, 0)) {
    fault(OUT_OF_BOUNDS, info, index, offset);
  }
  if (__builtin_expect(address & (info_align(info) - 1), 0)) {
    fault(MISALIGNED, info, index, offset);
  }
  if (info_write(info)) {
    if (__builtin_expect(!b->writable, 0)) {
      fault(READ_ONLY, info, index, offset);
    }
    b->written += bytes;
    b->unique_written += stamp(b->write_stamps, offset, bytes, 1);
  } else {
    b->read += bytes;
    if (b->read_stamps) {
      b->unique_read += stamp(b->read_stamps, offset, bytes, 0);
    }
    if (b->writable && !b->initialised) {
      for (u32 i = 0; i < bytes; i++) {
        if (!(b->write_stamps[(offset + i) >> 2] >> (4 + ((offset + i) & 3)) & 1)) {
          fault(UNWRITTEN_READ, info, index, offset + i);
        }
      }
    }
  }
  if (b->cells) {
    if (__builtin_expect((offset | bytes) & ((1 << b->granule_shift) - 1), 0)) {
      fault(REFINE, info, index, offset);
    }
    u64 last = (offset + bytes - 1) >> b->granule_shift;
    for (u64 i = (u64)offset >> b->granule_shift; i <= last; i++) {
      check_cell(&b->cells[i], info, 0, index, i << b->granule_shift);
    }
  }
}

EXPORT void __kvm_device(u64 address, u64 info) { on_device(address, info); }

EXPORT void __kvm_constant(u64 address, u64 info) {
  if (address - (u64)slots < (u64)SLOT_BYTES * L->buffers) {
    on_device(address, info);
    return;
  }
  for (u32 i = 0; i < L->constant_count; i++) {
    u64 at = address - L->constants[2 * i];
    if (at < L->constants[2 * i + 1] && at + info_bytes(info) <= L->constants[2 * i + 1]) {
      return;
    }
  }
  fault(WILD, info, 102, (i64)address);
}

EXPORT void __kvm_threadgroup(u64 address, u64 info) {
  u64 offset = address - (u64)L->arena;
  u32 bytes = info_bytes(info);
  if (__builtin_expect(offset >= L->arena_bytes || offset + bytes > L->arena_bytes, 0)) {
    fault(OUT_OF_BOUNDS, info, 100, (i64)offset);
  }
  if (__builtin_expect(!L->arena_owner[offset] || L->arena_owner[offset] != L->arena_owner[offset + bytes - 1], 0)) {
    fault(OUT_OF_BOUNDS, info, 100, (i64)offset);
  }
  if (__builtin_expect(address & (info_align(info) - 1), 0)) {
    fault(MISALIGNED, info, 100, (i64)offset);
  }
  if (info_write(info)) {
    memset(arena_written + offset, 1, bytes);
  } else {
    for (u32 i = 0; i < bytes; i++) {
      if (__builtin_expect(!arena_written[offset + i], 0)) {
        fault(UNWRITTEN_READ, info, 100, (i64)(offset + i));
      }
    }
  }
  if (L->flags & RACES) {
    if (__builtin_expect((offset | bytes) & ((1u << L->arena_granule_shift) - 1), 0)) {
      fault(REFINE, info, 100, (i64)offset);
    }
    u64 last = (offset + bytes - 1) >> L->arena_granule_shift;
    for (u64 i = offset >> L->arena_granule_shift; i <= last; i++) {
      check_cell(&arena_cells[i], info, 1, 100, i << L->arena_granule_shift);
    }
  }
}

// An access to thread memory whose array is known to the compiler: at `base`, of `limit` bytes.
EXPORT void __kvm_private(u64 base, u64 limit, u64 address, u64 info) {
  if (__builtin_expect(address - base >= limit || address - base + info_bytes(info) > limit, 0)) {
    fault(OUT_OF_BOUNDS, info, 101, (i64)(address - base));
  }
}

EXPORT void __kvm_generic(u64 address, u64 info) {
  if (address - (u64)slots < (u64)SLOT_BYTES * MAX_BUFFERS) {
    on_device(address, info);
  } else if (address - (u64)L->arena < L->arena_bytes) {
    __kvm_threadgroup(address, info);
  } else if (address - (u64)stacks >= STACK_BYTES * MAX_THREADS) {
    fault(WILD, info, 101, (i64)address);
  }
}

// A copy or fill: one end of it, in address space `space`.
EXPORT void __kvm_span(u64 address, u64 bytes, u64 info, u32 space) {
  for (u64 i = 0; i < bytes; i += 64) {
    u64 part = info | (bytes - i < 64 ? bytes - i : 64);
    switch (space) {
      case 1: on_device(address + i, part); break;
      case 2: __kvm_constant(address + i, part); break;
      case 3: __kvm_threadgroup(address + i, part); break;
      default: __kvm_generic(address + i, part);
    }
  }
}

template <typename T>
static T atomic_apply(T old, T v, u32 operation) {
  switch (operation) {
    case 1:
    case 2: return v;
    case 4: return old + v;
    case 5: return old - v;
    case 6: return v < old ? v : old;
    case 7: return old < v ? v : old;
    default: return old;
  }
}
template <typename T>
static u64 atomic_integer(u64 address, T v, T expected, u32 operation) {
  T old;
  memcpy(&old, (void*)address, sizeof old);
  T result = operation == 3   ? (old == expected ? v : old)
             : operation == 8 ? (T)(old & v)
             : operation == 9 ? (T)(old | v)
             : operation == 10 ? (T)(old ^ v)
                               : atomic_apply(old, v, operation);
  if (operation) {
    memcpy((void*)address, &result, sizeof result);
  }
  return bits_of(old);
}

// operation: 0 load, 1 store, 2 exchange, 3 compare and exchange, 4.. fetch; type: 0 float, 1 int, 2 uint, 3 bool, 4 ulong
EXPORT u64 __kvm_atomic(u64 address, u64 operand, u64 expected, u32 operation, u32 type) {
  u32 bytes = type == 4 ? 8 : type == 3 ? 1 : 4;
  u64 info = bytes | (u64)bytes << 16 | 2ull << 24;
  if (operation != 1) {
    __kvm_generic(address, info);
  }
  if (operation != 0) {
    __kvm_generic(address, info | 1 << 24);
  }
  if (type == 0) {
    if (operation == 3) {
      return atomic_integer<u32>(address, operand, expected, operation);
    }
    float old;
    memcpy(&old, (void*)address, 4);
    float result = atomic_apply(old, from_bits<float>(operand), operation);
    if (operation) {
      memcpy((void*)address, &result, 4);
    }
    return bits_of(old);
  }
  switch (type) {
    case 1: return atomic_integer<int32_t>(address, operand, expected, operation);
    case 2: return atomic_integer<u32>(address, operand, expected, operation);
    case 3: return atomic_integer<u8>(address, operand, expected, operation);
    default: return atomic_integer<u64>(address, operand, expected, operation);
  }
}

// ---- conversions that clang leaves to its own library

static u16 bfloat_of(float f) {
  u32 b = (u32)bits_of(f);
  if (f != f) {
    return (u16)(b >> 16 | 0x40);
  }
  return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// A float that rounds as the double would: not to nearest but, where digits are lost, to the odd neighbour.
static float to_odd(double d) {
  float f = (float)d;
  u32 b = (u32)bits_of(f);
  double back = f;
  if (d != d || back == d) {
    return f;
  }
  if ((back < 0 ? -back : back) > (d < 0 ? -d : d)) {
    b--;
  }
  return from_bits<float>(b | 1);
}

#if defined(__x86_64__)
static u16 half_of(float f) {
  u32 b = (u32)bits_of(f);
  u32 sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return (u16)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  }
  if (magnitude >= 0x477ff000) {
    return (u16)(sign | 0x7c00);
  }
  if (magnitude >= 0x38800000) {
    u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (u16)(sign | ((rounded - 0x38000000) >> 13));
  }
  // Subnormal: in units of 2^-24, to which adding 2^-1 aligns a float's last place.
  float aligned = from_bits<float>(magnitude) + 0.5f;
  return (u16)(sign | ((u32)bits_of(aligned) - 0x3f000000));
}

EXPORT float __extendhfsf2(u16 h) {
  u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) {
    return from_bits<float>(sign | 0x7f800000 | mantissa << 13);
  }
  if (exponent == 0) {
    float v = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -v : v;
  }
  return from_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// The x86 calling convention returns 16-bit floats in xmm0: a float whose low half is the value does the same.
EXPORT float __truncsfhf2(float f) { return from_bits<float>(half_of(f)); }
EXPORT float __truncdfhf2(double d) { return from_bits<float>(half_of(to_odd(d))); }
EXPORT float __truncsfbf2(float f) { return from_bits<float>(bfloat_of(f)); }
EXPORT float __truncdfbf2(double d) { return from_bits<float>(bfloat_of(to_odd(d))); }
#else
EXPORT __bf16 __truncsfbf2(float f) { return from_bits<__bf16>(bfloat_of(f)); }
EXPORT __bf16 __truncdfbf2(double d) { return from_bits<__bf16>(bfloat_of(to_odd(d))); }
#endif

// ---- launches

static COLD void on_signal(int, siginfo_t* info, void*) {
  u64 address = (u64)info->si_addr;
  u64 relative = address - (u64)slots;
  if (!L || !pthread_equal(pthread_self(), owner)) {
    signal(SIGSEGV, SIG_DFL);  // not ours: it happens again, and ends the process as it would have
    signal(SIGBUS, SIG_DFL);
    return;
  }
  L->fault = SEGMENT;
  L->fault_info = 0;
  L->fault_thread = threads[me].global;
  L->fault_buffer = 102;
  L->fault_offset = (i64)address;
  if (relative < SLOT_BYTES * MAX_BUFFERS) {
    L->fault_buffer = (u32)(relative / SLOT_BYTES);
    L->fault_offset = (i64)(relative & (SLOT_BYTES - 1)) - (i64)ORIGIN;
  } else if (address - (u64)stacks < STACK_BYTES * MAX_THREADS) {
    L->fault_buffer = 101;
  }
  void* nowhere;
  __kvm_switch(&nowhere, main_sp);
}

static void arm(u64 ms) {
  struct itimerval timer = {};
  timer.it_value.tv_sec = (time_t)(ms / 1000);
  timer.it_value.tv_usec = (suseconds_t)(ms % 1000 * 1000);
  setitimer(ITIMER_VIRTUAL, &timer, 0);
}

static COLD void on_timer(int number) {
  if (!L) {
    return;
  }
  if (!pthread_equal(pthread_self(), owner)) {
    pthread_kill(owner, number);
    return;
  }
  if (!in_fibers) {
    arm(10);
    return;
  }
  L->fault = TIMEOUT;
  L->fault_info = 0;
  L->fault_buffer = 102;
  L->fault_thread = threads[me].global;
  void* nowhere;
  __kvm_switch(&nowhere, main_sp);
}

EXPORT u8* kvm_slots() {
  if (!slots) {
    slots = (u8*)mmap(0, SLOT_BYTES * MAX_BUFFERS, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    stacks = (u8*)mmap(0, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE,
                       -1, 0);
    if (slots == MAP_FAILED || stacks == MAP_FAILED) {
      slots = 0;
      return 0;
    }
    for (u32 i = 0; i < MAX_THREADS; i++) {
      mprotect(stacks + i * STACK_BYTES, 16384, PROT_NONE);
    }
  }
  return slots + ORIGIN;
}

INLINE u64 page_up(u64 bytes) {
  u64 page = (u64)getpagesize();
  return (bytes + page - 1) / page * page;
}

// Makes buffer `index` of `bytes` bytes accessible; returns its address, or 0.
EXPORT void* kvm_map(u32 index, u64 bytes) {
  u8* at = slots + index * SLOT_BYTES + ORIGIN;
  return bytes && mprotect(at, page_up(bytes), PROT_READ | PROT_WRITE) ? 0 : at;
}

EXPORT void kvm_unmap(u32 index, u64 bytes) {
  if (bytes) {
    u8* at = slots + index * SLOT_BYTES + ORIGIN;
    madvise(at, page_up(bytes), MADV_DONTNEED);
    mprotect(at, page_up(bytes), PROT_NONE);
  }
}

static void* fresh(u64 bytes) {
  void* p = mmap(0, page_up(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? 0 : p;
}

static void run_threadgroup() {
  thread_count = group_size[0] * group_size[1] * group_size[2];
  simdgroup_count = (thread_count + LANES - 1) / LANES;
  group_epoch = next_epoch;
  epoch[0] = epoch[1] = next_epoch++;
  u32 base = (group_number - 1) * (L->group[0] * L->group[1] * L->group[2]);
  u32 i = 0;
  for (u32 z = 0; z < group_size[2]; z++) {
    for (u32 y = 0; y < group_size[1]; y++) {
      for (u32 x = 0; x < group_size[0]; x++, i++) {
        Thread* t = &threads[i];
        t->position[0] = x;
        t->position[1] = y;
        t->position[2] = z;
        t->global = base + i;
        // Stacks start at different cache sets.
        t->sp = fresh_stack(stacks + (u64)(i + 1) * STACK_BYTES - i % 64 * 192, thread_main);
      }
    }
  }
  for (u32 s = 0; s < simdgroup_count; s++) {
    Simdgroup* g = &simdgroups[s];
    g->first = s * LANES;
    g->count = thread_count - g->first < LANES ? thread_count - g->first : LANES;
    g->live = g->count == LANES ? 0xffffffffu : (1u << g->count) - 1;
    g->parity = 0;
    g->epoch[0] = g->epoch[1] = 0;
    for (u32 l = 0; l < LANES; l++) {
      g->order[l] = (u8)l;
    }
  }
  if (L->arena_bytes) {
    memset(L->arena, 0xff, L->arena_bytes);
    memset(arena_written, 0, L->arena_bytes);
    if (L->flags & RACES) {
      memset(arena_cells, 0, ((u64)L->arena_bytes >> L->arena_granule_shift) * sizeof(Cell));
    }
  }
  L->threads_run += thread_count;
  u32 live_groups = simdgroup_count;
  u8 order[MAX_THREADS / LANES];
  for (u32 s = 0; s < simdgroup_count; s++) {
    order[s] = (u8)s;
  }
  while (live_groups) {
    if (L->seed) {
      for (u32 s = simdgroup_count; s > 1; s--) {
        u32 j = (u32)((random64() >> 33) % s);
        u8 t = order[s - 1];
        order[s - 1] = order[j];
        order[j] = t;
      }
    }
    for (u32 s = 0; s < simdgroup_count; s++) {
      Simdgroup* g = &simdgroups[order[s]];
      if (!g->live) {
        continue;
      }
      g->blocked = 0;
      start_round(g);
      in_fibers = 1;
      wait(g, &main_sp);
      in_fibers = 0;
      if (L->fault) {
        return;
      }
    }
    Op at = 0;
    Simdgroup* returned = 0;
    u32 live = 0, waiting_thread = 0;
    live_groups = 0;
    for (u32 s = 0; s < simdgroup_count; s++) {
      Simdgroup* g = &simdgroups[s];
      u32 all = g->count == LANES ? 0xffffffffu : (1u << g->count) - 1;
      if (g->live != all) {
        returned = g;
      }
      live += __builtin_popcount(g->live);
      if (!g->live) {
        continue;
      }
      live_groups++;
      u32 first = __builtin_ctz(g->live);
      Op op = g->op[first];
      if (!at) {
        at = op;
        waiting_thread = threads[g->first + first].global;
      } else if (op != at) {
        L->fault = DIVERGENT;
        L->fault_buffer = OP_BARRIER << 8 | OP_BARRIER;
        L->fault_thread = waiting_thread;
        L->fault_other = threads[g->first + first].global;
        return;
      }
    }
    if (!at) {
      return;
    }
    if (returned) {
      u32 all = returned->count == LANES ? 0xffffffffu : (1u << returned->count) - 1;
      L->fault = BARRIER_MISSED;
      L->fault_thread = waiting_thread;
      L->fault_other = threads[returned->first + __builtin_ctz(all & ~returned->live)].global;
      L->fault_live = live;
      L->fault_waiting = thread_count;
      return;
    }
    L->barriers++;
    if (op_detail(at) & DEVICE) {
      epoch[0] = next_epoch++;
    }
    if (op_detail(at) & THREADGROUP) {
      epoch[1] = next_epoch++;
    }
  }
}

// Runs a launch; returns the kind of fault, 0 for none, -1 for no memory. Poisons nothing and keeps nothing mapped.
EXPORT int kvm_run(Launch* launch) {
  L = launch;
  rng = launch->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  next_epoch = 1;
  group_number = 0;
  u64 mapped[MAX_BUFFERS][3];
  bool ok = true;
  for (u32 i = 0; i < launch->buffers; i++) {
    Buffer* b = &launch->buffer[i];
    u64 words = (b->bytes + 3) / 4 + 1;
    bool counting = launch->flags & COUNTERS;
    mapped[i][0] = b->bytes && b->writable && (launch->flags & RACES) ? (((b->bytes - 1) >> b->granule_shift) + 1) * sizeof(Cell) : 0;
    mapped[i][1] = counting ? words * 8 : 0;
    mapped[i][2] = b->writable ? words * 8 : 0;
    b->cells = mapped[i][0] ? (Cell*)fresh(mapped[i][0]) : 0;
    b->read_stamps = mapped[i][1] ? (u64*)fresh(mapped[i][1]) : 0;
    b->write_stamps = mapped[i][2] ? (u64*)fresh(mapped[i][2]) : 0;
    ok = ok && (!mapped[i][0] || b->cells) && (!mapped[i][1] || b->read_stamps) && (!mapped[i][2] || b->write_stamps);
  }
  u64 arena_cell_bytes = ((u64)launch->arena_bytes + 8) * sizeof(Cell);
  arena_cells = (Cell*)fresh(arena_cell_bytes);
  arena_written = (u8*)fresh(launch->arena_bytes + 1);
  ok = ok && arena_cells && arena_written;

  static u8 alternate[65536];
  stack_t stack = {}, old_stack;
  stack.ss_sp = alternate;
  stack.ss_size = sizeof alternate;
  struct sigaction action = {}, alarm = {}, old_segv, old_bus, old_alarm;
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaltstack(&stack, &old_stack);
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  alarm.sa_handler = on_timer;
  alarm.sa_flags = SA_ONSTACK | SA_NODEFER | SA_RESTART;
  sigaction(SIGVTALRM, &alarm, &old_alarm);
  owner = pthread_self();
  in_fibers = 0;
  arm(launch->limit_ms);

  for (u32 a = 0; a < 3; a++) {
    groups[a] = (launch->grid[a] + launch->group[a] - 1) / launch->group[a];
  }
  u32 total = groups[0] * groups[1] * groups[2];
  u32* sequence = (u32*)fresh((u64)total * 4);
  ok = ok && sequence;
  for (u32 i = 0; ok && i < total; i++) {
    u32 j = launch->seed ? (u32)((random64() >> 33) % (i + 1)) : i;
    sequence[i] = sequence[j];
    sequence[j] = i;
  }
  for (u32 i = 0; ok && i < total && !launch->fault; i++) {
    u32 number = sequence[i];
    group_position[0] = number % groups[0];
    group_position[1] = number / groups[0] % groups[1];
    group_position[2] = number / groups[0] / groups[1];
    for (u32 a = 0; a < 3; a++) {
      u32 left = launch->grid[a] - group_position[a] * launch->group[a];
      group_size[a] = left < launch->group[a] ? left : launch->group[a];
    }
    group_number = number + 1;
    run_threadgroup();
  }
  if (sequence) {
    munmap(sequence, page_up((u64)total * 4));
  }

  arm(0);
  sigaction(SIGVTALRM, &old_alarm, 0);
  sigaction(SIGSEGV, &old_segv, 0);
  sigaction(SIGBUS, &old_bus, 0);
  old_stack.ss_flags &= SS_DISABLE;
  sigaltstack(&old_stack, 0);
  if (arena_cells) {
    munmap(arena_cells, page_up(arena_cell_bytes));
  }
  if (arena_written) {
    munmap(arena_written, page_up(launch->arena_bytes + 1));
  }
  for (u32 i = 0; i < launch->buffers; i++) {
    Buffer* b = &launch->buffer[i];
    if (b->cells) {
      munmap(b->cells, page_up(mapped[i][0]));
    }
    if (b->read_stamps) {
      munmap(b->read_stamps, page_up(mapped[i][1]));
    }
  }
  L = 0;
  return ok ? (int)launch->fault : -1;
}

// Frees the record of what was written, which the caller reads after kvm_run.
EXPORT void kvm_release(Launch* launch) {
  for (u32 i = 0; i < launch->buffers; i++) {
    Buffer* b = &launch->buffer[i];
    if (b->write_stamps) {
      munmap(b->write_stamps, page_up(((b->bytes + 3) / 4 + 1) * 8));
      b->write_stamps = 0;
    }
  }
}

// Offset of the first byte of a buffer that nothing wrote, -1 if there is none. Counts them in *missing.
EXPORT i64 kvm_unwritten(Launch* launch, u32 index, u64* missing) {
  Buffer* b = &launch->buffer[index];
  i64 first = -1;
  for (u64 i = 0; i < b->bytes; i++) {
    if (!(b->write_stamps[i >> 2] >> (4 + (i & 3)) & 1)) {
      first = first < 0 ? (i64)i : first;
      ++*missing;
    }
  }
  return first;
}

EXPORT u64 kvm_sizeof_launch() { return sizeof(Launch); }
