// Attention of one new token over the cache, with its norms, RoPE and write: q, k, v as a product made them -> heads.
//
// A cluster of PARTS programs takes one key head, each a part of the positions; they put their parts together through
// shared memory, in a fixed order. What the cache holds of earlier steps is asked for before the kernel before has ended:
// that is safe as long as some kernel of the step lets its successors start only after its own wait.
//
// GROUP: query heads to a key head. Heads have 128 numbers: half a warp has one position, a lane 8 of them.

constexpr int SIZE = 128, PARTS = 8, THREADS = 256, HALVES = THREADS / 16, AHEAD = 4, STEP = HALVES * AHEAD;
constexpr float NOTHING = -3e38f;

struct Shared {
  float tops[HALVES][GROUP], sums[HALVES][GROUP];
  float values[HALVES][GROUP][SIZE];
  float top[GROUP], sum[GROUP], value[GROUP][SIZE];
};

struct Loaded {
  uint4 k[AHEAD], v[AHEAD];
};

// Half a warp's running softmax.
struct Running {
  float top[GROUP], sum[GROUP], value[GROUP][8];
};

DEVICE Loaded load(const u16* keys, const u16* values, int from, int end) {
  Loaded found;
  int half = threadIdx.x / 16, lane = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    int p = from + half + HALVES * i;
    found.k[i] = found.v[i] = make_uint4(0, 0, 0, 0);
    if (p < end) {
      found.k[i] = *(const uint4*)(keys + (size_t)p * SIZE + lane * 8);
      found.v[i] = *(const uint4*)(values + (size_t)p * SIZE + lane * 8);
    }
  }
  return found;
}

DEVICE float over_half(float sum) {
#pragma unroll
  for (int offset = 8; offset; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// RMSNorm and RoPE of a head, 8 numbers a lane. The other half of the head is 8 lanes away.
DEVICE void turn(float* y, const float* weight, const float* cosine, const float* sine, float eps) {
  float square = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) square += y[i] * y[i];
  float factor = rsqrtf(over_half(square) / SIZE + eps);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    y[i] *= factor * weight[i];
    y[i] = y[i] * cosine[i] + __shfl_xor_sync(~0u, y[i], 8) * sine[i];
  }
}

DEVICE uint4 pack(const float* y) {
  return make_uint4(pair_of(y[0], y[1]), pair_of(y[2], y[3]), pair_of(y[4], y[5]), pair_of(y[6], y[7]));
}

// STEP positions more, from `from` on.
DEVICE void look(Running& all, const Loaded& found, const float (*q)[8], int from, int end) {
  int half = threadIdx.x / 16;
  float scores[AHEAD][GROUP];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    float k[8];
    unpack(found.k[i], k);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; j++) sum += q[g][j] * k[j];
      sum = over_half(sum);
      scores[i][g] = from + half + HALVES * i < end ? sum : NOTHING;
    }
  }
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    float top = all.top[g];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) top = fmaxf(top, scores[i][g]);
    float keep = exp2f(all.top[g] - top);
    all.top[g] = top;
    all.sum[g] *= keep;
#pragma unroll
    for (int j = 0; j < 8; j++) all.value[g][j] *= keep;
  }
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    float v[8];
    unpack(found.v[i], v);
    bool known = from + half + HALVES * i < end;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float share = known ? exp2f(scores[i][g] - all.top[g]) : 0.f;
      all.sum[g] += share;
#pragma unroll
      for (int j = 0; j < 8; j++) all.value[g][j] += share * v[j];
    }
  }
}

// What the halves of the program's warps found -> shared.top, sum, value.
DEVICE void gather(const Running& mine, Shared& shared) {
  int half = threadIdx.x / 16, lane = threadIdx.x % 16;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    *(float4*)&shared.values[half][g][lane * 8] = *(const float4*)mine.value[g];
    *(float4*)&shared.values[half][g][lane * 8 + 4] = *(const float4*)(mine.value[g] + 4);
    if (lane == 0) shared.tops[half][g] = mine.top[g], shared.sums[half][g] = mine.sum[g];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < GROUP * SIZE; at += THREADS) {
    int g = at / SIZE, d = at % SIZE;
    float top = NOTHING, sum = 0, value = 0;
#pragma unroll
    for (int i = 0; i < HALVES; i++) top = fmaxf(top, shared.tops[i][g]);
#pragma unroll
    for (int i = 0; i < HALVES; i++) {
      float share = exp2f(shared.tops[i][g] - top);
      sum += share * shared.sums[i][g];
      value += share * shared.values[i][g][d];
    }
    shared.value[g][d] = value;
    if (d == 0) shared.top[g] = top, shared.sum[g] = sum;
  }
}

DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE float of_part(const float* own, int part) {
  u32 there;
  float found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(part));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(found) : "r"(there) : "memory");
  return found;
}

// The parts of a cluster -> out (GROUP, SIZE), each program its share.
DEVICE void merge(const Shared& shared, u16* out, int part) {
  if (threadIdx.x >= GROUP * SIZE / PARTS) return;
  int at = part * (GROUP * SIZE / PARTS) + threadIdx.x, g = at / SIZE, d = at % SIZE;
  float tops[PARTS], sums[PARTS], values[PARTS], top = NOTHING, sum = 0, value = 0;
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    tops[i] = of_part(&shared.top[g], i);
    sums[i] = of_part(&shared.sum[g], i);
    values[i] = of_part(&shared.value[g][d], i);
    top = fmaxf(top, tops[i]);
  }
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    float share = exp2f(tops[i] - top);
    sum += share * sums[i];
    value += share * values[i];
  }
  out[at] = to_16(sum == 0 ? 0.f : value / sum);  // an idle row has no positions; NaN stays
}

// x: (GROUP kv + 2 kv, SIZE); keys, values: (kv, positions, SIZE); out: (GROUP kv, SIZE). Grid: (kv, PARTS).
extern "C" __global__ void __cluster_dims__(1, PARTS, 1) __launch_bounds__(THREADS)
    row_attention(const u16* x, u16* keys, u16* values, const long long* offsets, const long long* lengths,
                  const u8* idle, const u16* q_norm, const u16* k_norm, const float* rates, u16* out,
                  int positions, float q_eps, float k_eps, float scale) {
  __shared__ Shared shared;
  let_successor_start();
  int kv = blockIdx.x, part = blockIdx.y, heads = gridDim.x * GROUP, lane = threadIdx.x % 16;
  int last = (int)lengths[0], all = *idle ? 0 : last + 1;
  int share = (all + PARTS - 1) / PARTS, start = part * share, end = min(start + share, all);
  size_t base = ((size_t)kv * positions + offsets[0]) * SIZE;
  keys += base, values += base;
  Loaded found = load(keys, values, start, min(end, last));
  float cosine[8], sine[8], q_weight[8], k_weight[8];
  unpack(*(const uint4*)(q_norm + lane * 8), q_weight);
  unpack(*(const uint4*)(k_norm + lane * 8), k_weight);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    sincosf(last * rates[(lane * 8 + i) % (SIZE / 2)], &sine[i], &cosine[i]);
    if (lane < 8) sine[i] = -sine[i];
  }
  wait_for_predecessor();
  float q[GROUP][8], new_k[8];
#pragma unroll
  for (int g = 0; g < GROUP; g++) unpack(*(const uint4*)(x + (kv * GROUP + g) * SIZE + lane * 8), q[g]);
  unpack(*(const uint4*)(x + (heads + kv) * SIZE + lane * 8), new_k);
  uint4 new_v = *(const uint4*)(x + (heads + gridDim.x + kv) * SIZE + lane * 8);
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    turn(q[g], q_weight, cosine, sine, q_eps);
#pragma unroll
    for (int i = 0; i < 8; i++) q[g][i] *= scale;
  }
  turn(new_k, k_weight, cosine, sine, k_eps);
  Running mine;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    mine.top[g] = NOTHING, mine.sum[g] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) mine.value[g][i] = 0;
  }
  for (int from = start; from < end; from += STEP) {
    if (from > start) found = load(keys, values, from, min(end, last));
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (from + (int)threadIdx.x / 16 + HALVES * i == last && last < end) {
        found.k[i] = pack(new_k), found.v[i] = new_v;
        *(uint4*)(keys + (size_t)last * SIZE + lane * 8) = found.k[i];
        *(uint4*)(values + (size_t)last * SIZE + lane * 8) = new_v;
      }
    look(mine, found, q, from, end);
  }
  gather(mine, shared);
  cluster_barrier();
  merge(shared, out + kv * GROUP * SIZE, part);
  cluster_barrier();  // shared memory stays until all have read it
}
