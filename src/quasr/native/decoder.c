/* The text decoder on a CPU: prompts and steps straight from the codes of an ONNX folder's data file (docs/onnx.md).

   Activations meet the codes as int16, with a scale for every group of a token; the sums of a group are exact in int32
   and are added up in float, group after group. So a token's numbers do not depend on the tokens beside it, on the
   number of threads, or on which of the two products below computes them. tests/unit/native_folder.py has
   the plain formula. All pointers are checked by the caller, quasr.engine.native_decoder. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Bytes of this processor's nearest data cache; quasr.native.library says it where the system does. Sixteen streams,
   each asked for some way ahead, have room in 48 KB beside what a step works with (measured: Ice Lake). In 32 KB they
   push each other out: there the next cache is asked for more of each (Zen 4: a seventh to a fifth faster). */
#if !defined(NEAR_CACHE)
#define NEAR_CACHE (48 << 10)
#endif

enum {
    ROOMY = NEAR_CACHE >= 48 << 10,
    LANES = 16,           /* floats in a vector */
    CODES = 32,           /* int16 in a vector */
    PARTS = 4,            /* vectors of rows that a prompt's product unpacks at once */
    PANEL = PARTS * LANES,
    TILE = 6,             /* tokens that meet them at once: 24 sums stay in registers */
    BLOCK = 192,          /* tokens of a prompt that go through the network at once: bounds memory and cache */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    FEW = 8,              /* up to so many tokens a step's product is faster: it unpacks into registers */
#else
    FEW = 0,              /* without these instructions there is one product */
#endif
    AHEAD = ROOMY ? 512 : 2048, /* columns that a step asks for before it comes to them, in each of its streams */
    SCALES_AHEAD = 4,     /* the same in rows, for their scales */
    SPAN = 128,           /* most columns that share a scale of activations */
    SPINS = 2000,         /* looks at a barrier before a thread gives its core away */
    PIECE = 4096,         /* logits of which a thread finds the likeliest at once */
    DOUBT = 16,           /* standard deviations of what the lower halves of codes add that are still believed */
    LINE = 64,
    PLACES = 8 /* of memory from which attention asks for keys and values by turns */
};

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int16_t shorts __attribute__((vector_size(32)));

/* How a matrix's codes lie: a byte each with zero at 128, two in a byte with zero at 8, low one first, or signed. */
enum kind { BYTES, NIBBLES, SIGNED };

/* (rows, columns): code - zero, times scales[row, column / group]. `span` columns share a scale of activations. */
typedef struct {
    const uint8_t *codes;
    const float *scales;
    int64_t rows, columns, group, span, kind;
} matrix;

typedef struct {
    matrix qkv, o, gate_up, down;
    const float *input_norm, *q_norm, *k_norm, *post_norm;
} layer;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, ffn;
    const layer *layer;
    const float *norm;
    matrix head, coarse; /* `coarse`: the upper halves of the head's codes, where they are read first */
    const uint8_t *fine; /* the lower ones */
    double eps;
} network;

#if defined(__F16C__) || defined(__AVX512F__) || defined(__ARM_FP16_FORMAT_IEEE)
#define HALF 1
typedef uint16_t stored;
#else
#define HALF 0
typedef float stored;
#endif

/* keys[layer, row, kv head, position / 16, head_dim, 16], so that scores need no sums across lanes, and
   values[layer, row, kv head, position, head_dim]. Cosines and sines are (capacity, head_dim / 2). */
typedef struct {
    stored *keys, *values;
    const float *cosines, *sines;
    int64_t rows, capacity;
} cache;

/* Tokens, the row and the position of each in ascending order within a row, and those whose logits are wanted.
   For each of these: its logits, the likeliest token, and the sum of e^(logit - that token's). */
typedef struct {
    const float *embeddings;
    const int32_t *rows, *positions, *wanted;
    float *logits, *totals;
    int32_t *likeliest;
    int64_t tokens, outputs;
} request;

/* int16 codes (columns / span, tokens, span), and the sums of those and their scales (columns / span, tokens). */
typedef struct {
    int16_t *codes;
    int32_t *sums;
    float *scales;
    int64_t tokens;
} quantised;

/* The likeliest of some tokens: its logit, and the sum of e^(logit - this one) over them. */
typedef struct {
    float logit, total;
    int32_t token;
} choice;

/* What lower halves add to one token's logits, over a row's scale: what is to be expected, and the most beside. Whether
   one was found to add half of that: then all of the token's logits are computed in full. */
typedef struct {
    float expected, most;
    atomic_int doubted;
} rest;

/* What the threads of one call share. `own` and `seen` floats belong to each of them. */
typedef struct {
    const network *net;
    const cache *kv;
    const request *asked;
    int64_t threads, own;
    float *x, *wide, *attended, *scratch;
    rest *rests;
    quantised q;
    choice *choices;
    atomic_int go, arrived, phase;
    atomic_llong cursor;
} team;

/* --- threads ------------------------------------------------------------------------------------------------------ */

INLINE void relax(int spins) {
    if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
    else _mm_pause();
#endif
}

/* All threads wait for each other; the items are counted from 0 again. */
static void meet(team *team) {
    int phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->threads) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->cursor, 0, memory_order_relaxed);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; ++spins) relax(spins);
}

/* Takes some of `items`, two thirds of a fair share of what is left, so that no thread waits long for the last; 0 where
   none are left. It is an odd number, for `streams`. */
static int64_t take(team *team, int64_t items, int64_t *first) {
    long long found = atomic_load_explicit(&team->cursor, memory_order_relaxed), count;
    do {
        if (found >= items) return 0;
        count = 2 * (items - found) / (3 * team->threads) | 1;
    } while (!atomic_compare_exchange_weak_explicit(&team->cursor, &found, found + count, memory_order_relaxed,
                                                    memory_order_relaxed));
    *first = found;
    return count;
}

/* --- vectors ------------------------------------------------------------------------------------------------------ */

INLINE floats load(const float *from) {
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* Asks for the line of `place`, which is read later. */
INLINE void ask(const void *place) { __builtin_prefetch(place, 0, ROOMY ? 3 : 2); }

INLINE void store(float *to, floats v) { memcpy(to, &v, sizeof v); }

INLINE floats all(float x) { return x - (floats){0}; }

INLINE float sum(floats v) {
    float parts[LANES];
    store(parts, v);
    for (int step = LANES / 2; step; step /= 2)
        for (int lane = 0; lane < step; ++lane) parts[lane] += parts[lane + step];
    return parts[0];
}

/* sum + a b, rounded once where the processor does that. */
INLINE floats add_product(floats sum, floats a, float b) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)sum);
#else
    return sum + a * b;
#endif
}

/* The nearest whole numbers, for |v| < 2^22: the sum's last bits are they. */
INLINE ints nearest(floats v) { return (ints)(v + 12582912.0f) - 0x4B400000; }

INLINE floats choose(ints which, floats a, floats b) { return (floats)(((ints)a & which) | ((ints)b & ~which)); }

/* e^v for v between -87 and 88, or there; NaN stays NaN. v = n ln 2 + r, and e^r by its series to the 7th power. */
INLINE floats exponential(floats v) {
    v = choose(v < -87.0f, all(-87.0f), choose(v > 88.0f, all(88.0f), v));
    floats rounded = v * 1.44269504f + 12582912.0f;
    floats n = rounded - 12582912.0f, r = v - n * 0.693359375f + n * 2.12194440e-4f, y = all(1.0f / 5040);
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return y * (floats)(((ints)rounded - 0x4B400000 + 127) << 23);
}

INLINE floats load_stored(const stored *from) {
#if !HALF
    return load(from);
#elif defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
    __m256 halves[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)))};
    floats v;
    memcpy(&v, halves, sizeof v);
    return v;
#else
    floats v;
    for (int lane = 0; lane < LANES; ++lane) v[lane] = (float)((const __fp16 *)from)[lane];
    return v;
#endif
}

INLINE void store_stored(stored *to, floats v) {
#if !HALF
    store(to, v);
#elif defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    __m256 halves[2];
    memcpy(halves, &v, sizeof v);
    for (int half = 0; half < 2; ++half)
        _mm_storeu_si128((__m128i *)(to + 8 * half), _mm256_cvtps_ph(halves[half], _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < LANES; ++lane) ((__fp16 *)to)[lane] = (__fp16)v[lane];
#endif
}

/* --- activations -------------------------------------------------------------------------------------------------- */

/* x / sqrt(mean(x^2) + eps) * weight. */
static void rms_norm(float *to, const float *x, const float *weight, int64_t size, double eps) {
    floats squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + (float)eps);
    for (int64_t i = 0; i < size; i += LANES) store(to + i, load(x + i) * scale * load(weight + i));
}

/* The largest |x|, or NaN or infinity where there is one: as whole numbers they are larger than all others. */
static float largest(const float *x, int64_t size) {
    ints top = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        ints bits = (ints)load(x + i) & 0x7FFFFFFF;
        top = (bits & (bits > top)) | (top & ~(bits > top));
    }
    int32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found = top[lane] > found ? top[lane] : found;
    float number;
    memcpy(&number, &found, sizeof number);
    return number;
}

/* `half` even ones, then as many odd ones. */
INLINE void split(int16_t *to, const int16_t *from, const int half) {
    for (int i = 0; i < half; ++i) {
        to[i] = from[2 * i];
        to[half + i] = from[2 * i + 1];
    }
}

/* The columns of a group in the order in which their codes are unpacked: 32 bytes of nibbles, or the 16 of a group of
   32, come out as their low ones, then their high ones. */
INLINE void arrange(int16_t *to, const int16_t *from, int64_t span, int64_t kind) {
    if (kind != NIBBLES) memcpy(to, from, sizeof(int16_t) * span);
    else if (span < 2 * CODES) split(to, from, CODES / 2);
    else
        for (int64_t i = 0; i < span; i += 2 * CODES) split(to + i, from + i, CODES);
}

/* Whether nibbles meet bytes of activations: a step's products, which have fewer instructions so. */
INLINE int in_bytes(int64_t tokens, int64_t span, int64_t kind) {
    return kind == NIBBLES && span == SPAN && tokens <= FEW;
}

/* SPAN numbers as bytes: those of the even columns and of the odd ones, of each the low halves, then the high ones. */
INLINE void halve(uint8_t *to, const int16_t *from) {
    for (int odd = 0; odd < 2; ++odd, to += SPAN)
        for (int i = 0; i < SPAN / 2; ++i) {
            to[i] = (uint8_t)from[2 * i + odd];
            to[SPAN / 2 + i] = (uint8_t)((uint16_t)from[2 * i + odd] >> 8);
        }
}

/* The numbers of one token's group `g` as codes of 16 bits for the columns of `m`. NaN goes into the scale. */
static void quantise_group(const quantised *q, int64_t token, int64_t g, const float *x, const matrix *m) {
    const int64_t place = g * q->tokens + token;
    int16_t *codes = q->codes + place * m->span, in_order[SPAN];
    float top = largest(x, m->span), inverse = top > 1e-30f ? 32767.0f / top : 0.0f;
    ints total = {0};
    for (int64_t i = 0; i < m->span; i += LANES) {
        ints whole = nearest(load(x + i) * inverse);
        shorts narrow = __builtin_convertvector(whole, shorts);
        memcpy(in_order + i, &narrow, sizeof narrow);
        total += __builtin_convertvector(narrow, ints);
    }
    if (in_bytes(q->tokens, m->span, m->kind)) halve((uint8_t *)codes, in_order);
    else arrange(codes, in_order, m->span, m->kind);
    q->scales[place] = top / 32767.0f;
    q->sums[place] = 0;
    for (int lane = 0; lane < LANES; ++lane) q->sums[place] += total[lane];
}

static void quantise(const quantised *q, int64_t token, const float *x, const matrix *m) {
    for (int64_t g = 0; g < m->columns / m->span; ++g) quantise_group(q, token, g, x + g * m->span, m);
}

/* --- products ----------------------------------------------------------------------------------------------------- */

INLINE int64_t clamp(int64_t index, int64_t last) { return index < last ? index : last; }

INLINE int zero_of(enum kind kind) { return kind == BYTES ? 128 : kind == NIBBLES ? 8 : 0; }

INLINE int64_t bytes(enum kind kind, int64_t columns) { return kind == NIBBLES ? columns / 2 : columns; }

INLINE const uint8_t *row_codes(const matrix *m, int64_t row) {
    return m->codes + clamp(row, m->rows - 1) * bytes(m->kind, m->columns);
}

INLINE float row_scale(const matrix *m, int64_t row, int64_t column) {
    return m->scales[clamp(row, m->rows - 1) * (m->columns / m->group) + column / m->group];
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

/* sum + the products of pairs of int16. Written out, because GCC 12 copies every sum of the intrinsic and spills some. */
INLINE __m512i add_products(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

/* sum + the products of fours of bytes, of which `a` has no sign and `b` has one. */
INLINE __m512i add_bytes(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

/* The products of SPAN nibbles, in 64 bytes, with what `halve` made of activations: 256 times the high halves', which
   have the sign, and the low halves'. Nibbles are the same with a sign and without. */
INLINE __m512i nibble_products(__m512i even, __m512i odd, const int16_t *halves) {
    const __m512i *x = (const __m512i *)halves;
    __m512i sum = add_bytes(_mm512_setzero_si512(), even, _mm512_loadu_si512(x + 1));
    sum = _mm512_slli_epi32(add_bytes(sum, odd, _mm512_loadu_si512(x + 3)), 8);
    sum = add_bytes(sum, _mm512_loadu_si512(x), even);
    return add_bytes(sum, _mm512_loadu_si512(x + 2), odd);
}

/* The index-th 32 codes of a group in the order of `arrange`, with their zero. */
INLINE __m512i widen(const uint8_t *group, int64_t index, int64_t span, enum kind kind) {
    if (kind != NIBBLES) {
        __m256i codes = _mm256_loadu_si256((const __m256i *)(group + CODES * index));
        return kind == SIGNED ? _mm512_cvtepi8_epi16(codes) : _mm512_cvtepu8_epi16(codes);
    }
    const __m512i low = _mm512_set1_epi16(15);
    if (span < 2 * CODES) {
        __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)group));
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(pairs), _mm256_srli_epi16(pairs, 4), 1);
        return _mm512_and_si512(both, low);
    }
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(group + CODES * (index / 2))));
    return index % 2 ? _mm512_srli_epi16(pairs, 4) : _mm512_and_si512(pairs, low);
}

/* The sum of each of 16 vectors, in its lane. */
INLINE __m512i sums(const __m512i *v) {
    __m512i a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
        b[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]),
                                _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        c[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x88),
                                _mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xDD));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xDD));
}

/* 16 vectors of 16 numbers, turned on their side; every `step`-th of `to`. */
INLINE void turn(__m512i *to, int step, const __m512i *v) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; ++half) {
            b[i + 2 * half] = _mm512_unpacklo_epi64(a[i + half], a[i + 2 + half]);
            b[i + 2 * half + 1] = _mm512_unpackhi_epi64(a[i + half], a[i + 2 + half]);
        }
    for (int i = 0; i < 4; ++i) {
        __m512i front[2] = {_mm512_shuffle_i32x4(b[i], b[4 + i], 0x44), _mm512_shuffle_i32x4(b[i], b[4 + i], 0xEE)};
        __m512i back[2] = {_mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x44),
                           _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xEE)};
        for (int half = 0; half < 2; ++half) {
            to[step * (8 * half + i)] = _mm512_shuffle_i32x4(front[half], back[half], 0x88);
            to[step * (8 * half + 4 + i)] = _mm512_shuffle_i32x4(front[half], back[half], 0xDD);
        }
    }
}

/* Where the scales of sixteen rows, `stride` apart from `row` on, lie, from the first's; behind the end, the last's. */
INLINE __m512i scale_places(const matrix *m, int64_t row, int64_t stride) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)stride));
    index = _mm512_min_epi32(index, _mm512_set1_epi32((int)(m->rows - 1 - row)));
    return _mm512_mullo_epi32(index, _mm512_set1_epi32((int)(m->columns / m->group)));
}

/* Those of sixteen rows for group `g` of activations, of which `share` meet one scale. */
INLINE floats gather_scales(const float *scales, __m512i places, int64_t g, int64_t share) {
    return (floats)_mm512_i32gather_ps(places, scales + (share == 1 ? g : g / share), sizeof(float));
}

/* Asks for the scales of every `step`-th of sixteen rows, `stride` apart. */
INLINE void ask_scales(const matrix *m, int64_t row, int64_t stride, int64_t lane, int64_t step) {
    const int64_t groups = m->columns / m->group;
    for (; lane < LANES; lane += step)
        ask(m->scales + clamp(row + lane * stride, m->rows - 1) * groups);
}

/* Sixteen rows, `stride` apart, times `count` tokens, a group of each row at a time, read as it lies: for steps, which
   wait for memory. So few codes lie between two sums that the processor reads the next ones while it adds these. */
INLINE void few_tokens(const matrix *m, int64_t row, int64_t stride, const quantised *q, int64_t token, int count,
                       int64_t span, enum kind kind, floats *out) {
    const int64_t groups = m->columns / span, size = bytes(kind, span), share = m->group / span;
    const float *scales = m->scales + row * (m->columns / m->group);
    const __m512i places = scale_places(m, row, stride);
    const uint8_t *lanes[LANES];
    __m512i slots[4][LANES];
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] = row_codes(m, row + lane * stride);
    for (int t = 0; t < count; ++t) out[t] = (floats){0};
    for (int64_t g = 0; g < groups; ++g) {
        const int16_t *x = q->codes + (g * q->tokens + token) * span;
        ask_scales(m, row + SCALES_AHEAD, stride, g, groups);
        for (int lane = 0; lane < LANES; ++lane) {
            const uint8_t *codes = lanes[lane] + g * size;
            __m512i total[4];
            for (int t = 0; t < count; ++t) total[t] = _mm512_setzero_si512();
            for (int64_t byte = 0; byte < size; byte += LINE) ask(codes + bytes(kind, AHEAD) + byte);
            if (in_bytes(count, span, kind)) { /* as for all tokens of a step */
                __m512i both = _mm512_loadu_si512(codes), mask = _mm512_set1_epi8(15);
                __m512i even = _mm512_and_si512(both, mask), odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
                for (int t = 0; t < count; ++t) total[t] = nibble_products(even, odd, x + t * span);
            } else
                for (int64_t i = 0; i < span / CODES; ++i) {
                    __m512i weight = widen(codes, i, span, kind);
                    for (int t = 0; t < count; ++t)
                        total[t] = add_products(total[t], weight, _mm512_loadu_si512(x + t * span + CODES * i));
                }
            for (int t = 0; t < count; ++t) slots[t][lane] = total[t];
        }
        floats scale = gather_scales(scales, places, g, share);
        for (int t = 0; t < count; ++t) {
            int64_t place = g * q->tokens + token + t;
            __m512i nothing = _mm512_set1_epi32(zero_of(kind) * q->sums[place]);
            out[t] += (floats)_mm512_cvtepi32_ps(_mm512_sub_epi32(sums(slots[t]), nothing)) * (scale * q->scales[place]);
        }
    }
}

INLINE void few(const matrix *m, int64_t row, int64_t stride, const quantised *q, int64_t token, int count,
                floats *out) {
#define CASE(kind_)                                                                               \
    case kind_:                                                                                   \
        if (m->span == SPAN) few_tokens(m, row, stride, q, token, count, SPAN, kind_, out);       \
        else few_tokens(m, row, stride, q, token, count, m->span, kind_, out);                    \
        break;
    switch ((enum kind)m->kind) { CASE(BYTES) CASE(NIBBLES) CASE(SIGNED) }
#undef CASE
}

/* Scales of sixteen rows from `row` on for group `g` of activations. */
INLINE floats scales_of(const matrix *m, int64_t row, int64_t g) {
    return gather_scales(m->scales + row * (m->columns / m->group), scale_places(m, row, 1), g, m->group / m->span);
}

/* PANEL rows of one group as pairs of codes, a row in every lane. */
INLINE void pack(__m512i *packed, const matrix *m, int64_t row, int64_t first, int64_t span, enum kind kind) {
    for (int64_t i = 0; i < span / CODES; ++i)
        for (int part = 0; part < PARTS; ++part) {
            __m512i wide[LANES];
            for (int lane = 0; lane < LANES; ++lane)
                wide[lane] = widen(row_codes(m, row + part * LANES + lane) + bytes(kind, first), i, span, kind);
            turn(packed + PARTS * LANES * i + part, PARTS, wide);
        }
}

INLINE void many_tokens(floats (*out)[PARTS], const __m512i *packed, const floats *scale, const quantised *q,
                        int64_t token, int64_t g, int64_t span, int zero) {
    __m512i total[TILE][PARTS];
    const int16_t *x[TILE];
    for (int t = 0; t < TILE; ++t) {
        for (int part = 0; part < PARTS; ++part) total[t][part] = _mm512_setzero_si512();
        x[t] = q->codes + (g * q->tokens + clamp(token + t, q->tokens - 1)) * span;
    }
    for (int64_t pair = 0; pair < span / 2; ++pair, packed += PARTS)
#pragma GCC unroll 8 /* clang else keeps the sums in memory */
        for (int t = 0; t < TILE; ++t) {
            int32_t two;
            memcpy(&two, x[t] + 2 * pair, sizeof two);
            __m512i both = _mm512_set1_epi32(two);
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; ++part) total[t][part] = add_products(total[t][part], packed[part], both);
        }
    for (int t = 0; t < TILE; ++t) {
        int64_t place = g * q->tokens + clamp(token + t, q->tokens - 1);
        __m512i nothing = _mm512_set1_epi32(zero * q->sums[place]);
        for (int part = 0; part < PARTS; ++part)
            out[token + t][part] += (floats)_mm512_cvtepi32_ps(_mm512_sub_epi32(total[t][part], nothing)) *
                                    (scale[part] * q->scales[place]);
    }
}

/* PANEL rows times all tokens, rounded up to whole tiles. */
static void many(const matrix *m, int64_t row, const quantised *q, int64_t tokens, floats (*out)[PARTS]) {
    __m512i packed[SPAN / 2 * PARTS];
    const int64_t groups = m->columns / m->span;
    memset(out, 0, (size_t)((tokens + TILE - 1) / TILE * TILE) * sizeof *out);
    for (int64_t g = 0; g < groups; ++g) {
        int64_t first = g * m->span;
        floats scale[PARTS];
        for (int part = 0; part < PARTS; ++part) scale[part] = scales_of(m, clamp(row + part * LANES, m->rows - 1), g);
        if (m->kind == BYTES) pack(packed, m, row, first, m->span, BYTES);
        else if (m->kind == SIGNED) pack(packed, m, row, first, m->span, SIGNED);
        else pack(packed, m, row, first, m->span, NIBBLES);
        for (int64_t token = 0; token < tokens; token += TILE)
            many_tokens(out, packed, scale, q, token, g, m->span, zero_of(m->kind));
    }
}

#else

/* One group of a row as int16, in the order of `arrange`. */
static void widen(int16_t *to, const uint8_t *codes, const matrix *m) {
    int16_t in_order[SPAN];
    for (int64_t i = 0; i < m->span; ++i)
        if (m->kind == NIBBLES) in_order[i] = codes[i / 2] >> (i % 2 * 4) & 15;
        else in_order[i] = m->kind == SIGNED ? (int8_t)codes[i] : codes[i];
    arrange(to, in_order, m->span, m->kind);
}

/* `count` rows times `tokens` tokens: out[token * PANEL + row]. */
static void plain(const matrix *m, int64_t row, int64_t count, const quantised *q, int64_t tokens, float *out) {
    const int64_t groups = m->columns / m->span;
    int16_t wide[SPAN];
    for (int64_t t = 0; t < tokens; ++t) memset(out + t * PANEL, 0, PANEL * sizeof *out);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t g = 0; g < groups; ++g) {
            float scale = row_scale(m, row + r, g * m->span);
            widen(wide, row_codes(m, row + r) + g * bytes(m->kind, m->span), m);
            for (int64_t t = 0; t < tokens; ++t) {
                const int16_t *x = q->codes + (g * q->tokens + t) * m->span;
                int32_t total = -zero_of(m->kind) * q->sums[g * q->tokens + t];
                for (int64_t i = 0; i < m->span; ++i) total += (int32_t)wide[i] * x[i];
                out[t * PANEL + r] += (float)total * (scale * q->scales[g * q->tokens + t]);
            }
        }
}

#endif

/* to[token, row] = or += what `from[token]` holds of `count` rows. */
static void put(float *to, const float *from, int64_t count, int add) {
    for (int64_t r = 0; r < count; ++r) to[r] = add ? to[r] + from[r] : from[r];
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

/* Asks for what sixteen streams read first; behind that `few_tokens` does. */
static void ask_ahead(const matrix *m, int64_t row, int64_t stride) {
    for (int lane = 0; lane < LANES; ++lane) {
        const uint8_t *codes = row_codes(m, row + lane * stride);
        for (int64_t byte = 0; byte < bytes(m->kind, AHEAD); byte += LINE) ask(codes + byte);
    }
}

/* Some rows times the tokens of a step. Sixteen streams, each of neighbouring rows: memory is read half as fast again
   from many pages at once as from one after the other. An odd number of rows apart, because rows are some powers of two
   long: a multiple of 4 KB apart all sixteen would want the same twelve places of the nearest cache. */
static void streams(const matrix *m, int64_t first, int64_t last, const quantised *q, float *to, int add) {
    const int64_t stride = (last - first + LANES - 1) / LANES;
    ask_ahead(m, first, stride);
    for (int64_t row = first; row < first + stride; ++row)
        for (int64_t t = 0, now; t < q->tokens; t += now) {
            floats out[4];
            now = q->tokens - t >= 4 ? 4 : q->tokens - t >= 2 ? 2 : 1;
            if (now == 4) few(m, row, stride, q, t, 4, out);
            else if (now == 2) few(m, row, stride, q, t, 2, out);
            else few(m, row, stride, q, t, 1, out);
            for (int64_t i = 0; i < now; ++i)
                for (int lane = 0; lane < LANES && row + lane * stride < last; ++lane) {
                    float *place = to + (t + i) * m->rows + row + lane * stride;
                    *place = add ? *place + out[i][lane] : out[i][lane];
                }
        }
}

#endif

/* Some panels of to (tokens, rows) = x W^T, or += with `add`. */
static void panels(const matrix *m, int64_t first, int64_t last, const quantised *q, float *to, int add) {
    floats out[BLOCK + TILE][PARTS];
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    if (q->tokens <= FEW) {
        streams(m, first, last, q, to, add);
        return;
    }
#endif
    for (int64_t row = first; row < last; row += PANEL) {
        int64_t count = m->rows - row < PANEL ? m->rows - row : PANEL;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        many(m, row, q, q->tokens, out);
#else
        plain(m, row, count, q, q->tokens, (float *)out);
#endif
        for (int64_t t = 0; t < q->tokens; ++t) put(to + t * m->rows + row, (const float *)out[t], count, add);
    }
}

static void product(team *team, const matrix *m, const quantised *q, float *to, int add) {
    const int64_t unit = q->tokens <= FEW ? LANES : PANEL;
    int64_t items = (m->rows + unit - 1) / unit, first, count;
    while ((count = take(team, items, &first)))
        panels(m, first * unit, clamp((first + count) * unit, m->rows), q, to, add);
    meet(team);
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

/* Where the keys, or the values, of one head of a row begin. */
INLINE stored *head_of(const team *team, stored *all_heads, int64_t index, int64_t row, int64_t head) {
    const cache *kv = team->kv;
    const network *net = team->net;
    return all_heads + ((index * kv->rows + row) * net->kv_heads + head) * kv->capacity * net->head_dim;
}

/* Norm and RoPE of one head in place: pairs are half a head apart. */
static void rotate(const team *team, float *restrict head, const float *weight, int64_t position, float scale) {
    const int64_t half = team->net->head_dim / 2;
    const float *restrict cosines = team->kv->cosines + position * half;
    const float *restrict sines = team->kv->sines + position * half;
    rms_norm(head, head, weight, 2 * half, team->net->eps);
    for (int64_t i = 0; i < half; ++i) {
        float a = head[i] * scale, b = head[i + half] * scale;
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

/* One key head of a token: its queries made ready in place, its key and value into the cache. */
static void write_head(const team *team, int64_t index, float *qkv, int64_t row, int64_t position, int64_t head) {
    const network *net = team->net;
    const layer *layer = net->layer + index;
    const int64_t dim = net->head_dim, group = net->heads / net->kv_heads;
    float *k = qkv + (net->heads + head) * dim, *v = k + net->kv_heads * dim;
    stored *keys = head_of(team, team->kv->keys, index, row, head) + position / LANES * dim * LANES;
    stored *values = head_of(team, team->kv->values, index, row, head) + position * dim, some[LANES];
    for (int64_t n = head * group; n < (head + 1) * group; ++n)
        rotate(team, qkv + n * dim, layer->q_norm, position, 1.0f / __builtin_sqrtf((float)dim));
    rotate(team, k, layer->k_norm, position, 1.0f);
    for (int64_t i = 0; i < dim; i += LANES) {
        store_stored(values + i, load(v + i));
        store_stored(some, load(k + i));
        for (int lane = 0; lane < LANES; ++lane) keys[(i + lane) * LANES + position % LANES] = some[lane];
    }
}

/* The same of all heads, for the tokens from `begin` on. */
static void write_heads(team *team, int64_t index, int64_t begin, int64_t tokens) {
    const int64_t heads = team->net->kv_heads, width = team->net->layer[index].qkv.rows;
    int64_t first, count;
    while ((count = take(team, tokens * heads, &first)))
        for (int64_t item = first; item < first + count; ++item)
            write_head(team, index, team->wide + item / heads * width, team->asked->rows[begin + item / heads],
                       team->asked->positions[begin + item / heads], item % heads);
    meet(team);
}

/* What is wanted next is asked for meanwhile, in eight places by turns: memory is read faster from several than from
   one. `each` bytes of a place, of which `asked` have been. */
typedef struct {
    const char *from;
    int64_t each, asked;
} later;

INLINE later want(const stored *from, int64_t numbers) {
    return (later){(const char *)from, numbers * (int64_t)sizeof(stored) / PLACES / LINE * LINE, 0};
}

/* The next line of every place. */
INLINE void ask_next(later *next) {
    for (int place = 0; place < PLACES; ++place) ask(next->from + place * next->each + next->asked);
    next->asked += LINE;
}

/* scores[query, position] = e^(q k - the largest), for two queries; returns the sums of both. */
static void weigh(float *scores, float total[2], const float *q, int64_t step, const stored *keys,
                  later next, int64_t seen, int64_t dim, int64_t room) {
    floats top[2] = {all(-__builtin_inff()), all(-__builtin_inff())};
    for (int64_t first = 0; first < seen; first += LANES, keys += dim * LANES) {
        floats sums_[2][4] = {{{0}}};
        for (int64_t i = 0; i < dim; i += 4) {
            if (i % LANES == 0) ask_next(&next);
            for (int part = 0; part < 4; ++part) {
                floats key = load_stored(keys + (i + part) * LANES);
                for (int n = 0; n < 2; ++n) sums_[n][part] = add_product(sums_[n][part], key, q[n * step + i + part]);
            }
        }
        for (int n = 0; n < 2; ++n) {
            floats score = (sums_[n][0] + sums_[n][1]) + (sums_[n][2] + sums_[n][3]);
            for (int64_t lane = seen - first; lane < LANES; ++lane) score[lane] = -__builtin_inff();
            store(scores + n * room + first, score);
            top[n] = choose(score > top[n], score, top[n]);
        }
    }
    for (int n = 0; n < 2; ++n) {
        floats sums_ = {0};
        float highest = top[n][0];
        for (int lane = 1; lane < LANES; ++lane) highest = top[n][lane] > highest ? top[n][lane] : highest;
        for (int64_t first = 0; first < seen; first += LANES) {
            floats weight = exponential(load(scores + n * room + first) - highest);
            for (int64_t lane = seen - first; lane < LANES; ++lane) weight[lane] = 0;
            store(scores + n * room + first, weight);
            sums_ += weight;
        }
        total[n] = sum(sums_);
    }
}

/* to[query] = the mean of the values by these weights, `wide` vectors of a head at a time. */
INLINE void mix(float *to, int64_t step, const float *scores, const float total[2], const stored *values,
                later next, int64_t seen, int64_t dim, int64_t room, const int wide) {
    for (int64_t i = 0; i < dim; i += wide * LANES) {
        floats mean[2][4] = {{{0}}};
        for (int64_t position = 0; position < seen; ++position) {
            if (position % (LANES / wide) == 0) ask_next(&next);
            for (int part = 0; part < wide; ++part) {
                floats value = load_stored(values + position * dim + i + part * LANES);
                for (int n = 0; n < 2; ++n)
                    mean[n][part] = add_product(mean[n][part], value, scores[n * room + position]);
            }
        }
        for (int n = 0; n < 2; ++n)
            for (int part = 0; part < wide; ++part) store(to + n * step + i + part * LANES, mean[n][part] / total[n]);
    }
}

/* Attention of one layer: of `tokens` tokens from `begin` on, or of those that are wanted, with every key head. */
typedef struct {
    const team *team;
    int64_t index, begin, tokens;
    const int32_t *wanted;
} scope;

INLINE int64_t token_of(const scope *of, int64_t item) {
    return of->wanted ? of->wanted[item % of->tokens] : of->begin + item % of->tokens;
}

INLINE const stored *cached(const scope *of, stored *all_heads, int64_t item) {
    return head_of(of->team, all_heads, of->index, of->team->asked->rows[token_of(of, item)], item / of->tokens);
}

/* All query heads of one key head, two at a time; an odd one is done twice. Asks for the keys of item `next`. */
static void attend(const scope *of, float *scores, int64_t item, int64_t next) {
    const network *net = of->team->net;
    const cache *kv = of->team->kv;
    const int64_t dim = net->head_dim, group = net->heads / net->kv_heads, first = item / of->tokens * group * dim;
    const int64_t token = token_of(of, item), seen = of->team->asked->positions[token] + 1, room = kv->capacity;
    const stored *keys = cached(of, kv->keys, item), *values = cached(of, kv->values, item);
    const float *q = of->team->wide + (token - of->begin) * (net->heads + 2 * net->kv_heads) * dim + first;
    float *to = of->team->attended + item % of->tokens * net->heads * dim + first, total[2];
    for (int64_t n = 0; n < group; n += 2, q += 2 * dim, to += 2 * dim) {
        const later asked = want(values, seen * dim), after = want(cached(of, kv->keys, next), seen * dim);
        int64_t step = n + 1 < group ? dim : 0;
        weigh(scores, total, q, step, keys, asked, seen, dim, room);
        if (dim % (4 * LANES) == 0) mix(to, step, scores, total, values, after, seen, dim, room, 4);
        else mix(to, step, scores, total, values, after, seen, dim, room, 1);
    }
}

static void attend_all(const scope *of, float *scores, int64_t first, int64_t end) {
    for (int64_t item = first; item < end; ++item) attend(of, scores, item, clamp(item + 1, end - 1));
}

/* The threads of a step have shares that are known, so that each can ask for what it wants next; a prompt's tokens look
   back at more and more positions, so its threads take what is left. */
static void attention(team *team, int64_t thread, const scope *of) {
    const int64_t items = of->tokens * team->net->kv_heads;
    float *scores = team->scratch + thread * team->own;
    int64_t first, count;
    if (of->tokens <= FEW) attend_all(of, scores, items * thread / team->threads, items * (thread + 1) / team->threads);
    else
        while ((count = take(team, items, &first))) attend_all(of, scores, first, first + count);
    meet(team);
}

/* --- the network -------------------------------------------------------------------------------------------------- */

/* Norm of x (tokens, columns), as codes for `m`. */
static void normalise(team *team, int64_t thread, const float *weight, const matrix *m, const quantised *q) {
    float *normed = team->scratch + thread * team->own;
    int64_t first, count;
    while ((count = take(team, q->tokens, &first)))
        for (int64_t t = first; t < first + count; ++t) {
            rms_norm(normed, team->x + t * m->columns, weight, m->columns, team->net->eps);
            quantise(q, t, normed, m);
        }
    meet(team);
}

/* SwiGLU: silu(gate) * up over the gate's place, as codes for `down`. */
static void gate(team *team, const matrix *down, const quantised *q) {
    const int64_t size = down->columns, groups = size / down->span;
    int64_t first, count;
    while ((count = take(team, q->tokens * groups, &first)))
        for (int64_t item = first; item < first + count; ++item) {
            float *x = team->wide + item / groups * 2 * size + item % groups * down->span;
            for (int64_t i = 0; i < down->span; i += LANES) {
                floats v = load(x + i);
                store(x + i, v / (1.0f + exponential(-v)) * load(x + size + i));
            }
            quantise_group(q, item / groups, item % groups, x, down);
        }
    meet(team);
}

static void after_attention(team *team, int64_t thread, const layer *layer, const quantised *q) {
    int64_t first, count;
    while ((count = take(team, q->tokens, &first)))
        for (int64_t t = first; t < first + count; ++t)
            quantise(q, t, team->attended + t * layer->o.columns, &layer->o);
    meet(team);
    product(team, &layer->o, q, team->x, 1);
    normalise(team, thread, layer->post_norm, &layer->gate_up, q);
    product(team, &layer->gate_up, q, team->wide, 0);
    gate(team, &layer->down, q);
    product(team, &layer->down, q, team->x, 1);
}

/* --- the next token ----------------------------------------------------------------------------------------------- */

INLINE floats load_some(const float *from, int64_t count) {
    floats v = all(-__builtin_inff());
    if (count >= LANES) return load(from);
    for (int64_t lane = 0; lane < count; ++lane) v[lane] = from[lane];
    return v;
}

/* Of the tokens from `first` to `last`; the lowest of equal ones. */
static choice highest(const float *logits, int32_t first, int32_t last) {
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats top = all(-__builtin_inff());
    ints where = (ints){0} + first, place = where + lanes;
    for (int32_t i = first; i < last; i += LANES, place += LANES) {
        floats v = load_some(logits + i, last - i);
        ints above = v > top;
        top = choose(above, v, top);
        where = (place & above) | (where & ~above);
    }
    choice found = {top[0], 0, where[0]};
    for (int lane = 1; lane < LANES; ++lane)
        if (top[lane] > found.logit || (top[lane] == found.logit && where[lane] < found.token)) {
            found.logit = top[lane];
            found.token = where[lane];
        }
    return found;
}

/* The same with the sum, into which a NaN among the logits goes. */
static choice likeliest(const float *logits, int32_t first, int32_t last) {
    choice found = highest(logits, first, last);
    floats total = {0};
    /* Tokens that all cannot be: -inf less -inf would be NaN, and an error. */
    const float base = found.logit == -__builtin_inff() ? 0 : found.logit;
    for (int32_t i = first; i < last; i += LANES) total += exponential(load_some(logits + i, last - i) - base);
    found.total = sum(total);
    return found;
}

INLINE int64_t pieces(const network *net) { return (net->head.rows + PIECE - 1) / PIECE; }

INLINE choice best_of(const choice *parts, int64_t count) {
    choice best = parts[0];
    for (int64_t i = 1; i < count; ++i) best = parts[i].logit > best.logit ? parts[i] : best;
    return best;
}

/* --- the head by halves ------------------------------------------------------------------------------------------- */

/* A head of int8 by rows is a fourth to two fifths of what a step reads, and almost none of its rows can be the next
   token. So its codes are kept in halves: the upper four bits of all rows are read, and the lower four of those whose
   logit may reach the best one's. A code is 16 times its upper half, less 128, and its lower half, 7.5 in the mean: what
   that adds to a logit has a standard deviation of 4.61 times the root of the sum of squares of the activations, where
   it does not depend on them. Logits that are within DOUBT of these of the best are computed in full: by Hoeffding's
   inequality one beyond is the highest in less than 10^-15 of steps. Whether lower halves add no more is looked at for
   all that are computed; where one adds half of DOUBT, all of that token's are. The others keep the logit that is to be
   expected, which changes the sum of all probabilities a little. */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

INLINE __m512i nibble_sums(const uint8_t *codes, const int16_t *x) {
    __m512i both = _mm512_loadu_si512(codes), mask = _mm512_set1_epi8(15);
    return nibble_products(_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask), x);
}

/* The logit of one row for one token, as `few_tokens` adds it up from whole codes. */
static float whole_logit(const network *net, int64_t row, const quantised *q, int64_t token) {
    const int64_t columns = net->head.columns, begin = row * columns / 2;
    float out = 0;
    for (int64_t g = 0; g < columns / SPAN; ++g) {
        const int64_t place = g * q->tokens + token, at = begin + g * SPAN / 2;
        __m512i upper = nibble_sums(net->coarse.codes + at, q->codes + place * SPAN);
        __m512i total = _mm512_add_epi32(_mm512_slli_epi32(upper, 4), nibble_sums(net->fine + at, q->codes + place * SPAN));
        int32_t sum_ = _mm512_reduce_add_epi32(total) - 128 * q->sums[place];
        out += (float)sum_ * (net->head.scales[row] * q->scales[place]);
    }
    return out;
}

static void expect(rest *rest, const float *x, int64_t size) {
    floats squares = {0}, total = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        squares += load(x + i) * load(x + i);
        total += load(x + i);
    }
    rest->expected = 7.5f * sum(total);
    rest->most = DOUBT * 4.61f * __builtin_sqrtf(sum(squares));
    atomic_store(&rest->doubted, 0);
}

/* The most that is believed of a row's lower halves. A damaged folder's scales may be negative. */
INLINE float most_of(const team *team, int64_t token, int64_t row) {
    return __builtin_fabsf(team->net->head.scales[row]) * team->rests[token].most;
}

/* A row's whole logit, compared with what was guessed. */
static float right_logit(team *team, const quantised *q, int64_t token, int64_t row, float guessed) {
    const float right = whole_logit(team->net, row, q, token);
    if (!(__builtin_fabsf(right - guessed) <= most_of(team, token, row) / 2))
        atomic_store(&team->rests[token].doubted, 1);
    return right;
}

/* Computes the logits of one token that may reach `best`, or are no numbers. */
static void put_right(team *team, const quantised *q, int64_t token, float best, int64_t first, int64_t last,
                      float *logits) {
    for (int64_t row = first; row < last; row += LANES) {
        const int64_t end = clamp(row + LANES, last);
        int found = 0;
        for (int64_t i = row; i < end; ++i) found |= !(logits[i] + most_of(team, token, i) < best);
        for (int64_t i = row; found && i < end; ++i)
            if (!(logits[i] + most_of(team, token, i) < best)) logits[i] = right_logit(team, q, token, i, logits[i]);
    }
}

/* The logits of a few tokens from their upper halves, with what is to be expected of the lower ones; and the likeliest
   token of each piece by these. */
static void guess(team *team, const quantised *q, float *logits) {
    const int64_t each = pieces(team->net), vocab = team->net->head.rows;
    int64_t first, count;
    product(team, &team->net->coarse, q, logits, 0);
    while ((count = take(team, q->tokens * each, &first)))
        for (int64_t item = first; item < first + count; ++item) {
            float *own = logits + item / each * vocab;
            const int64_t begin = item % each * PIECE, end = clamp(begin + PIECE, vocab);
            for (int64_t i = begin; i < end; ++i) own[i] += team->net->head.scales[i] * team->rests[item / each].expected;
            team->choices[item] = highest(own, (int32_t)begin, (int32_t)end);
        }
    meet(team);
}

/* The logits of a few tokens, whose last hidden states are x. */
static void by_halves(team *team, int64_t thread, const float *x, int64_t tokens, float *logits) {
    const network *net = team->net;
    const int64_t each = pieces(net), vocab = net->head.rows;
    const quantised q = {team->q.codes, team->q.sums, team->q.scales, tokens};
    float *normed = team->scratch + thread * team->own;
    int64_t first, count;
    while ((count = take(team, tokens, &first)))
        for (int64_t t = first; t < first + count; ++t) {
            rms_norm(normed, x + t * net->hidden, net->norm, net->hidden, net->eps);
            quantise(&q, t, normed, &net->coarse);
            expect(team->rests + t, normed, net->hidden);
        }
    meet(team);
    guess(team, &q, logits);
    while ((count = take(team, tokens * each, &first)))
        for (int64_t item = first; item < first + count; ++item) {
            const int64_t t = item / each, begin = item % each * PIECE;
            const choice top = best_of(team->choices + t * each, each);
            const float best = right_logit(team, &q, t, top.token, top.logit);
            put_right(team, &q, t, best, begin, clamp(begin + PIECE, vocab), logits + t * vocab);
        }
    meet(team);
    while ((count = take(team, tokens * each, &first)))
        for (int64_t item = first; item < first + count; ++item) {
            const int64_t t = item / each, begin = item % each * PIECE, end = clamp(begin + PIECE, vocab);
            for (int64_t row = begin; atomic_load(&team->rests[t].doubted) && row < end; ++row)
                logits[t * vocab + row] = whole_logit(net, row, &q, t);
        }
    meet(team);
}

#endif

/* Takes codes apart, two halves of neighbours in a byte. Returns 1 where this processor does not read them so. */
int quasr_halves(const int8_t *codes, int64_t count, uint8_t *upper, uint8_t *lower) {
    if (!FEW) return 1;
    for (int64_t i = 0; i < count / 2; ++i) {
        const uint8_t low = (uint8_t)(codes[2 * i] + 128), high = (uint8_t)(codes[2 * i + 1] + 128);
        upper[i] = (uint8_t)(low >> 4 | (high & 0xF0));
        lower[i] = (uint8_t)((low & 15) | high << 4);
    }
    return 0;
}

/* --- all layers ---------------------------------------------------------------------------------------------------- */

/* `tokens` tokens from `begin` on through all layers. Behind the last attention only those go on that are wanted. */
static void block(team *team, int64_t thread, int64_t begin, int64_t tokens, const int32_t *wanted, int64_t outputs,
                  float *logits) {
    const network *net = team->net;
    const request *asked = team->asked;
    quantised q = {team->q.codes, team->q.sums, team->q.scales, tokens};
    if (thread == 0) memcpy(team->x, asked->embeddings + begin * net->hidden, sizeof(float) * tokens * net->hidden);
    meet(team);
    for (int64_t index = 0; index < net->layers; ++index) {
        const layer *layer = net->layer + index;
        const int last = index == net->layers - 1;
        normalise(team, thread, layer->input_norm, &layer->qkv, &q);
        product(team, &layer->qkv, &q, team->wide, 0);
        write_heads(team, index, begin, tokens);
        if (last && outputs == 0) return;
        if (last && thread == 0)
            for (int64_t n = 0; n < outputs; ++n)
                memmove(team->x + n * net->hidden, team->x + (wanted[n] - begin) * net->hidden,
                        sizeof(float) * net->hidden);
        if (last) q.tokens = outputs;
        attention(team, thread, &(scope){team, index, begin, q.tokens, last ? wanted : NULL});
        after_attention(team, thread, layer, &q);
    }
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    if (net->coarse.codes) {
        for (int64_t n = 0; n < outputs; n += FEW)
            by_halves(team, thread, team->x + n * net->hidden, clamp(outputs - n, FEW), logits + n * net->head.rows);
        return;
    }
#endif
    normalise(team, thread, net->norm, &net->head, &q);
    product(team, &net->head, &q, logits, 0);
}

/* The pieces are the same for any number of threads, and so are the sums. */
static void choose_tokens(team *team, int64_t thread) {
    const request *asked = team->asked;
    const int64_t vocab = team->net->head.rows, each = pieces(team->net);
    int64_t first, count;
    while ((count = take(team, asked->outputs * each, &first)))
        for (int64_t item = first; item < first + count; ++item) {
            int64_t begin = item % each * PIECE;
            team->choices[item] = likeliest(asked->logits + item / each * vocab, (int32_t)begin,
                                            (int32_t)clamp(begin + PIECE, vocab));
        }
    meet(team);
    for (int64_t n = thread; n < asked->outputs; n += team->threads) {
        const choice *parts = team->choices + n * each;
        const choice best = best_of(parts, each);
        float total = 0;
        for (int64_t i = 0; i < each; ++i) total += parts[i].total * exponential(all(parts[i].logit - best.logit))[0];
        asked->likeliest[n] = best.token;
        asked->totals[n] = total;
    }
}

static void run(team *team, int64_t thread) {
    const request *asked = team->asked;
    const int64_t blocks = (asked->tokens + BLOCK - 1) / BLOCK;
    int64_t done = 0;
    for (int64_t n = 0; n < blocks; ++n) {
        int64_t begin = asked->tokens * n / blocks, end = asked->tokens * (n + 1) / blocks, outputs = 0;
        while (done + outputs < asked->outputs && asked->wanted[done + outputs] < end) ++outputs;
        block(team, thread, begin, end - begin, asked->wanted + done, outputs, asked->logits + done * team->net->head.rows);
        done += outputs;
    }
    choose_tokens(team, thread);
}

typedef struct {
    team *team;
    int64_t thread;
    pthread_t handle;
} helper;

static void *help(void *argument) {
    helper *helper = argument;
    for (int spins = 0; !atomic_load_explicit(&helper->team->go, memory_order_acquire); ++spins) relax(spins);
    run(helper->team, helper->thread);
    return NULL;
}

INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

/* Gives the team its memory out of one piece, if there is one; returns how many bytes it takes. */
static size_t lay_out(team *team, char *memory, int64_t tokens, int64_t threads) {
    const network *net = team->net;
    const int64_t queries = net->heads * net->head_dim, hidden = net->hidden;
    const int64_t columns = greater(greater(hidden, queries), net->ffn);
    const struct { void **to; int64_t size; } parts[] = {
        {(void **)&team->x, tokens * hidden * 4},
        {(void **)&team->wide, tokens * greater(queries + 2 * net->kv_heads * net->head_dim, 2 * net->ffn) * 4},
        {(void **)&team->attended, tokens * queries * 4},
        {(void **)&team->q.codes, tokens * columns * 2},
        {(void **)&team->q.sums, tokens * columns / CODES * 4},
        {(void **)&team->q.scales, tokens * columns / CODES * 4},
        {(void **)&team->scratch, threads * team->own * 4},
        {(void **)&team->choices, team->asked->outputs * pieces(net) * (int64_t)sizeof(choice)},
        {(void **)&team->rests, FEW * (int64_t)sizeof(rest)},
    };
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; ++i) {
        *parts[i].to = memory ? memory + bytes : NULL;
        bytes += (size_t)(parts[i].size + LINE - 1) / LINE * LINE;
    }
    return bytes;
}

/* Runs the tokens through the network on up to `threads` threads. Returns 0, or 1 where memory has run out. */
int quasr_decode(const network *net, const cache *kv, const request *asked, int64_t threads) {
    team team = {.net = net, .kv = kv, .asked = asked, .threads = 1};
    team.own = greater(greater(net->hidden, 2 * kv->capacity), LINE);
    const int64_t tokens = clamp(asked->tokens, BLOCK);
    char *memory = aligned_alloc(LINE, lay_out(&team, NULL, tokens, threads));
    helper *helpers = calloc((size_t)threads, sizeof *helpers);
    const int failed = !memory || !helpers;
    if (!failed) {
        lay_out(&team, memory, tokens, threads);
        for (int64_t n = 1; n < threads; ++n) {
            helpers[n].team = &team;
            helpers[n].thread = n;
            if (pthread_create(&helpers[n].handle, NULL, help, helpers + n)) break;
            team.threads = n + 1;
        }
        atomic_store_explicit(&team.go, 1, memory_order_release);
        run(&team, 0);
        for (int64_t n = 1; n < team.threads; ++n) pthread_join(helpers[n].handle, NULL);
    }
    free(helpers);
    free(memory);
    return failed;
}

/* Reads memory as a step reads weights, for quasr.bench.reading: its 32-bit words added up, sixteen streams at a time. */
uint32_t quasr_read(const uint8_t *memory, int64_t size) {
    const int64_t share = size / LANES / LINE * LINE;
    words total = {0};
    for (int64_t byte = 0; byte < share; byte += LINE)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            words line;
            memcpy(&line, memory + lane * share + byte, sizeof line);
            ask(memory + lane * share + byte + AHEAD);
            total += line;
        }
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found += total[lane];
    return found;
}

/* Bytes of a number of the cache: 2 where the processor turns halves into floats, else 4. */
int quasr_stored_bytes(void) { return (int)sizeof(stored); }
