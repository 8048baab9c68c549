// Matrix product on Hopper with its whole epilogue: activation(x . weight^T + bias) + residual.
//
// A block makes one tile of ROWS rows and WIDTH columns after another (GEGLU: the one half of them
// values, the other their gates, so that a thread has both of one place). One warp sends for
// operands, STAGES steps of the depth ahead, on into the next tile. Two warpgroups multiply, 64
// rows each; a weight's step serves both.
//
// - Tensor cores have nothing to do while a warpgroup is at its epilogue, unless the other one
//   multiplies. So the second keeps LAG steps behind the first, from the start on: where the first
//   ends a tile, the second has so many steps to go, and the next tile's are there for the first
//   when the second is at its own end. Neither needs further registers for that, as it would for
//   two tiles at a time, nor operands of its own, as it would if each had a tile for itself.
// - What is read from L2 costs time and power. In a CLUSTER of two, blocks have the same columns:
//   each sends for half of the weight's step, to both of them.
// - Where launches OVERLAP, the first of the weight is there when the launch before has ended.
// - Bias and residual are on their way while products are made. Results leave through the copy
//   engine, box by box, each warp by itself.
//
// Compiled with WIDTH, STAGES, CLUSTER (1 or 2), GROUP, GEGLU, BIAS, RESIDUAL, OVERLAP, BF16.

#include "hopper.cuh"

constexpr int ROWS = 128;
constexpr int STEP = 64;  // of the depth, in a row of 128 bytes, which are swizzled
constexpr int ROW_BYTES = 128;
constexpr int LAG = 2;
constexpr int WARPS = 8;  // that multiply
// A further warpgroup, whose first warp sends for operands, leaves its registers to the others.
constexpr int THREADS = 32 * (WARPS + 4);
constexpr int REGISTERS = 232, FEW_REGISTERS = 40;  // of a thread
constexpr int PART = WIDTH / 2;
constexpr int X_BYTES = ROWS * ROW_BYTES;
constexpr int PART_BYTES = PART * ROW_BYTES;
constexpr int STAGE_BYTES = X_BYTES + 2 * PART_BYTES;

// Results of a warp: boxes of 16 rows, as wide as swizzled rows can be.
constexpr int OUT = GEGLU ? PART : WIDTH;
constexpr int BOX = OUT % 64 == 0 ? 64 : OUT % 32 == 0 ? 32 : 16;
constexpr int BOX_ROW = BOX * 2;
constexpr int BOX_BYTES = 16 * BOX_ROW;
constexpr int BOXES = OUT / BOX;
static_assert(LAG < STAGES && PART % 8 == 0);

// ---- What lies where ----------------------------------------------------------------------------

// Of shared memory, in bytes from its start, which is a multiple of 1024.
constexpr int SLOTS_AT = STAGES * STAGE_BYTES;
constexpr int BARRIERS_AT = SLOTS_AT + WARPS * BOXES * BOX_BYTES;

struct Shared {
  uint32 start;

  __device__ __forceinline__ uint32 stage(int i) const { return start + i * STAGE_BYTES; }
  __device__ __forceinline__ uint32 slot(int warp, int i) const {
    return start + SLOTS_AT + (warp * BOXES + i) * BOX_BYTES;
  }
  // A stage's operands are there; it may be written again; a slot's residual is there; the first
  // warpgroup is ahead.
  __device__ __forceinline__ uint32 full(int i) const { return start + BARRIERS_AT + 8 * i; }
  __device__ __forceinline__ uint32 empty(int i) const { return full(STAGES + i); }
  __device__ __forceinline__ uint32 added(int warp, int i) const {
    return full(2 * STAGES + warp * BOXES + i);
  }
  __device__ __forceinline__ uint32 ahead() const { return added(WARPS, 0); }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), WARPS * CLUSTER);
    }
    for (int i = 0; i < WARPS * BOXES; i++) barrier_init(added(0, i), 1);
    barrier_init(ahead(), 1);
    barriers_ready();
  }
};

// Where one is in the ring of stages: its stage, and the parity of the phase in which it is.
struct Ring {
  int stage, turn;

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      turn ^= 1;
    }
  }
};

// All tiles that this block makes, one of each pair that its cluster makes, if it is of one. Groups
// of GROUP rows of those, within a group column by column, so that L2 has what is read at one time.
struct Tiles {
  int rank;                               // in the cluster
  int tile, count, stride, down, across;  // of pairs, if there are any
  int row, column;                        // the first ones of the tile, GEGLU: of the values

  __device__ __forceinline__ Tiles(int rows, int columns) {
    rank = CLUSTER > 1 ? cluster_rank() : 0;
    down = (rows + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
    across = (columns + OUT - 1) / OUT;
    count = down * across;
    tile = blockIdx.x / CLUSTER;
    stride = gridDim.x / CLUSTER;
    place();
  }
  __device__ __forceinline__ bool there() const { return tile < count; }
  __device__ __forceinline__ void next() {
    tile += stride;
    place();
  }
  __device__ __forceinline__ void place() {
    int group = tile / (GROUP * across), within = tile % (GROUP * across);
    int left = down - group * GROUP;
    int height = left < GROUP ? left : GROUP;
    height = height < 1 ? 1 : height;  // beyond the last tile
    row = ((group * GROUP + within % height) * CLUSTER + rank) * ROWS;
    column = within / height * OUT;
  }
};

// ---- The warp that sends for operands -----------------------------------------------------------

// All steps of all tiles.
struct Steps {
  Tiles tiles;
  int step, count;

  __device__ __forceinline__ void next() {
    if (++step == count) {
      step = 0;
      tiles.next();
    }
  }
};

struct Sender {
  const Shared& memory;
  const Descriptor *x, *weight;

  __device__ __forceinline__ void send_rows(const Steps& at, int stage) const {
    copy_box(memory.stage(stage), x, memory.full(stage), at.step * STEP, at.tiles.row, 0, 0);
  }
  // The first to be sent of a stage, whose barrier learns of all that is to come.
  __device__ __forceinline__ void send_weight(const Steps& at, int stage) const {
    uint32 full = memory.full(stage);
    barrier_expect(full, STAGE_BYTES);
#pragma unroll
    for (int part = 0; part < 2; part++) {
      uint32 to = memory.stage(stage) + X_BYTES + part * PART_BYTES;
      int first = at.tiles.column + (GEGLU ? 0 : part * PART), half = GEGLU ? part : 0;
      if (CLUSTER == 1)
        copy_box(to, weight, full, at.step * STEP, first, half, 0);
      else if (part == at.tiles.rank)
        copy_box_to(3, to, weight, full, at.step * STEP, first, half, 0);
    }
  }
};

__device__ __forceinline__ void send(const Sender& sender, Steps at) {
  int ahead = 0;
  if (OVERLAP) {  // no launch before this one has written the weight
    for (Steps early = at; ahead < STAGES && early.tiles.there(); early.next())
      sender.send_weight(early, ahead++);
    launches_overlap();
  }
  Ring ring = {0, 0};
  for (; at.tiles.there(); at.next(), ring.next()) {
    if (ahead > 0) {
      ahead--;
    } else {
      barrier_wait(sender.memory.empty(ring.stage), ring.turn ^ 1);
      sender.send_weight(at, ring.stage);
    }
    sender.send_rows(at, ring.stage);
  }
}

// ---- A warpgroup that multiplies ----------------------------------------------------------------

// GELU in its exact form, to 4e-7: as gelu_erf in matmul.py, which says how.
__device__ __forceinline__ float gelu(float x) {
  float y = x * 0.8493218002880191f;
  float square = y * y;
  float t = inverse_root(square * 0.25f + 1.0f + fabsf(y));
  float p = t * -0.1479146033525467f + 0.7274673581123352f;
  p = p * t - 1.1977604627609253f;
  p = p * t + 0.4531925916671753f;
  p = p * t - 0.26407596468925476f;
  p = p * t + 0.032347459346055984f;
  p = p * t + 0.396743595593161f;
  return fmaxf(x, 0.0f) - p * power(-square);
}

// A thread's share of 64 rows: two of them, `lane / 4` and that plus 8 of its warp's 16; of each
// eight columns two.
struct Result {
  float sums[WIDTH / 2];
  uint32 bias[BIAS ? WIDTH / 8 : 1];

  __device__ __forceinline__ void load_bias(const uint16* from, int first, int columns, int lane) {
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i++) {
      bool gate = GEGLU && i >= PART / 8;
      int column = first + (gate ? i - PART / 8 : i) * 8;
      bias[i] = 0;
      if (column < columns) {
        const uint16* pair = from + (gate ? columns : 0) + column + lane % 4 * 2;
        bias[i] = *reinterpret_cast<const uint32*>(pair);
      }
    }
  }

  __device__ __forceinline__ void multiply(uint64 x, uint64 weight, bool adds) {
    pin(sums);
    products_follow();
#pragma unroll
    for (int part = 0; part < STEP / 16; part++)
      MatrixProduct<WIDTH>::issue(sums, x + (part * 32 >> 4), weight + (part * 32 >> 4),
                                  adds || part > 0);
    products_issued();
  }

  // Of eight columns, those of the first row and of the second.
  __device__ __forceinline__ void columns(int eight, float (&y)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = sums[4 * eight + i];
    add(bias[BIAS ? eight : 0], y);
  }
  static __device__ __forceinline__ void add(uint32 pair, float (&y)[4]) {
    if (BIAS) {
      float low, high;
      widened(pair, low, high);
      y[0] += low;
      y[1] += high;
      y[2] += low;
      y[3] += high;
    }
  }

  // Eight columns of the result as two words, each of one row.
  __device__ __forceinline__ void finish(int eight, const uint32* residual, uint32* words) const {
    float y[4];
    columns(eight, y);
    if (GEGLU) {
      float gates[4];
      columns(PART / 8 + eight, gates);
#pragma unroll
      for (int i = 0; i < 4; i++) y[i] *= gelu(gates[i]);
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      if (RESIDUAL) {
        float low, high;
        widened(residual[row], low, high);
        y[2 * row] += low;
        y[2 * row + 1] += high;
      }
      words[row] = rounded(y[2 * row], y[2 * row + 1]);
    }
  }
};

// The slots of one warp, one for each box.
struct Slots {
  const Shared& memory;
  const Descriptor *residual, *out;
  int warp, lane, turn;
  uint32 row, chunk;  // of a slot's sixteen rows the one that this lane names to matrix
                      // instructions, and in sixteen columns which eight

  __device__ __forceinline__ void send_for(int box, int first, int column) const {
    uint32 barrier = memory.added(warp, box);
    barrier_expect(barrier, BOX_BYTES);
    copy_box(memory.slot(warp, box), residual, barrier, column + box * BOX, first, 0, 0);
  }
  // Once the slots are free of what was stored from them.
  __device__ __forceinline__ void begin(int first, int column) const {
    if (RESIDUAL && lane == 0) {
      stores_read<0>();
#pragma unroll
      for (int box = 0; box < BOXES; box++) send_for(box, first, column);
    }
  }
  __device__ __forceinline__ void leave(const Result& result, int first, int column) {
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
      uint32 slot = memory.slot(warp, box), line = slot + row * BOX_ROW;
      if (RESIDUAL) {
        barrier_wait(memory.added(warp, box), turn);
      } else {
        if (lane == 0) stores_read<BOXES - 1>();
        __syncwarp();
      }
#pragma unroll
      for (int sixteen = 0; sixteen < BOX / 16; sixteen++) {
        uint32 byte = sixteen * 32 + chunk * 16;
        uint32 at = line + (byte ^ ((row * BOX_ROW >> 7 & (BOX_ROW / 16 - 1)) << 4));
        uint32 residual[4] = {0, 0, 0, 0}, words[4];
        if (RESIDUAL) load_matrices(at, residual);
#pragma unroll
        for (int half = 0; half < 2; half++)
          result.finish((box * BOX + sixteen * 16) / 8 + half, residual + 2 * half,
                        words + 2 * half);
        store_matrices(at, words);
      }
      stores_follow();
      __syncwarp();
      if (lane == 0) {
        store_box(out, slot, column + box * BOX, first, 0, 0);
        stores_issued();
      }
    }
    turn ^= 1;
  }
};

// After the products of a stage, of a whole warp: to every block that sends something there.
__device__ __forceinline__ void free_stage(const Shared& memory, int stage, int lane) {
  if (lane < CLUSTER) barrier_arrive(memory.empty(stage), lane);
}

__device__ __forceinline__ void multiply(const Shared& memory, Tiles tiles, int steps,
                                         const Descriptor* residual, const Descriptor* out,
                                         const uint16* bias, int columns, int warp, int lane) {
  int group = warp / 4;
  uint64 x = matrix<16>(memory.start, group * 64 * ROW_BYTES);
  uint64 weight = matrix<16>(memory.start, X_BYTES);
  Slots slots = {memory, residual, out, warp, lane, 0, uint32(lane % 16), uint32(lane / 16)};
  Ring ring = {0, 0};
  Result result;
  int alone = group == 0 ? (LAG < steps ? LAG : steps) : 0;  // steps till the other may begin
  if (group == 1) barrier_wait(memory.ahead(), 0);
  for (; tiles.there(); tiles.next()) {
    int first = tiles.row + warp * 16, before = 0;
    for (int step = 0; step < steps; step++, ring.next()) {
      barrier_wait(memory.full(ring.stage), ring.turn);
      int stage = ring.stage * (STAGE_BYTES >> 4);
      result.multiply(x + stage, weight + stage, step > 0);
      if (step > 0) {
        products_done<1>();
        free_stage(memory, before, lane);
      } else {  // what has time till the end
        slots.begin(first, tiles.column);
        if (BIAS) result.load_bias(bias, tiles.column, columns, lane);
      }
      before = ring.stage;
      if (alone > 0 && --alone == 0 && warp == 0 && lane == 0)
        barrier_arrive(memory.ahead(), tiles.rank);
    }
    products_done<0>();
    pin(result.sums);
    free_stage(memory, before, lane);
    slots.leave(result, first, tiles.column);
  }
  if (lane == 0) stores_read<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    matmul_hopper(const __grid_constant__ Descriptor x, const __grid_constant__ Descriptor weight,
                  const __grid_constant__ Descriptor residual, const __grid_constant__ Descriptor out,
                  const uint16* bias, int rows, int columns, int depth) {
  extern __shared__ char shared[];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int steps = (depth + STEP - 1) / STEP;
  Shared memory = {(uint32(__cvta_generic_to_shared(shared)) + 1023) & ~1023u};
  Tiles tiles(rows, columns);
  if (threadIdx.x == 0) {
    memory.init();
    fetch_ahead(&x);
    fetch_ahead(&weight);
    fetch_ahead(&out);
    if (RESIDUAL) fetch_ahead(&residual);
  }
  if (CLUSTER > 1)
    cluster_meet();
  else
    __syncthreads();
  if (warp >= WARPS) {
    fewer_registers<FEW_REGISTERS>();
    if (warp == WARPS && lane == 0) send({memory, &x, &weight}, {tiles, 0, steps});
  } else {
    more_registers<REGISTERS>();
    if (OVERLAP) launches_overlap();
    multiply(memory, tiles, steps, &residual, &out, bias, columns, warp, lane);
  }
  // Others still free stages here, or copy to them.
  if (CLUSTER > 1) cluster_meet();
}
