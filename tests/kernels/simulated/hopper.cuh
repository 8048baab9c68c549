// What accel/kernels/hopper.cuh offers, in C++ alone: a kernel runs on the CPU, a cluster at a time.
//
// Every thread of a cluster is a fiber, which is left only where it waits: for its warp (shuffles,
// votes, products), its warpgroup, its block, its cluster, or a barrier in shared memory. Who goes
// on is drawn by lot, a whole warp at a time, so that warps lag behind others. It is as unkind as
// PTX allows:
//
// - A product is computed when its warp waits for it, from what registers and memory hold by then.
//   Until then its result is NaN. To write its registers or its matrix meanwhile is an error.
// - A copy makes NaN of its destination at once, and arrives when someone has come to wait for it;
//   in each block of a cluster at another time.
// - What ordinary instructions wrote to shared memory, products and stores of boxes see only after
//   a fence of the thread that wrote it.
// - A box is stored when its thread waits for that. To write to where it lies meanwhile is an error.
// - Barriers and memory of another block may be used only between two meetings of the cluster: once
//   the barriers there are ready, and before that block is over.
// - Shared memory starts as NaN.
//
// Not modelled: what a compiler moves (pin), the order of relaxed atomics, the fence between
// a barrier's start and copies, and how tensor cores cut off sums.
//
// Ends with RUNS(kernel), which a kernel's source is to be followed by.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

typedef unsigned long long uint64;
typedef unsigned int uint32;
typedef unsigned short uint16;

// Sizes in elements of two bytes, strides in bytes, the innermost dimension first.
struct alignas(64) Descriptor {
  const char* tensor;
  int64_t sizes[4], strides[3];
  int32_t box[4];
};

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // all fibers of a cluster are of one thread; what a kernel declares
                                 // is of a block, so that clusters of several must do without

struct Index {
  uint32 x, y, z;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

constexpr uint32 SHARED_BYTES = 227 << 10;
constexpr uint32 DYNAMIC = 1040;  // where it starts: behind what kernels declare
thread_local char shared[1];  // known by its address alone
constexpr int WINDOW_BITS = 24;  // of an address; those above are the rank of the block in a cluster

namespace machine {

// ---- Numbers ------------------------------------------------------------------------------------

inline uint32 bits(float x) {
  uint32 word;
  std::memcpy(&word, &x, 4);
  return word;
}
inline float from_bits(uint32 word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
const uint32 POISON = 0x7fe1dead;  // a NaN that nothing computes

inline float widened(uint16 half) {
#if BF16
  return from_bits(uint32(half) << 16);
#else
  _Float16 x;
  std::memcpy(&x, &half, 2);
  return float(x);
#endif
}
inline uint16 halved(float x) {
  if (std::isnan(x)) return 0x7fff;
#if BF16
  uint32 word = bits(x);
  return uint16((word + 0x7fff + (word >> 16 & 1)) >> 16);
#else
  _Float16 half = _Float16(x);
  uint16 word;
  std::memcpy(&word, &half, 2);
  return word;
#endif
}

// ---- The state of a cluster ---------------------------------------------------------------------

enum Waiting { NOTHING, WARP, WARPGROUP, BLOCK, CLUSTERS, BARRIER, END };
const char* const NAMES[] = {"nothing",     "its warp",  "its warpgroup", "its block",
                             "its cluster", "a barrier", "-"};

// A box on its way out of shared memory.
struct Store {
  const Descriptor* to;
  uint32 from;
  int at[4];
  std::vector<char> before;  // what lay there
  int group;
};

struct Fiber {
  ucontext_t context;
  Waiting waiting;
  uint32 barrier;
  int parity;
  std::vector<uint32> barriers;               // not ready for copies
  std::vector<std::pair<uint32, uint32>> wrote;  // addresses and bytes, that no fence followed
  std::vector<Store> stores;
  int stored;  // groups
};

struct Barrier {
  int parity, arrivals, left;
  int64_t bytes;
  bool ready, known;  // for copies; to the other blocks
};

struct Copy {
  int block;
  uint32 to, barrier;
  const Descriptor* from;
  int at[4];
};

// One of a warp's parts in a product of its warpgroup.
struct Issued {
  float* d[32];
  const uint32* a[32];   // or, if there are none:
  uint64 a_matrix;
  uint32 before[32][4];  // what was in `a`
  std::vector<uint16> rows, matrix;
  uint64 b;
  int block, warp, columns, group;  // warp: of its warpgroup
  bool adds, transposed;
};

// A result that is being computed.
struct Result {
  float* d[32];
  int parts, products;
  std::vector<float> values;  // lane by lane
};

struct Warp {
  int arrived, priority;
  const void* meeting;
  uint32 words[32], answers[32];
  void* places[32][3];
  int committed, awaited;
  size_t issued;
  bool follows;
  std::vector<Issued> flying;
  std::vector<Result> results;
};

struct Signature {
  uint64 a, b;
  int columns;
  bool adds, transposed;
};

struct Lot {
  uint64 state;

  uint32 operator()() {
    state = state * 6364136223846793005 + 1442695040888963407;
    return uint32(state >> 33);
  }
};

struct Failure {
  std::string words;
};

struct Block {
  Index index;
  std::map<uint32, Barrier> barriers;
  std::unique_ptr<char[]> memory, seen;  // as ordinary instructions see it; products and copies
  int at_block, ended;
};

struct Machine {
  ucontext_t scheduler;
  std::unique_ptr<char[]> stacks;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;  // of one block after another, as all that follows
  std::vector<Warp> warps;
  std::vector<std::vector<Signature>> products;  // of each warpgroup, by its first warp
  std::map<uint32, std::pair<char*, uint32>> declared;  // address -> where it is, size
  std::vector<Copy> copies;
  uint32 dynamic, room;  // bytes of shared memory asked for, where the next declared goes
  int current, threads, at_cluster, ended;
  Lot lot;
  std::string error;
  void (*body)(void*);
  void* about;
};
inline thread_local Machine* here;

constexpr size_t STACK = 64 << 10;

// Ends the block.
[[noreturn]] inline void fail(const char* format, ...) {
  char place[100], text[400];
  std::snprintf(place, sizeof place, "block (%u, %u), thread %d: ", blockIdx.x, blockIdx.y,
                here->current);
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(text, sizeof text, format, rest);
  va_end(rest);
  throw Failure{std::string(place) + text};
}

inline Fiber& fiber() { return here->fibers[here->current]; }
inline Warp& warp() { return here->warps[here->current / 32]; }
inline int lane() { return here->current % 32; }
inline int block() { return here->current / here->threads; }
// The first thread of this one's warpgroup.
inline int warpgroup() {
  return block() * here->threads + here->current % here->threads / 128 * 128;
}

inline void wait(Waiting what) {
  fiber().waiting = what;
  swapcontext(&fiber().context, &here->scheduler);
}

// Others may go on first, whom this thread has just made able to.
inline void give_way() {
  warp().priority = int(here->lot() % 1024);
  wait(NOTHING);
}

// All lanes come to the same place; the last does the work.
template <class Work> void meet(const void* place, Work work) {
  Warp& all = warp();
  if (all.arrived == 0) all.meeting = place;
  if (all.meeting != place) fail("a warp's threads are at different instructions");
  if (++all.arrived < 32) return wait(WARP);
  all.arrived = 0;
  int first = here->current / 32 * 32;
  work(all);
  for (int i = 0; i < 32; i++)
    if (here->fibers[first + i].waiting == WARP) here->fibers[first + i].waiting = NOTHING;
}

// ---- Shared memory ------------------------------------------------------------------------------

inline void inside(uint32 at, uint32 bytes) {
  if (at < DYNAMIC || at + bytes > DYNAMIC + here->dynamic || at % std::min(bytes, 16u))
    fail("%u bytes at %u, of shared memory from %u to %u", bytes, at, DYNAMIC,
         DYNAMIC + here->dynamic);
}
// Of an instruction's address of shared memory, which must be this block's.
inline uint32 own(uint32 address) {
  if (address >> WINDOW_BITS != uint32(block())) fail("%#x is of another block", address);
  return address & ((1 << WINDOW_BITS) - 1);
}
// As ordinary instructions see it.
inline char* ordinary(uint32 at, uint32 bytes, int of = block()) {
  inside(at, bytes);
  return &here->blocks[of].memory[at - DYNAMIC];
}
// As products and copies do.
inline char* asynchronous(uint32 at, uint32 bytes, int of = block()) {
  inside(at, bytes);
  return &here->blocks[of].seen[at - DYNAMIC];
}
// In rows of so many bytes: 128, 64 or 32.
inline uint32 swizzled(uint32 at, uint32 row = 128) {
  return at ^ (at >> 7 & (row / 16 - 1)) << 4;
}

inline Barrier& barrier(uint32 at, int of = block()) {
  Block& there = here->blocks[of];
  auto found = there.barriers.find(at);
  if (found == there.barriers.end()) fail("there is no barrier at %u", at);
  if (of != block()) {
    if (!found->second.known) fail("the barrier at %u of another block may not be there yet", at);
    if (there.ended == here->threads) fail("the block with the barrier at %u is over", at);
  }
  return found->second;
}
inline void settle(uint32 at, int of) {
  Barrier& b = here->blocks[of].barriers.at(at);
  if (b.left < 0) fail("more arrivals at the barrier at %u than it expects", at);
  if (b.left || b.bytes) return;
  int over = b.parity;
  b.parity ^= 1;
  b.left = b.arrivals;
  for (int i = of * here->threads; i < (of + 1) * here->threads; i++) {
    Fiber& f = here->fibers[i];
    if (f.waiting == BARRIER && f.barrier == at && f.parity == over) f.waiting = NOTHING;
  }
}

inline uint32 row_bytes(const Descriptor& of) { return 2 * of.box[0]; }
inline uint32 box_bytes(const Descriptor& of) {
  return row_bytes(of) * of.box[1] * of.box[2] * of.box[3];
}
inline void aligned(const Descriptor& of, uint32 at) {
  if (at % (8 * row_bytes(of))) fail("a swizzled box at %u", at);
}
// Of a box that lies at `place`: where each number lies in the tensor, if it is one of it, and in
// shared memory.
template <class Visit>
void each_number(const Descriptor& of, uint32 place, const int (&first)[4], Visit visit) {
  const int* box = of.box;
  for (int w = 0; w < box[3]; w++)
    for (int z = 0; z < box[2]; z++)
      for (int y = 0; y < box[1]; y++, place += row_bytes(of)) {
        const int at[4] = {first[0], first[1] + y, first[2] + z, first[3] + w};
        bool there = true;
        const char* line = of.tensor;
        for (int i = 1; i < 4; i++) {
          there = there && at[i] >= 0 && at[i] < of.sizes[i];
          line += at[i] * of.strides[i - 1];
        }
        for (int x = 0; x < box[0]; x++) {
          int column = at[0] + x;
          bool inside = there && column >= 0 && column < of.sizes[0];
          visit(inside ? line + 2 * column : nullptr, swizzled(place + 2 * x, row_bytes(of)));
        }
      }
}
inline void spoil(const Copy& copy) {
  uint32 bytes = box_bytes(*copy.from);
  for (uint32 at = copy.to; at < copy.to + bytes; at += 16) {
    std::memset(ordinary(at, 16, copy.block), 0xff, 16);
    std::memset(asynchronous(at, 16, copy.block), 0xff, 16);
  }
}
inline void arrive(const Copy& copy) {
  each_number(*copy.from, copy.to, copy.at, [&](const char* from, uint32 to) {
    uint16 half = 0;
    if (from) std::memcpy(&half, from, 2);
    std::memcpy(ordinary(to, 2, copy.block), &half, 2);
    std::memcpy(asynchronous(to, 2, copy.block), &half, 2);
  });
  here->blocks[copy.block].barriers.at(copy.barrier).bytes -= box_bytes(*copy.from);
  settle(copy.barrier, copy.block);
}
inline void copy(int to_block, uint32 to, const Descriptor* from, uint32 at, int x, int y, int z,
                 int w) {
  if (!barrier(at, to_block).ready) fail("a copy for a barrier that is not ready");
  aligned(*from, to);
  Copy made = {to_block, to, at, from, {x, y, z, w}};
  spoil(made);
  here->copies.push_back(made);
}
inline std::vector<char> box_at(const Descriptor& of, uint32 at) {
  std::vector<char> found(box_bytes(of));
  for (uint32 i = 0; i < found.size(); i += 16)
    std::memcpy(&found[i], asynchronous(at + i, 16), 16);
  return found;
}
// Of this thread.
inline void leave(const Store& store) {
  if (box_at(*store.to, store.from) != store.before)
    fail("a box changed before it was stored");
  each_number(*store.to, store.from, store.at, [&](const char* to, uint32 from) {
    if (to) std::memcpy(const_cast<char*>(to), asynchronous(from, 2), 2);
  });
}
// What this thread writes, in its place of memory.
inline void write(uint32 at, const void* from, uint32 bytes) {
  std::memcpy(ordinary(at, bytes), from, bytes);
  fiber().wrote.push_back({at, bytes});
}
// A copy that someone waits for, or none.
inline std::vector<Copy>::iterator wanted() {
  std::vector<size_t> found;
  for (size_t i = 0; i < here->copies.size(); i++)
    for (int j = 0; j < here->threads; j++) {
      const Fiber& f = here->fibers[here->copies[i].block * here->threads + j];
      if (f.waiting == BARRIER && f.barrier == here->copies[i].barrier) {
        found.push_back(i);
        break;
      }
    }
  if (found.empty()) return here->copies.end();
  return here->copies.begin() + found[here->lot() % found.size()];
}

// ---- Products -----------------------------------------------------------------------------------

// Where a matrix's number lies, which has `lines` and, in each, sixteen numbers that products sum
// over; transposed: those are in the same columns of sixteen rows.
inline uint32 place_of(uint64 matrix, bool transposed, int line, int k) {
  uint32 start = (matrix & 0x3fff) << 4;
  uint32 next_columns = (matrix >> 16 & 0x3fff) << 4;
  uint32 eight_rows = (matrix >> 32 & 0x3fff) << 4;
  if (matrix >> 62 != 1 || (matrix >> 49 & 7) != 0)
    fail("only matrices that are swizzled by 128 bytes are known here");
  uint32 across = transposed ? line / 64 * next_columns + line % 64 * 2 : k * 2;
  int row = transposed ? k : line;
  return swizzled(start + across + row / 8 * eight_rows + row % 8 * 128);
}
// Sixteen by COLUMNS numbers.
inline std::vector<uint16> read_matrix(const Issued& product) {
  std::vector<uint16> found(16 * product.columns);
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < product.columns; n++)
      std::memcpy(&found[k * product.columns + n],
                  asynchronous(place_of(product.b, product.transposed, n, k), 2), 2);
  return found;
}
// This warp's sixteen rows of sixteen.
inline std::vector<uint16> read_rows(const Issued& product) {
  std::vector<uint16> found(16 * 16);
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      std::memcpy(&found[16 * m + k],
                  asynchronous(place_of(product.a_matrix, false, 16 * product.warp + m, k), 2), 2);
  return found;
}

// Row and column of a fragment's number (of d), as every lane holds them: 16 rows of a warp.
inline int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
inline int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// The rows that a warp has of `a`.
inline void read_rows(const uint32* const (&a)[32], float (&rows)[16][16]) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 8; i++)
      rows[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
          widened(uint16(a[lane][i / 2] >> i % 2 * 16));
}
// sums[row][column] of 16 products each, in double precision.
inline std::vector<double> sums_of(const float (&rows)[16][16], const std::vector<uint16>& matrix,
                                   int columns) {
  std::vector<double> sums(16 * columns);
  std::vector<float> line(columns);
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < columns; n++) line[n] = widened(matrix[k * columns + n]);
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < columns; n++) sums[m * columns + n] += double(rows[m][k]) * line[n];
  }
  return sums;
}

inline Result& result_at(Warp& all, const float* d) {
  for (Result& result : all.results)
    if (result.d[0] == d) return result;
  fail("a product without a result");
}

// place: what is the same for equal instructions alone. a: registers, or none.
inline void issue(const void* place, float* d, int parts, const uint32* a, uint64 a_matrix,
                  uint64 b, bool adds, bool transposed) {
  warp().places[lane()][0] = d;
  warp().places[lane()][1] = const_cast<uint32*>(a);
  warp().words[lane()] = uint32(b) ^ uint32(a_matrix) << 16;
  meet(place, [&](Warp& all) {
    auto& log = here->products[warpgroup() / 32];
    Signature mine = {a_matrix, b, 2 * parts, adds, transposed};
    if (all.issued == log.size()) log.push_back(mine);
    const Signature& same = log[all.issued++];
    if (same.a != a_matrix || same.b != b || same.columns != 2 * parts || same.adds != adds ||
        same.transposed != transposed)
      fail("warps of a warpgroup issue different products");
    if (!all.follows) fail("products whose registers no fence has made ready");
    Issued product = {};
    product.a_matrix = a_matrix;
    product.b = b;
    product.warp = (here->current - warpgroup()) / 32;
    product.columns = 2 * parts;
    product.group = all.committed;
    product.adds = adds;
    product.transposed = transposed;
    bool runs = false;
    for (Result& result : all.results)
      if (result.d[0] == all.places[0][0]) {
        runs = true;
        result.products++;
      }
    Result result = {};
    result.parts = parts;
    result.products = 1;
    for (int i = 0; i < 32; i++) {
      if (all.words[i] != all.words[0]) fail("a matrix is not the same for a whole warp");
      product.d[i] = result.d[i] = static_cast<float*>(all.places[i][0]);
      product.a[i] = static_cast<const uint32*>(all.places[i][1]);
      if (a) std::memcpy(product.before[i], product.a[i], 16);
      if (!runs) {
        result.values.insert(result.values.end(), result.d[i], result.d[i] + parts);
        std::fill(result.d[i], result.d[i] + parts, from_bits(POISON));
      }
    }
    if (!runs) all.results.push_back(result);
    product.matrix = read_matrix(product);
    if (!a) product.rows = read_rows(product);
    all.flying.push_back(product);
  });
}

inline void compute(Warp& all, const Issued& product) {
  float rows[16][16];
  if (product.a[0]) {
    for (int i = 0; i < 32; i++)
      if (std::memcmp(product.before[i], product.a[i], 16))
        fail("a product's operand was written before it was done");
    read_rows(product.a, rows);
  } else {
    if (read_rows(product) != product.rows) fail("a product's rows changed before it was done");
    for (int i = 0; i < 256; i++) rows[i / 16][i % 16] = widened(product.rows[i]);
  }
  if (read_matrix(product) != product.matrix)
    fail("a product's matrix changed before it was done");
  std::vector<double> sums = sums_of(rows, product.matrix, product.columns);
  Result& result = result_at(all, product.d[0]);
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < result.parts; i++) {
      float& value = result.values[lane * result.parts + i];
      double sum = sums[row_of(lane, i) * product.columns + column_of(lane, i)];
      value = float(product.adds ? value + sum : sum);
    }
  if (--result.products) return;
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < result.parts; i++) {
      if (bits(result.d[lane][i]) != POISON)
        fail("a product's result was written before it was done");
      result.d[lane][i] = result.values[lane * result.parts + i];
    }
  all.results.erase(all.results.begin() + (&result - all.results.data()));
}

template <int COLUMNS, bool ADDS, bool TRANSPOSED> char kind_of_product;
template <int COLUMNS> char kind_of_matrix_product;
inline char kind_of_meeting[16];

}  // namespace machine

// ---- CUDA ---------------------------------------------------------------------------------------

inline float __int_as_float(int word) { return machine::from_bits(uint32(word)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline float __shfl_xor_sync(uint32, float x, int mask) {
  using namespace machine;
  warp().words[lane()] = bits(x);
  meet(&kind_of_meeting[0], [&](Warp& all) {
    for (int i = 0; i < 32; i++) all.answers[i] = all.words[i ^ mask];
  });
  return from_bits(warp().answers[lane()]);
}
inline bool __any_sync(uint32, bool x) {
  using namespace machine;
  warp().words[lane()] = x;
  meet(&kind_of_meeting[1], [&](Warp& all) {
    bool any = std::any_of(all.words, all.words + 32, [](uint32 word) { return word != 0; });
    std::fill(all.answers, all.answers + 32, any);
  });
  return warp().answers[lane()];
}
inline void __syncwarp() {
  machine::meet(&machine::kind_of_meeting[6], [](machine::Warp&) {});
}
inline void __syncthreads() {
  using namespace machine;
  Block& all = here->blocks[block()];
  if (++all.at_block < here->threads) return wait(BLOCK);
  all.at_block = 0;
  for (int i = block() * here->threads; i < (block() + 1) * here->threads; i++)
    if (here->fibers[i].waiting == BLOCK) here->fibers[i].waiting = NOTHING;
}
inline uint64 __cvta_generic_to_shared(const char*) {
  return DYNAMIC | machine::block() << WINDOW_BITS;
}
// What a kernel declares is spoiled too, before anyone in the block can use it.
template <class T, size_t N> uint64 __cvta_generic_to_shared(T (&array)[N]) {
  using namespace machine;
  char* where = reinterpret_cast<char*>(array);
  if (where == shared) return DYNAMIC | block() << WINDOW_BITS;
  if (here->blocks.size() > 1) fail("a kernel for clusters declares shared memory");
  for (auto& known : here->declared)
    if (known.second.first == where) return known.first;
  uint32 at = here->room;
  here->room += (sizeof array + 15) / 16 * 16;
  if (here->room > DYNAMIC) fail("a kernel declares more shared memory than is known here");
  here->declared[at] = {where, uint32(sizeof array)};
  std::memset(where, 0xff, sizeof array);
  return at;
}

// ---- Hopper -------------------------------------------------------------------------------------

template <int COLUMNS, bool ADDS, bool TRANSPOSED> struct Product {
  static_assert(COLUMNS % 8 == 0 && COLUMNS <= 256);
  static void issue(float (&d)[COLUMNS / 2], const uint32 (&a)[4], uint64 b) {
    machine::issue(&machine::kind_of_product<COLUMNS, ADDS, TRANSPOSED>, d, COLUMNS / 2, a, 0, b,
                   ADDS, TRANSPOSED);
  }
};

template <int COLUMNS> struct MatrixProduct {
  static_assert(COLUMNS % 8 == 0 && COLUMNS <= 256);
  static void issue(float (&d)[COLUMNS / 2], uint64 a, uint64 b, bool adds) {
    machine::issue(&machine::kind_of_matrix_product<COLUMNS>, d, COLUMNS / 2, nullptr, a, b, adds,
                   false);
  }
};

inline void products_follow() {
  machine::meet(&machine::kind_of_meeting[2], [](machine::Warp& all) { all.follows = true; });
}
inline void products_issued() {
  using namespace machine;
  meet(&kind_of_meeting[3], [](Warp& all) {
    all.committed++;
    all.follows = false;
    for (int i = warpgroup(); i < warpgroup() + 128; i++)
      if (here->fibers[i].waiting == WARPGROUP) here->fibers[i].waiting = NOTHING;
  });
}
template <int LEFT> void products_done() {
  using namespace machine;
  meet(&kind_of_meeting[4], [](Warp& all) { all.awaited = all.committed - LEFT; });
  int first = warpgroup() / 32;
  Warp& all = warp();
  for (int i = first; i < first + 4; i++)  // the others have their part in a product too
    while (here->warps[i].committed < all.awaited) wait(WARPGROUP);
  size_t count = 0;
  while (count < all.flying.size() && all.flying[count].group < all.awaited)
    compute(all, all.flying[count++]);
  all.flying.erase(all.flying.begin(), all.flying.begin() + count);
}
template <int N> void pin(float (&)[N]) {}

template <int NEXT_COLUMNS> uint64 matrix(uint32 at, int beyond) {
  at = machine::own(at);
  if ((at + beyond) % 1024) machine::fail("a matrix starts at %u", at + beyond);
  return (uint64(1) << 62 | uint64(1024 >> 4) << 32 | uint64(NEXT_COLUMNS >> 4 & 0x3fff) << 16) +
         ((at + beyond) >> 4);
}

inline void warp_product(float* d, const uint32 (&a)[4], const uint32 (&b)[2]) {
  using namespace machine;
  warp().places[lane()][0] = d;
  warp().places[lane()][1] = const_cast<uint32*>(a);
  warp().places[lane()][2] = const_cast<uint32*>(b);
  meet(&kind_of_meeting[5], [](Warp& all) {
    const uint32* a[32];
    std::vector<uint16> matrix(16 * 8);
    for (int i = 0; i < 32; i++) {
      a[i] = static_cast<const uint32*>(all.places[i][1]);
      const uint32* b = static_cast<const uint32*>(all.places[i][2]);
      for (int k = 0; k < 4; k++)
        matrix[(i % 4 * 2 + k % 2 + k / 2 * 8) * 8 + i / 4] = uint16(b[k / 2] >> k % 2 * 16);
    }
    float rows[16][16];
    read_rows(a, rows);
    std::vector<double> sums = sums_of(rows, matrix, 8);
    for (int i = 0; i < 32; i++)
      for (int k = 0; k < 4; k++) {
        float& value = static_cast<float*>(all.places[i][0])[k];
        value = float(value + sums[row_of(i, k) * 8 + column_of(i, k)]);
      }
  });
}

inline void barrier_init(uint32 at, int arrivals) {
  using namespace machine;
  at = own(at);
  here->blocks[block()].barriers[at] = {0, arrivals, arrivals, 0, false, false};
  fiber().barriers.push_back(at);
}
inline void barriers_ready() {
  for (uint32 at : machine::fiber().barriers) machine::barrier(at).ready = true;
}
inline void barrier_expect(uint32 at, int bytes) {
  using namespace machine;
  at = own(at);
  barrier(at).bytes += bytes;
  barrier(at).left--;
  settle(at, block());
}
inline void barrier_arrive(uint32 at, uint32 rank) {
  using namespace machine;
  if (rank >= here->blocks.size()) fail("there is no block of rank %u", rank);
  at = own(at);
  barrier(at, rank).left--;
  settle(at, rank);
  give_way();
}
inline void barrier_wait(uint32 at, int parity) {
  using namespace machine;
  if (parity != 0 && parity != 1) fail("a parity of %d", parity);
  at = own(at);
  fiber().barrier = at;
  fiber().parity = parity;
  if (barrier(at).parity == parity) wait(BARRIER);
}
inline void fetch_ahead(const Descriptor*) {}
inline void copy_box(uint32 to, const Descriptor* from, uint32 barrier, int x, int y, int z,
                     int w) {
  using namespace machine;
  copy(block(), own(to), from, own(barrier), x, y, z, w);
}
inline void copy_box_to(uint32 blocks, uint32 to, const Descriptor* from, uint32 barrier, int x,
                        int y, int z, int w) {
  using namespace machine;
  if (blocks == 0 || blocks >> here->blocks.size()) fail("a copy to blocks that are not there");
  for (size_t rank = 0; rank < here->blocks.size(); rank++)
    if (blocks >> rank & 1) copy(int(rank), own(to), from, own(barrier), x, y, z, w);
}
inline void stores_follow() {
  using namespace machine;
  for (auto [at, bytes] : fiber().wrote)
    std::memcpy(asynchronous(at, bytes), ordinary(at, bytes), bytes);
  fiber().wrote.clear();
}
inline void store_box(const Descriptor* to, uint32 from, int x, int y, int z, int w) {
  using namespace machine;
  from = own(from);
  aligned(*to, from);
  fiber().stores.push_back({to, from, {x, y, z, w}, box_at(*to, from), fiber().stored});
}
inline void stores_issued() { machine::fiber().stored++; }
template <int LEFT> void stores_read() {
  using namespace machine;
  auto& all = fiber().stores;
  while (!all.empty() && all[0].group < fiber().stored - LEFT) {
    leave(all[0]);
    all.erase(all.begin());
  }
}
// Each lane's part of four matrices, and where it lies.
template <class Visit> void each_part(machine::Warp& all, Visit visit) {
  for (int i = 0; i < 32; i++)
    for (int matrix = 0; matrix < 4; matrix++) {
      uint32 row = all.words[8 * matrix + i / 4];
      if (row % 16) machine::fail("a matrix's row at %u", row);
      visit(i, matrix, row + i % 4 * 4);
    }
}
inline void store_matrices(uint32 to, const uint32 (&words)[4]) {
  using namespace machine;
  warp().words[lane()] = own(to);
  warp().places[lane()][0] = const_cast<uint32*>(words);
  meet(&kind_of_meeting[7], [](Warp& all) {
    int first = here->current / 32 * 32;
    each_part(all, [&](int i, int matrix, uint32 at) {
      std::memcpy(ordinary(at, 4), &static_cast<uint32*>(all.places[i][0])[matrix], 4);
      here->fibers[first + i].wrote.push_back({at, 4});
    });
  });
}
inline void load_matrices(uint32 from, uint32 (&words)[4]) {
  using namespace machine;
  warp().words[lane()] = own(from);
  warp().places[lane()][0] = words;
  meet(&kind_of_meeting[8], [](Warp& all) {
    each_part(all, [&](int i, int matrix, uint32 at) {
      std::memcpy(&static_cast<uint32*>(all.places[i][0])[matrix], ordinary(at, 4), 4);
    });
  });
}
inline uint32 load_shared(uint32 from) {
  uint32 word;
  std::memcpy(&word, machine::ordinary(machine::own(from), 4), 4);
  return word;
}
inline uint32 count_up(uint32 counter, uint32 last) {
  using namespace machine;
  for (auto& known : here->declared)
    if (counter >= known.first && counter + 4 <= known.first + known.second.second) {
      uint32* count = reinterpret_cast<uint32*>(known.second.first + (counter - known.first));
      uint32 before = *count;
      *count = before >= last ? 0 : before + 1;
      return before;
    }
  fail("nothing is declared at %u", counter);
}

inline uint32 cluster_rank() { return machine::block(); }
inline void cluster_meet() {
  using namespace machine;
  if (++here->at_cluster < int(here->fibers.size())) return wait(CLUSTERS);
  here->at_cluster = 0;
  for (Fiber& f : here->fibers)
    if (f.waiting == CLUSTERS) f.waiting = NOTHING;
  for (Block& block : here->blocks)
    for (auto& known : block.barriers) known.second.known = known.second.ready;
}
template <int COUNT> void fewer_registers() {}
template <int COUNT> void more_registers() {}
inline void launches_overlap() {}

inline float power(float x) {
  auto flushed = [](float y) { return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y; };
  return flushed(std::exp2(flushed(x)));
}
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline uint32 rounded(float low, float high) {
  return machine::halved(low) | uint32(machine::halved(high)) << 16;
}
inline void widened(uint32 pair, float& low, float& high) {
  low = machine::widened(uint16(pair));
  high = machine::widened(uint16(pair >> 16));
}

// ---- Running ------------------------------------------------------------------------------------

namespace machine {

inline void enter() {
  try {
    here->body(here->about);
  } catch (const Failure& failure) {
    here->error = failure.words;
  }
  here->blocks[block()].ended++;
  here->ended++;
  fiber().waiting = END;
  setcontext(&here->scheduler);
}

inline bool runnable(int warp) {
  for (int i = 0; i < 32; i++)
    if (here->fibers[32 * warp + i].waiting == NOTHING) return true;
  return false;
}

// The first threads of warps.
inline std::string who_waits() {
  std::string all;
  for (size_t i = 0; i < here->fibers.size(); i += 32) {
    const Fiber& f = here->fibers[i];
    all += (i ? ", " : "") + std::to_string(i) + " for " + NAMES[f.waiting];
    if (f.waiting == BARRIER)
      all += " at " + std::to_string(f.barrier) + " of parity " + std::to_string(f.parity);
  }
  return all;
}

// What must not be under way when a block is over.
inline void over(int block) {
  Machine& m = *here;
  for (const Copy& copy : m.copies)
    if (copy.block == block) fail("a copy is on its way to a block that is over");
  for (int i = block * m.threads; i < (block + 1) * m.threads; i++) {
    if (!m.fibers[i].stores.empty()) fail("a store is under way in a block that is over");
    if (!m.warps[i / 32].flying.empty()) fail("a product is under way in a block that is over");
  }
}

// One whole cluster, of which `first` is the first block.
inline void run_cluster(Index first, int count, int threads, uint32 dynamic, void (*body)(void*),
                        void* about) {
  Machine& m = *here;
  int all = count * threads;
  m.threads = threads;
  m.dynamic = dynamic;
  m.body = body;
  m.about = about;
  m.room = 0;
  m.at_cluster = m.ended = 0;
  m.lot.state = first.x * 7919 + first.y;
  m.error.clear();
  m.declared.clear();
  m.copies.clear();
  m.fibers.assign(all, Fiber{});
  m.warps.assign(all / 32, Warp{});
  m.products.assign(all / 32, {});
  m.stacks.reset(new char[all * STACK]);
  m.blocks.clear();
  m.blocks.resize(count);
  for (int i = 0; i < count; i++) {
    Block& block = m.blocks[i];
    block.index = {first.x + i, first.y, 0};
    for (auto* memory : {&block.memory, &block.seen}) {
      memory->reset(new char[SHARED_BYTES]);
      std::memset(memory->get(), 0xff, SHARED_BYTES);
    }
  }
  for (int i = 0; i < all; i++) {
    ucontext_t& context = m.fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = &m.stacks[i * STACK];
    context.uc_stack.ss_size = STACK;
    makecontext(&context, enter, 0);
  }
  while (m.ended < all) {
    int chosen = -1;
    for (size_t i = 0; i < m.warps.size(); i++)
      if (runnable(int(i)) && (chosen < 0 || m.warps[i].priority > m.warps[chosen].priority))
        chosen = int(i);
    if (chosen < 0 || m.lot() % 8 == 0) {
      auto copy = wanted();
      if (copy != m.copies.end()) {
        Copy found = *copy;
        m.copies.erase(copy);
        arrive(found);
        continue;
      }
      if (chosen < 0) fail("all wait: %s", who_waits().c_str());
    }
    if (m.lot() % 8 == 0) m.warps[chosen].priority = int(m.lot() % 1024);
    for (int i = 32 * chosen; i < 32 * chosen + 32; i++) {
      if (m.fibers[i].waiting != NOTHING) continue;
      m.current = i;
      threadIdx = {uint32(i % threads), 0, 0};
      blockIdx = m.blocks[i / threads].index;
      swapcontext(&m.scheduler, &m.fibers[i].context);
      if (!m.error.empty()) throw Failure{m.error};
      if (m.blocks[i / threads].ended == threads) over(i / threads);
    }
  }
}

template <class... T, size_t... I>
void call(void (*kernel)(T...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<T>*>(arguments[I])...);
}
template <class... T> void call(void (*kernel)(T...), void** arguments) {
  call(kernel, arguments, std::make_index_sequence<sizeof...(T)>());
}

// All clusters, a few at a time. Writes what went wrong to `words`; returns whether something did.
inline bool run_grid(Index grid, int cluster, int threads, uint32 dynamic, void (*body)(void*), void* arguments,
                     char* words, size_t room) {
  std::atomic<uint32> next{0};
  std::string error;
  std::mutex lock;
  auto work = [&] {
    std::unique_ptr<Machine> mine(new Machine);
    here = mine.get();
    gridDim = grid;
    for (uint32 i; (i = cluster * next++) < grid.x * grid.y;) {
      Index first = {i % grid.x, i / grid.x, 0};
      try {
        run_cluster(first, cluster, threads, dynamic, body, arguments);
      } catch (const Failure& failure) {
        next = grid.x * grid.y;
        std::lock_guard<std::mutex> guard(lock);
        error = failure.words;
      }
    }
  };
  std::vector<std::thread> workers;
  uint32 count = std::max(1u, std::min(std::thread::hardware_concurrency(), grid.x * grid.y));
  for (uint32 i = 0; i < count; i++) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
  std::snprintf(words, room, "%s", error.c_str());
  return !error.empty();
}

}  // namespace machine

// For Python. arguments: where each of the kernel's is.
#define RUNS(kernel)                                                                               \
  extern "C" int run(uint32 x, uint32 y, int cluster, int threads, uint32 dynamic,                 \
                     void** arguments, char* words, size_t room) {                                 \
    auto body = [](void* about) { machine::call(kernel, static_cast<void**>(about)); };            \
    return machine::run_grid({x, y, 1}, cluster, threads, dynamic, body, arguments, words, room);  \
  }
