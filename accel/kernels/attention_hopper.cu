// Attention on Hopper: every query attends to every key, and a head is as wide as it is.
//
// A block of GROUPS warpgroups takes 64 * GROUPS queries of one head of one image. Keys and values
// come in blocks of KEYS through the copy engine; the last warp to be done with one sends for the
// next but a few (a warp for that alone would cost all others a fifth of their registers). Each
// warpgroup keeps its queries, weights and result in registers, and does for a block:
//
//     scores  = queries . keys         issued together: the tensor cores have work
//     result += weights . values       (of the block before) during what follows
//     weights = 2 ^ (scores * scale - peak)
//
// - Products and exponentials (16 a clock) of one warpgroup wait for each other. Several on a
//   multiprocessor keep both busy: what counts is how few registers and instructions each needs.
// - A peak only scales a row's weights and result alike, so it need not be the highest logit: that
//   of the first block stays until a weight leaves the range of half precision. So no maximum is
//   looked for: the sums, which must be made anyway, tell. Where the range is left (hardly ever),
//   the warp makes that block's scores again, by itself, and goes on from a new peak.
// - The sums in fp16 are of weights before they are rounded. Where few keys have nearly all of the
//   weight, their rounding does not cancel: the error is up to half above that of a kernel that
//   knows the maximum. Summing what was rounded, by products with ones, took 4 to 9 % of the time on
//   an H200. In bfloat16, whose rounding is 8 times coarser, what was rounded is summed.
// - A head of 40 columns is 48 wide in the first product, 40 in the second.
//
// Compiled with HEAD (a multiple of 8), KEYS, GROUPS, STAGES, BLOCKS (a multiprocessor), BF16.

#include "hopper.cuh"

constexpr int STEP = 16;                   // columns of a first product's step, keys of a second's
constexpr int STEPS = (HEAD + STEP - 1) / STEP;
constexpr int CHUNK = 64;                  // columns in a row of 128 bytes, which are swizzled
constexpr int CHUNKS = (HEAD + CHUNK - 1) / CHUNK;
constexpr int CHUNK_BYTES = KEYS * CHUNK * 2;
constexpr int TILE_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int WARPS = 4 * GROUPS;
constexpr float HEADROOM = 2.0f;           // powers of two by which the first weights exceed 1
// A thread's sum of a block's weights: 2 ^ 14 is nearly all that fp16 holds; bfloat16 holds more, but
// all keys' sums with values must stay in fp32's range.
constexpr float LIMIT = BF16 ? 18446744073709551616.0f : 16384.0f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// A tile: all columns of a head, zero beyond them, and beyond the last key.
__device__ __forceinline__ void load_tile(uint32 to, const Descriptor* from, uint32 barrier,
                                          int first, int head, int image) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
    copy_box(to + chunk * CHUNK_BYTES, from, barrier, chunk * CHUNK, head, first, image);
}

// Of the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- A warpgroup's part -------------------------------------------------------------------------

// A thread's share of 64 rows: two of them, `lane / 4` and that plus 8 of its warp's 16; of each
// eight columns two.
struct Rows {
  uint32 query[STEPS][4];
  float scores[KEYS / 2];
  uint32 weights[KEYS / STEP][4];
  float result[HEAD / 2];
  float peak[2], total[2], sum[2];

  __device__ __forceinline__ void load(const uint16* query_, int first, int queries, long long row,
                                       int lane) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int part = 0; part < 4; part++) {
        int at = first + lane / 4 + part % 2 * 8;
        int column = step * STEP + lane % 4 * 2 + part / 2 * 8;
        query[step][part] = 0;
        if (at < queries && column < HEAD)
          query[step][part] = *reinterpret_cast<const uint32*>(query_ + at * row + column);
      }
  }

  __device__ __forceinline__ void score(uint64 keys) {
    pin(scores);
    products_follow();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint64 part = keys + ((step / 4 * CHUNK_BYTES + step % 4 * 32) >> 4);
      if (step == 0)
        Product<KEYS, false, false>::issue(scores, query[step], part);
      else
        Product<KEYS, true, false>::issue(scores, query[step], part);
    }
    products_issued();
  }

  // The same for this warp alone. Where the others are does not matter.
  __device__ __forceinline__ void score_alone(uint32 tile, int lane) {
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
      uint32 key = i * 8 + lane / 4;
#pragma unroll
      for (int c = 0; c < 4; c++) scores[4 * i + c] = 0.0f;
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        uint32 b[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32 byte = (step % 4 * STEP + half * 8 + lane % 4 * 2) * 2;
          uint32 at = tile + step / 4 * CHUNK_BYTES + key * 128 + (byte ^ (key % 8 * 16));
          b[half] = load_shared(at);
        }
        warp_product(&scores[4 * i], query[step], b);
      }
    }
  }

  __device__ __forceinline__ void gather(uint64 values) {
    pin(result);
    products_follow();
#pragma unroll
    for (int step = 0; step < KEYS / STEP; step++)
      Product<HEAD, true, true>::issue(result, weights[step],
                                       values + (step * STEP * CHUNK * 2 >> 4));
    products_issued();
  }

  __device__ __forceinline__ void mask(int alive, int lane) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= alive) scores[i] = MINUS_INFINITY;
  }

  __device__ __forceinline__ void highest(float scale, float (&logits)[2]) {
    logits[0] = logits[1] = MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) logits[i / 2 % 2] = fmaxf(logits[i / 2 % 2], scores[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) logits[r] = row_max(logits[r]) * scale - HEADROOM;
  }

  __device__ __forceinline__ void start(float scale) {
    highest(scale, peak);
    total[0] = total[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < HEAD / 2; i++) result[i] = 0.0f;
  }

  // Weights in place of scores. Whether one of this warp's is too large for half precision.
  __device__ __forceinline__ bool weigh(float scale) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
      scores[i] = power(__fmaf_rn(scores[i], scale, -peak[i / 2 % 2]));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float odd = scores[2 * r + 1];
      sum[r] = scores[2 * r];
#pragma unroll
      for (int i = 1; i < KEYS / 8; i++) {
        sum[r] += scores[4 * i + 2 * r];
        odd += scores[4 * i + 2 * r + 1];
      }
      sum[r] += odd;
    }
    return __any_sync(~0u, fmaxf(sum[0], sum[1]) > LIMIT);
  }

  // What was weighed by the peak so far goes over to that of new scores too.
  __device__ __forceinline__ void fade(float scale) {
    float logits[2];
    highest(scale, logits);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      logits[r] = fmaxf(logits[r], peak[r]);
      float fading = power(peak[r] - logits[r]);
      peak[r] = logits[r];
      total[r] *= fading;
#pragma unroll
      for (int i = 0; i < HEAD / 8; i++) {
        result[4 * i + 2 * r] *= fading;
        result[4 * i + 2 * r + 1] *= fading;
      }
    }
  }

  __device__ __forceinline__ void round() {
    if (BF16) sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int step = 0; step < KEYS / STEP; step++)
#pragma unroll
      for (int part = 0; part < 4; part++) {
        uint32 pair = rounded(scores[8 * step + 2 * part], scores[8 * step + 2 * part + 1]);
        weights[step][part] = pair;
        // The halves of a pair of bfloat16 are the upper halves of floats.
        if (BF16) sum[part % 2] += __int_as_float(pair << 16) + __int_as_float(pair & 0xffff0000);
      }
    total[0] += sum[0];
    total[1] += sum[1];
  }

  __device__ __forceinline__ void store(uint16* out, int first, int queries, long long row,
                                        int lane) {
    float share[2] = {1.0f / row_sum(total[0]), 1.0f / row_sum(total[1])};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int at = first + lane / 4 + 8 * r;
      if (at < queries) {
        uint32* to = reinterpret_cast<uint32*>(out + at * row + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < HEAD / 8; i++) {
          const float* pair = &result[4 * i + 2 * r];
          to[4 * i] = rounded(pair[0] * share[r], pair[1] * share[r]);
        }
      }
    }
  }
};

// The block of keys and values that was read last by all warps makes place for a further one.
struct Blocks {
  const Descriptor *keys, *values;
  uint32 tiles, there, left;  // in shared memory: the tiles, their barriers, who has left
  int head, image, count;

  __device__ __forceinline__ uint32 key_tile(int stage) { return tiles + stage * TILE_BYTES; }
  __device__ __forceinline__ uint32 value_tile(int stage) {
    return tiles + (STAGES + stage) * TILE_BYTES;
  }
  __device__ __forceinline__ void wait_keys(int stage, int turn) {
    barrier_wait(there + 8 * stage, turn);
  }
  __device__ __forceinline__ void wait_values(int stage, int turn) {
    barrier_wait(there + 8 * (STAGES + stage), turn);
  }
  __device__ __forceinline__ void send_for(int block, int stage) {
    barrier_expect(there + 8 * stage, TILE_BYTES);
    load_tile(key_tile(stage), keys, there + 8 * stage, block * KEYS, head, image);
    barrier_expect(there + 8 * (STAGES + stage), TILE_BYTES);
    load_tile(value_tile(stage), values, there + 8 * (STAGES + stage), block * KEYS, head, image);
  }
  // Of a whole warp, whose products from the block are done.
  __device__ __forceinline__ void leave(int block, int stage, int lane) {
    if (lane == 0 && block + STAGES < count) {
      uint32 others = count_up(left + 4 * stage, WARPS - 1);
      if (others == WARPS - 1) send_for(block + STAGES, stage);
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    attention_hopper(const __grid_constant__ Descriptor key_blocks,
                     const __grid_constant__ Descriptor value_blocks, const uint16* query,
                     uint16* out, long long query_image, long long query_row, int queries, int keys,
                     int heads, float scale) {
  extern __shared__ char shared[];
  __shared__ uint64 there[2 * STAGES];
  __shared__ uint32 left[STAGES];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int image = blockIdx.y / heads, head = blockIdx.y % heads;
  Blocks blocks = {&key_blocks,
                   &value_blocks,
                   (uint32(__cvta_generic_to_shared(shared)) + 1023) & ~1023u,
                   uint32(__cvta_generic_to_shared(there)),
                   uint32(__cvta_generic_to_shared(left)),
                   head,
                   image,
                   (keys + KEYS - 1) / KEYS};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * STAGES; i++) barrier_init(blocks.there + 8 * i, 1);
    for (int i = 0; i < STAGES; i++) left[i] = 0;
    barriers_ready();
    for (int i = 0; i < STAGES && i < blocks.count; i++) blocks.send_for(i, i);
  }
  __syncthreads();

  int first = blockIdx.x * 64 * GROUPS + warp * 16;
  int width = heads * HEAD;
  Rows rows;
  rows.load(query + image * query_image + head * HEAD, first, queries, query_row, lane);
  uint64 key_tiles = matrix<CHUNK_BYTES>(blocks.tiles, 0);
  uint64 value_tiles = matrix<CHUNK_BYTES>(blocks.tiles, STAGES * TILE_BYTES);
  blocks.wait_keys(0, 0);
  rows.score(key_tiles);
  products_done<0>();
  pin(rows.scores);
  if (keys < KEYS) rows.mask(keys, lane);
  rows.start(scale);
  rows.weigh(scale);
  rows.round();

  int turn = 0;
  for (int start = 1; start < blocks.count; start += STAGES) {
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) {  // of the block before
      int block = start + stage;
      if (block < blocks.count) {
        int next = (stage + 1) % STAGES;
        bool ragged = (block + 1) * KEYS > keys;
        blocks.wait_keys(next, turn ^ (next == 0));
        rows.score(key_tiles + (next * TILE_BYTES >> 4));
        blocks.wait_values(stage, turn);
        rows.gather(value_tiles + (stage * TILE_BYTES >> 4));
        products_done<1>();
        pin(rows.scores);
        if (ragged) rows.mask(keys - block * KEYS, lane);
        if (rows.weigh(scale)) {  // a branch also keeps the weighing ahead of the wait below it
          products_done<0>();
          pin(rows.result);
          rows.score_alone(blocks.key_tile(next), lane);
          if (ragged) rows.mask(keys - block * KEYS, lane);
          rows.fade(scale);
          rows.weigh(scale);
        }
        products_done<0>();
        pin(rows.result);
        blocks.leave(block - 1, stage, lane);
        rows.round();
      }
    }
    turn ^= 1;
  }
  int stage = (blocks.count - 1) % STAGES;
  blocks.wait_values(stage, (blocks.count - 1) / STAGES % 2);
  rows.gather(value_tiles + (stage * TILE_BYTES >> 4));
  products_done<0>();
  pin(rows.result);
  rows.store(out + (long long)image * queries * width + head * HEAD, first, queries, width, lane);
}
