// What Hopper can do and C++ cannot say: its instructions, by names. Without a header of CUDA's.
//
// tests/kernels/simulated/hopper.cuh has the same names for C++ alone. Compiled with BF16.

#pragma once

typedef unsigned long long uint64;
typedef unsigned int uint32;
typedef unsigned short uint16;
struct __align__(64) Descriptor { uint64 opaque[16]; };  // CUtensorMap

#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

// ---- Products -----------------------------------------------------------------------------------

#define D8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define R16 D8(0, 1, 2, 3, 4, 5, 6, 7) ", " D8(8, 9, 10, 11, 12, 13, 14, 15)
#define R20 R16 ", %16, %17, %18, %19"
#define R32 R16 ", " D8(16, 17, 18, 19, 20, 21, 22, 23) ", " D8(24, 25, 26, 27, 28, 29, 30, 31)
#define R40 R32 ", " D8(32, 33, 34, 35, 36, 37, 38, 39)
#define R48 R40 ", " D8(40, 41, 42, 43, 44, 45, 46, 47)
#define R64 R48 ", " D8(48, 49, 50, 51, 52, 53, 54, 55) ", " D8(56, 57, 58, 59, 60, 61, 62, 63)
#define R80 R64 ", " D8(64, 65, 66, 67, 68, 69, 70, 71) ", " D8(72, 73, 74, 75, 76, 77, 78, 79)
#define R96 R80 ", " D8(80, 81, 82, 83, 84, 85, 86, 87) ", " D8(88, 89, 90, 91, 92, 93, 94, 95)
#define R112 R96 ", " D8(96, 97, 98, 99, 100, 101, 102, 103) ", " \
  D8(104, 105, 106, 107, 108, 109, 110, 111)
#define R120 R112 ", " D8(112, 113, 114, 115, 116, 117, 118, 119)
#define R128 R120 ", " D8(120, 121, 122, 123, 124, 125, 126, 127)
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define O16 F4(0), F4(4), F4(8), F4(12)
#define O20 O16, F4(16)
#define O32 O20, F4(20), F4(24), F4(28)
#define O40 O32, F4(32), F4(36)
#define O48 O40, F4(40), F4(44)
#define O64 O48, F4(48), F4(52), F4(56), F4(60)
#define O80 O64, F4(64), F4(68), F4(72), F4(76)
#define O96 O80, F4(80), F4(84), F4(88), F4(92)
#define O120 O96, F4(96), F4(100), F4(104), F4(108), F4(112), F4(116)
#define O128 O120, F4(120), F4(124)

// d (+)= a . b of 64 rows, COLUMNS columns and 16 products each, by a warpgroup; b: a matrix().
// TRANSPOSED: its rows are what is summed over. a and d: this thread's part, not to be touched
// until products_done.
template <int COLUMNS, bool ADDS, bool TRANSPOSED> struct Product;

#define PRODUCT(COLUMNS, PARTS, A0, A1, A2, A3, B, ADD, TURN)                                     \
  template <bool ADDS, bool TRANSPOSED> struct Product<COLUMNS, ADDS, TRANSPOSED> {               \
    static __device__ __forceinline__ void issue(float (&d)[PARTS], const uint32 (&a)[4],         \
                                                 uint64 b) {                                      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                             \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE          \
                   " {" R##PARTS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B              \
                   ", p, 1, 1, %" #TURN ";\n}\n"                                                  \
                   : O##PARTS                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADDS)),          \
                     "n"(int(TRANSPOSED)));                                                       \
    }                                                                                             \
  };

PRODUCT(40, 20, 20, 21, 22, 23, 24, 25, 26)
PRODUCT(64, 32, 32, 33, 34, 35, 36, 37, 38)
PRODUCT(80, 40, 40, 41, 42, 43, 44, 45, 46)
PRODUCT(96, 48, 48, 49, 50, 51, 52, 53, 54)
PRODUCT(128, 64, 64, 65, 66, 67, 68, 69, 70)
PRODUCT(160, 80, 80, 81, 82, 83, 84, 85, 86)

// d = a . b + (adds ? d : 0) likewise, where `a` is a matrix() of 64 rows as well.
template <int COLUMNS> struct MatrixProduct;

#define MATRIX_PRODUCT(COLUMNS, PARTS, A, B, ADD)                                                 \
  template <> struct MatrixProduct<COLUMNS> {                                                     \
    static __device__ __forceinline__ void issue(float (&d)[PARTS], uint64 a, uint64 b,           \
                                                 bool adds) {                                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                             \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE          \
                   " {" R##PARTS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n"                       \
                   : O##PARTS                                                                     \
                   : "l"(a), "l"(b), "r"(int(adds)));                                             \
    }                                                                                             \
  };

MATRIX_PRODUCT(160, 80, 80, 81, 82)
MATRIX_PRODUCT(192, 96, 96, 97, 98)
MATRIX_PRODUCT(256, 128, 128, 129, 130)

// To stand before products whose registers other instructions have written.
__device__ __forceinline__ void products_follow() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// What was issued so far is one group, to wait for.
__device__ __forceinline__ void products_issued() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// All groups but the last LEFT.
template <int LEFT> __device__ __forceinline__ void products_done() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(LEFT) : "memory");
}
// What products write must not be read ahead of the wait, nor written behind their issue.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Rows of 128 bytes (64 columns) in shared memory, swizzled by 128 bytes; the next 64 columns are
// NEXT_COLUMNS bytes further. `at` and what is `beyond` it: bytes, multiples of 1024. 32 bytes more
// are 16 columns on, 16 * 128 more 16 rows; a sixteenth of it is added to what this returns. (An
// address also has the block's rank in its cluster, which is none of a matrix's business.)
template <int NEXT_COLUMNS> __device__ __forceinline__ uint64 matrix(uint32 at, int beyond) {
  constexpr uint64 SWIZZLED = uint64(1) << 62;
  constexpr uint64 EIGHT_ROWS = uint64(1024 >> 4) << 32;
  constexpr uint64 NEXT = uint64((NEXT_COLUMNS >> 4) & 0x3fff) << 16;
  return (SWIZZLED | EIGHT_ROWS | NEXT) + ((at & 0x3ffff) >> 4) + (beyond >> 4);
}

// d += a . b by one warp: 16 rows, 8 columns, 16 products each.
__device__ __forceinline__ void warp_product(float* d, const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Shared memory, and barriers that count what is copied to it --------------------------------

__device__ __forceinline__ void barrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}
// The one arrival, and how many bytes will be copied.
__device__ __forceinline__ void barrier_expect(uint32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// One arrival at the barrier that lies there in the block of that rank.
__device__ __forceinline__ void barrier_arrive(uint32 barrier, uint32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Until the phase of that parity is over; the first one's is 0, and the one before counts as over.
__device__ __forceinline__ void barrier_wait(uint32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}
// Barriers are there for copies too.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
// That it is used soon.
__device__ __forceinline__ void fetch_ahead(const Descriptor* which) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(which) : "memory");
}
// A box of a tensor of four dimensions, from there on; zeros outside of it. Its bytes count.
__device__ __forceinline__ void copy_box(uint32 to, const Descriptor* from, uint32 barrier, int x,
                                         int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(to), "l"(from),
      "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}
// The same box to the same place in several blocks of the cluster: those whose ranks' bits are in
// `blocks`. Counts at the barrier of each.
__device__ __forceinline__ void copy_box_to(uint32 blocks, uint32 to, const Descriptor* from,
                                            uint32 barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;\n" ::"r"(to), "l"(from),
      "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "h"(uint16(blocks))
      : "memory");
}
// To stand between ordinary writes to shared memory and store_box, in each thread that wrote.
__device__ __forceinline__ void stores_follow() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// What of a box lies outside of the tensor is not written.
__device__ __forceinline__ void store_box(const Descriptor* to, uint32 from, int x, int y, int z,
                                          int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group"
      " [%0, {%1, %2, %3, %4}], [%5];\n" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w), "r"(from)
      : "memory");
}
// What this thread stored so far is one group.
__device__ __forceinline__ void stores_issued() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// All of its groups but the last LEFT have read shared memory, which may be written again.
template <int LEFT> __device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(LEFT) : "memory");
}
// Four matrices of 8 rows of 16 bytes. Of matrix i lane 8 * i + r says where row r lies; each lane
// has columns 2 * (lane % 4) and the next of row lane / 4.
__device__ __forceinline__ void store_matrices(uint32 to, const uint32 (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32 from, uint32 (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from) : "memory");
}
__device__ __forceinline__ uint32 load_shared(uint32 from) {
  uint32 word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from));
  return word;
}
// Counts from 0 to `last` and over again. Returns what it was. It orders nothing: what the counting
// threads have read must have arrived, as products_done sees to.
__device__ __forceinline__ uint32 count_up(uint32 counter, uint32 last) {
  uint32 before;
  asm volatile("atom.relaxed.cta.shared::cta.inc.u32 %0, [%1], %2;\n"
               : "=r"(before) : "r"(counter), "r"(last) : "memory");
  return before;
}

// ---- Blocks and launches beside this one --------------------------------------------------------

__device__ __forceinline__ uint32 cluster_rank() {
  uint32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
// Of all threads of all blocks of a cluster.
__device__ __forceinline__ void cluster_meet() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::: "memory");
}
// From here on this warpgroup's threads have COUNT registers, fewer or more than before; those that
// want more wait until others have fewer.
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
// What the launch before has written is there, and may be overwritten; the next may begin.
__device__ __forceinline__ void launches_overlap() {
  asm volatile(
      "griddepcontrol.wait;\n"
      "griddepcontrol.launch_dependents;\n" ::: "memory");
}

// ---- Arithmetic ---------------------------------------------------------------------------------

// 2 ^ x.
__device__ __forceinline__ float power(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A pair of half precision.
__device__ __forceinline__ uint32 rounded(float low, float high) {
  uint32 pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ void widened(uint32 pair, float& low, float& high) {
#if BF16
  low = __int_as_float(pair << 16);
  high = __int_as_float(pair & 0xffff0000);
#else
  asm("{\n.reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n}\n"
      : "=f"(low), "=f"(high) : "r"(pair));
#endif
}
