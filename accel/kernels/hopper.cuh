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
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define O16 F4(0), F4(4), F4(8), F4(12)
#define O20 O16, F4(16)
#define O32 O20, F4(20), F4(24), F4(28)
#define O40 O32, F4(32), F4(36)
#define O48 O40, F4(40), F4(44)
#define O64 O48, F4(48), F4(52), F4(56), F4(60)
#define O80 O64, F4(64), F4(68), F4(72), F4(76)

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
// are 16 columns on, 16 * 128 more 16 rows; a sixteenth of it is added to what this returns.
template <int NEXT_COLUMNS> __device__ __forceinline__ uint64 matrix(uint32 at, int beyond) {
  constexpr uint64 SWIZZLED = uint64(1) << 62;
  constexpr uint64 EIGHT_ROWS = uint64(1024 >> 4) << 32;
  constexpr uint64 NEXT = uint64((NEXT_COLUMNS >> 4) & 0x3fff) << 16;
  return (SWIZZLED | EIGHT_ROWS | NEXT) + (at >> 4) + (beyond >> 4);
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
// Until the phase of that parity is over; the first one's is 0.
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
// A box of a tensor of four dimensions, from there on; zeros outside of it. Its bytes count.
__device__ __forceinline__ void copy_box(uint32 to, const Descriptor* from, uint32 barrier, int x,
                                         int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(to), "l"(from),
      "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
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

// ---- Arithmetic ---------------------------------------------------------------------------------

// 2 ^ x.
__device__ __forceinline__ float power(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A pair of half precision.
__device__ __forceinline__ uint32 rounded(float low, float high) {
  uint32 pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
