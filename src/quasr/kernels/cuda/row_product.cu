// out = norm(x) W^T for one row x, at the speed at which W can be read.
//
// A program owns neighbouring rows of W. One thread asks for them by bulk copies into a ring in shared memory, before the
// kernel before this one has ended, because weights do not depend on it; so the memory is never idle between kernels.
// Activations meet 8- and 4-bit codes as integers of 16 bits, 16 or 32 neighbours to a scale, by dp4a in two halves of
// 8 bits: four multiplications an instruction, and a rounding far below that of 16-bit floats. Weights in 16 bits meet
// fp32.
//
// BITS of a weight; SLICES: parts of a row, a warp each; CHUNKS: 16-byte loads of a lane for its part; GROUPS of warps;
// ROWS of W that a warp takes at a time; MODE as in triton_matvec; NORM: x is the fp32 residual stream, else 16 bits;
// GROUP: columns to a scale.

enum { PLAIN, ADD, GATE, HEAD };

constexpr int PER_LOAD = 128 / BITS;
constexpr int COLUMNS = SLICES * CHUNKS * 32 * PER_LOAD;
constexpr int SLICE_BYTES = CHUNKS * 512, ROW_BYTES = SLICES * SLICE_BYTES;
constexpr int WARPS = SLICES * GROUPS, THREADS = WARPS * 32;
constexpr int TILE = GROUPS * ROWS;
// Scales that come with a tile: of groups, or of the head's rows. Others are read by those who need them.
constexpr int TILE_SCALES = BITS == 4 ? COLUMNS / GROUP : BITS == 8 && MODE == HEAD ? 1 : 0;
constexpr int TILE_BYTES = TILE * ROW_BYTES, STAGE_BYTES = TILE_BYTES + (TILE * TILE_SCALES * 2 + 127) / 128 * 128;
constexpr int OUTPUTS = MODE == GATE ? TILE / 2 : TILE;
constexpr int MOST_STAGES = 8, MOST_ROWS = 128;
constexpr int WORDS = BITS == 16 ? 1 : CHUNKS * PER_LOAD / 4;
constexpr int FLOATS = BITS == 16 ? CHUNKS * 8 : 1;
constexpr int TURNS = (COLUMNS + THREADS * 8 - 1) / (THREADS * 8);
static_assert(MODE != HEAD || SLICES == 1, "each warp takes the best of whole logits");

struct Shared {
  u64 full[MOST_STAGES], empty[MOST_STAGES];
  alignas(16) u32 high[BITS == 16 ? COLUMNS : COLUMNS / 4];  // of 16 bits: the numbers themselves, in fp32
  alignas(16) u32 low[BITS == 16 ? 4 : COLUMNS / 4];
  float scales[COLUMNS / PER_LOAD];
  float squares[WARPS];
  float sums[SLICES][MOST_ROWS];
};

// A lane's part of the row, as its warp multiplies it.
struct Activations {
  u32 high[WORDS], low[WORDS];
  float scale[CHUNKS], numbers[FLOATS];
  int sum[CHUNKS];
};

// Which tiles of W a program owns.
struct Span {
  int first, count;
};

DEVICE Span span_of(int n) {
  int all = n / OUTPUTS, each = all / gridDim.x, more = all - each * gridDim.x, block = blockIdx.x;
  return {block * each + min(block, more), each + (block < more)};
}

DEVICE void fetch(const u8* weight, const u16* scale, u8* stage, u64* full, size_t row, int n) {
  barrier_expect(full, TILE_BYTES + TILE * TILE_SCALES * 2);
  constexpr int PARTS = MODE == GATE ? 2 : 1;  // rows of the gate, and the same rows of what goes up
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    size_t from = row + (size_t)part * n;
    bulk_copy(stage + part * (TILE_BYTES / PARTS), weight + from * ROW_BYTES, TILE_BYTES / PARTS, full);
    if (TILE_SCALES) {
      constexpr int BYTES = TILE * TILE_SCALES * 2 / PARTS;
      bulk_copy(stage + TILE_BYTES + part * BYTES, scale + from * TILE_SCALES, BYTES, full);
    }
  }
}

DEVICE void produce(const u8* weight, const u16* scale, u8* ring, Shared& shared, Span span, int n, int stages) {
  for (int tile = 0, at = 0, turn = 0; tile < span.count; tile++) {
    if (turn) barrier_wait(&shared.empty[at], (turn - 1) & 1);
    fetch(weight, scale, ring + at * STAGE_BYTES, &shared.full[at], (size_t)(span.first + tile) * OUTPUTS, n);
    if (++at == stages) at = 0, turn++;
  }
}

// Four numbers times `inverse`, as integers of 16 bits: their upper and their lower bytes.
DEVICE void split(float a, float b, float c, float d, float inverse, u32* high, u32* low) {
  int p = __float2int_rn(a * inverse), q = __float2int_rn(b * inverse);
  int r = __float2int_rn(c * inverse), s = __float2int_rn(d * inverse);
  u32 left = __byte_perm(p, q, 0x5140), right = __byte_perm(r, s, 0x5140);
  *low = __byte_perm(left, right, 0x5410);
  *high = __byte_perm(left, right, 0x7632);
}

// Eight neighbours y from column `at` on, to where all warps find them.
DEVICE void share(const float* y, int at, Shared& shared) {
  if (BITS == 16) {
    *(float4*)(shared.high + at) = make_float4(y[0], y[1], y[2], y[3]);
    *(float4*)(shared.high + at + 4) = make_float4(y[4], y[5], y[6], y[7]);
    return;
  }
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) most = larger(most, fabsf(y[i]));
#pragma unroll
  for (int offset = PER_LOAD / 16; offset; offset >>= 1) most = larger(most, __shfl_xor_sync(~0u, most, offset));
  float inverse = most > 0 ? 32767.f / most : 0.f;
  u32 high[2], low[2];
  if (BITS == 4) {  // a byte of W holds an even column and the odd one after it
    split(y[0], y[2], y[4], y[6], inverse, high, low);
    split(y[1], y[3], y[5], y[7], inverse, high + 1, low + 1);
  } else {
    split(y[0], y[1], y[2], y[3], inverse, high, low);
    split(y[4], y[5], y[6], y[7], inverse, high + 1, low + 1);
  }
  *(uint2*)(shared.high + at / 4) = make_uint2(high[0], high[1]);
  *(uint2*)(shared.low + at / 4) = make_uint2(low[0], low[1]);
  // NaN and infinity go on in the scale.
  if (at % PER_LOAD == 0) shared.scales[at / PER_LOAD] = most * (1.f / 32767.f);
}

// x to shared memory, times the norm's weight where there is one; 1 / rms(x), or 1.
DEVICE float take_row(const void* x, const u16* norm, float eps, Shared& shared) {
  float weights[TURNS][8], square = 0;
  if (NORM)
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      int at = (turn * THREADS + threadIdx.x) * 8;
      if (at < COLUMNS) unpack(*(const uint4*)(norm + at), weights[turn]);
    }
  wait_for_predecessor();
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    int at = (turn * THREADS + threadIdx.x) * 8;
    if (at >= COLUMNS) break;  // whole warps
    float y[8];
    if (NORM) {
      *(float4*)y = *(const float4*)((const float*)x + at);
      *(float4*)(y + 4) = *(const float4*)((const float*)x + at + 4);
#pragma unroll
      for (int i = 0; i < 8; i++) square += y[i] * y[i], y[i] *= weights[turn][i];
    } else {
      unpack(*(const uint4*)((const u16*)x + at), y);
    }
    share(y, at, shared);
  }
  if (NORM) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) square += __shfl_xor_sync(~0u, square, offset);
    if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = square;
  }
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");  // without the thread that fetches
  if (!NORM) return 1;
  square = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) square += shared.squares[warp];
  return rsqrtf(square / COLUMNS + eps);
}

DEVICE Activations own_part(const Shared& shared, int slice, int lane) {
  Activations mine;
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) {
    int at = (slice * CHUNKS + j) * 32 * PER_LOAD + lane * PER_LOAD;
    if (BITS == 16) {
      *(float4*)(mine.numbers + 8 * j) = *(const float4*)(shared.high + at);
      *(float4*)(mine.numbers + 8 * j + 4) = *(const float4*)(shared.high + at + 4);
      continue;
    }
    constexpr int EACH = PER_LOAD / 4;
    int ones = 0x01010101, high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      *(uint4*)(mine.high + EACH * j + i) = *(const uint4*)(shared.high + at / 4 + i);
      *(uint4*)(mine.low + EACH * j + i) = *(const uint4*)(shared.low + at / 4 + i);
    }
    mine.scale[j] = shared.scales[at / PER_LOAD];
    if (BITS == 4) {
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        high = __dp4a((int)mine.high[EACH * j + i], ones, high);
        low = (int)__dp4a(mine.low[EACH * j + i], (u32)ones, (u32)low);
      }
      mine.sum[j] = high * 256 + low;
    }
  }
  return mine;
}

DEVICE int dot_signed(u32 codes, u32 high, int sum) { return __dp4a((int)codes, (int)high, sum); }

DEVICE int dot_mixed(u32 a_signed, u32 b_unsigned, int sum) {
  asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a_signed), "r"(b_unsigned));
  return sum;
}

// One lane's part of the product of a row of W with the activations.
DEVICE float product(const u8* row, const u16* scales, const Activations& mine, int slice, int lane) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < CHUNKS; j++) {
    uint4 loaded = *(const uint4*)(row + j * 512 + lane * 16);
    const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    int high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (BITS == 8) {
        high = dot_signed(words[i], mine.high[4 * j + i], high);
        low = dot_mixed(words[i], mine.low[4 * j + i], low);
      } else if (BITS == 4) {
        u32 even = words[i] & 0x0f0f0f0f, odd = (words[i] >> 4) & 0x0f0f0f0f;
        high = dot_signed(even, mine.high[8 * j + 2 * i], high);
        high = dot_signed(odd, mine.high[8 * j + 2 * i + 1], high);
        low = dot_mixed(even, mine.low[8 * j + 2 * i], low);
        low = dot_mixed(odd, mine.low[8 * j + 2 * i + 1], low);
      } else {
        sum += first_of(words[i]) * mine.numbers[8 * j + 2 * i];
        sum += second_of(words[i]) * mine.numbers[8 * j + 2 * i + 1];
      }
    }
    if (BITS == 8) sum += mine.scale[j] * (float)(high * 256 + low);
    if (BITS == 4) {
      int column = (slice * CHUNKS + j) * 32 * PER_LOAD + lane * PER_LOAD;
      sum += mine.scale[j] * from_16(scales[column / GROUP]) * (float)(high * 256 + low - 8 * mine.sum[j]);
    }
  }
  return sum;
}

// Of some logits: the largest, its row and sum(exp(logit - largest)). NaN makes the sum NaN.
struct Best {
  float largest, total;
  int row;
};

DEVICE void consider(Best& best, float logit, int row) {
  if (logit > best.largest) {
    best.total = best.total * __expf(best.largest - logit) + 1;
    best.largest = logit;
    best.row = row;
  } else {
    best.total += __expf(logit - best.largest);
  }
}

// What a thread of the end needs and can ask for early: factors of its row of W, or of its two.
struct End {
  float gate, up, residual;
};

DEVICE End prepare(const u16* scale, Span span, int n) {
  End end = {1, 1, 0};
  if (BITS == 8 && MODE != HEAD && (int)threadIdx.x < span.count * OUTPUTS) {
    int row = span.first * OUTPUTS + threadIdx.x;
    end.gate = from_16(scale[row]);
    if (MODE == GATE) end.up = from_16(scale[row + n]);
  }
  return end;
}

DEVICE float summed(const Shared& shared, int row) {
  float sum = 0;
#pragma unroll
  for (int slice = 0; slice < SLICES; slice++) sum += shared.sums[slice][row];
  return sum;
}

DEVICE void finish(const Shared& shared, void* out, Span span, float factor, End end) {
  int at = threadIdx.x, row = span.first * OUTPUTS + at;
  if (at >= span.count * OUTPUTS) return;
  if (MODE == GATE) {
    int place = at / OUTPUTS * TILE + at % OUTPUTS;
    float gate = summed(shared, place) * factor * end.gate, up = summed(shared, place + OUTPUTS) * factor * end.up;
    ((u16*)out)[row] = to_16(gate / (1 + __expf(-gate)) * up);
  } else {
    float sum = summed(shared, at) * factor * end.gate;
    if (MODE == ADD)
      ((float*)out)[row] = end.residual + sum;
    else
      ((u16*)out)[row] = to_16(sum);
  }
}

// weight: (n, COLUMNS) codes, or (2 n, COLUMNS) with GATE; scale: as Matrix has it; out: (n,), fp32 with ADD.
// HEAD: largest, places, totals have a number for each warp of each program.
extern "C" __global__ void __launch_bounds__(THREADS + 32)
    row_product(const void* x, const u8* weight, const u16* scale, const u16* norm, void* out, float* largest,
                int* places, float* totals, int n, float eps, int stages) {
  extern __shared__ __align__(128) u8 ring[];
  __shared__ Shared shared;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Span span = span_of(n);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; stage++) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  let_successor_start();
  if (warp == WARPS) {
    if (lane == 0) produce(weight, scale, ring, shared, span, n, stages);
    return;
  }
  End end = prepare(scale, span, n);
  float factor = take_row(x, norm, eps, shared);
  if (MODE == ADD && (int)threadIdx.x < span.count * OUTPUTS)
    end.residual = ((const float*)out)[span.first * OUTPUTS + threadIdx.x];
  int slice = warp % SLICES, group = warp / SLICES;
  Activations mine = own_part(shared, slice, lane);
  Best best = {-3.4e38f, 0, 0};
  for (int tile = 0, at = 0, turn = 0; tile < span.count; tile++) {
    const u8* stage = ring + at * STAGE_BYTES;
    barrier_wait(&shared.full[at], turn & 1);
    float sums[ROWS], scales[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      int row = group * ROWS + i;
      const u16* own = (const u16*)(stage + TILE_BYTES) + row * TILE_SCALES;
      sums[i] = product(stage + row * ROW_BYTES + slice * SLICE_BYTES, own, mine, slice, lane);
      scales[i] = BITS == 8 && MODE == HEAD ? from_16(*own) : 1.f;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[at]);
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
#pragma unroll
      for (int i = 0; i < ROWS; i++) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      if (MODE == HEAD)
        consider(best, sums[i] * factor * scales[i], (span.first + tile) * TILE + group * ROWS + i);
      else if (lane == 0)
        shared.sums[slice][tile * TILE + group * ROWS + i] = sums[i];
    if (++at == stages) at = 0, turn++;
  }
  if (MODE == HEAD) {
    if (lane == 0) {
      int where = blockIdx.x * WARPS + warp;
      largest[where] = best.largest, places[where] = best.row, totals[where] = best.total;
    }
    return;
  }
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
  finish(shared, out, span, factor, end);
}
