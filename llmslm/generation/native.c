/* One decode step on the CPU as a list of operations, walked by all threads of one parallel region.
 *
 * Threads claim pieces of an operation and go on once all pieces are done, whoever did them. They do not wait for each
 * other as at a barrier: where other programs want the cores too, a thread that lost its core would hold up all others
 * at each of a step's operations.
 *
 * At a few rows a step is bound by the bytes of the weights, so products stream each weight once, four rows of it at a
 * time, past all inputs. Activations are float; weights and caches are float or bfloat16, weights also 8 bits with a
 * scale for each row. Vectors of 16 are GCC's and Clang's own type, which any instruction set is good for.
 */

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int16_t v16s __attribute__((vector_size(32)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16w __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32), aligned(2)));
typedef int8_t v16b __attribute__((vector_size(16), aligned(1)));
#define INLINE static inline __attribute__((always_inline))

enum { SHARES = 8, SPINS = 2000 }; /* of an operation, for each thread; before a thread that waits gives way */
enum { EMBED, NORM, LINEAR, SELF_ATTENTION, CROSS_ATTENTION };
enum { FLOAT, BFLOAT16, INT8 };
enum { NONE, RELU, SILU, GELU, GELU_TANH };

/* Mirrored by `Op` in native.py. Pointers that an operation does not use are null. */
typedef struct {
  int64_t kind, dtype, rows, columns, activation, gated, heads, kv_heads, head_dim, capacity, distances, offset;
  double eps, scale, k_eps;
  const float *in;
  float *out;
  const void *weight, *table;
  const float *row_scale, *bias, *residual, *norm, *k_norm, *cos, *sin, *distance_bias;
  void *keys, *values;
  const uint8_t *valid;
  const int64_t *token, *position;
} Op;

INLINE float bfloat16_value(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE v16 load_float(const float *p) { return *(const v16u *)p; }
INLINE v16 load_bfloat16(const uint16_t *p) {
  v16w bits = __builtin_convertvector(*(const v16h *)p, v16w) << 16;
  return (v16)bits;
}
INLINE v16 load_int8(const int8_t *p) {
#ifdef __AVX512F__
  return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(*(const __m128i_u *)p));
#else
  v16s wide = __builtin_convertvector(*(const v16b *)p, v16s); /* step by step, or GCC 12 goes value by value */
  return __builtin_convertvector(__builtin_convertvector(wide, v16i), v16);
#endif
}
INLINE float one_float(const float *p) { return *p; }
INLINE float one_bfloat16(const uint16_t *p) { return bfloat16_value(*p); }
INLINE float one_int8(const int8_t *p) { return *p; }

INLINE float sum(v16 v) {
  v8 eight[2];
  v4 four[2];
  memcpy(eight, &v, sizeof v);
  eight[0] += eight[1];
  memcpy(four, eight, sizeof four);
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

/* exp to 2 units in the last place: 2^n times a polynomial. */
INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float n = (float)(int)(x * 1.442695041f + (x < 0 ? -0.5f : 0.5f));
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

INLINE float activated(float x, int64_t kind) {
  switch (kind) {
    case RELU: return x > 0 ? x : 0;
    case SILU: return x / (1 + exponential(-x));
    case GELU: return 0.5f * x * (1 + erff(x * 0.7071067811865476f));
    case GELU_TANH: return x / (1 + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    default: return x;
  }
}

/* Products of R rows of weights with M rows of inputs; R and M are constants wherever this is used. */
#define TILE(NAME, T, LOAD, ONE)                                                                        \
  INLINE void NAME##_tile(const T *w, int64_t stride, int64_t K, const float *x, int R, int M, float *out) { \
    v16 acc[4][4];                                                                                      \
    for (int r = 0; r < R; r++)                                                                         \
      for (int m = 0; m < M; m++) acc[r][m] = (v16){0};                                                 \
    int64_t k = 0;                                                                                      \
    for (; k + 16 <= K; k += 16) {                                                                      \
      v16 xs[4];                                                                                        \
      for (int m = 0; m < M; m++) xs[m] = load_float(x + m * K + k);                                    \
      for (int r = 0; r < R; r++) {                                                                     \
        v16 ws = LOAD(w + r * stride + k);                                                              \
        __builtin_prefetch(w + (R + r) * stride + k);                                                   \
        for (int m = 0; m < M; m++) acc[r][m] += ws * xs[m];                                            \
      }                                                                                                 \
    }                                                                                                   \
    for (int r = 0; r < R; r++)                                                                         \
      for (int m = 0; m < M; m++) {                                                                     \
        float s = sum(acc[r][m]);                                                                       \
        for (int64_t t = k; t < K; t++) s += ONE(w + r * stride + t) * x[m * K + t];                    \
        out[r * 4 + m] = s;                                                                             \
      }                                                                                                 \
  }                                                                                                     \
  INLINE float NAME##_row(const T *w, int64_t K, const float *x) {                                       \
    v16 acc[4] = {{0}};                                                                                 \
    int64_t k = 0;                                                                                      \
    for (; k + 64 <= K; k += 64)                                                                        \
      for (int i = 0; i < 4; i++) acc[i] += LOAD(w + k + 16 * i) * load_float(x + k + 16 * i);           \
    for (; k + 16 <= K; k += 16) acc[0] += LOAD(w + k) * load_float(x + k);                             \
    float s = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));                                               \
    for (; k < K; k++) s += ONE(w + k) * x[k];                                                          \
    return s;                                                                                           \
  }                                                                                                     \
  static void NAME##_products(const void *weight, int64_t row, int R, int64_t K, const float *x, int M, float *out) { \
    const T *w = (const T *)weight + row * K;                                                           \
    if (R == 4) {                                                                                       \
      switch (M) {                                                                                      \
        case 1:                                                                                         \
          for (int r = 0; r < 4; r++) out[r * 4] = NAME##_row(w + r * K, K, x);                         \
          return;                                                                                       \
        case 2: NAME##_tile(w, K, K, x, 4, 2, out); return;                                             \
        case 3: NAME##_tile(w, K, K, x, 4, 3, out); return;                                             \
        default: NAME##_tile(w, K, K, x, 4, 4, out); return;                                            \
      }                                                                                                 \
    }                                                                                                   \
    for (int r = 0; r < R; r++)                                                                         \
      for (int m = 0; m < M; m++) {                                                                     \
        float one[4];                                                                                   \
        NAME##_tile(w + r * K, K, K, x + m * K, 1, 1, one);                                             \
        out[r * 4 + m] = one[0];                                                                        \
      }                                                                                                 \
  }

TILE(float, float, load_float, one_float)
TILE(bfloat16, uint16_t, load_bfloat16, one_bfloat16)
TILE(int8, int8_t, load_int8, one_int8)

static void products(const Op *op, int64_t row, int R, const float *x, int M, float *out) {
  int64_t K = op->columns;
  if (op->dtype == FLOAT) float_products(op->weight, row, R, K, x, M, out);
  else if (op->dtype == BFLOAT16) bfloat16_products(op->weight, row, R, K, x, M, out);
  else int8_products(op->weight, row, R, K, x, M, out);
  if (!op->row_scale && !op->bias) return;
  for (int r = 0; r < R; r++) {
    float scale = op->row_scale ? op->row_scale[row + r] : 1, bias = op->bias ? op->bias[row + r] : 0;
    for (int m = 0; m < M; m++) out[r * 4 + m] = out[r * 4 + m] * scale + bias;
  }
}

/* Tiles of 4 outputs. */
static void linear(const Op *op, int64_t batch, int64_t first, int64_t last) {
  int64_t N = op->rows;
  for (int64_t tile = first; tile < last; tile++) {
    int64_t row = tile * 4;
    int R = N - row < 4 ? (int)(N - row) : 4;
    for (int64_t at = 0; at < batch; at += 4) {
      int M = batch - at < 4 ? (int)(batch - at) : 4;
      float y[16], plain[16];
      products(op, row, R, op->in + at * op->columns, M, y);
      if (op->gated) products(op, N + row, R, op->in + at * op->columns, M, plain);
      for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
          int64_t place = (at + m) * N + row + r;
          float value = activated(y[r * 4 + m], op->activation);
          if (op->gated) value *= plain[r * 4 + m];
          op->out[place] = op->residual ? op->residual[place] + value : value;
        }
    }
  }
}

static void embed(const Op *op, int64_t first, int64_t last) {
  int64_t width = op->columns;
  for (int64_t b = first; b < last; b++)
    for (int64_t k = 0; k < width; k++) {
      int64_t at = op->token[b] * width + k, place = (op->position[b] + op->offset) * width + k;
      int half = op->dtype == BFLOAT16;
      float x = half ? bfloat16_value(((const uint16_t *)op->weight)[at]) : ((const float *)op->weight)[at];
      x *= (float)op->scale;
      if (op->table) x += half ? bfloat16_value(((const uint16_t *)op->table)[place]) : ((const float *)op->table)[place];
      op->out[b * width + k] = x;
    }
}

/* Layer norm where a bias or `offset` says so, else RMS norm. */
static void norm(const Op *op, int64_t first, int64_t last) {
  int64_t K = op->columns;
  for (int64_t b = first; b < last; b++) {
    const float *x = op->in + b * K;
    float *y = op->out + b * K, mean = 0, square = 0;
    if (op->offset) {
#pragma omp simd reduction(+ : mean)
      for (int64_t k = 0; k < K; k++) mean += x[k];
      mean /= K;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < K; k++) square += (x[k] - mean) * (x[k] - mean);
    float factor = 1 / sqrtf(square / K + (float)op->eps), scale = (float)op->scale;
    for (int64_t k = 0; k < K; k++) {
      float value = (x[k] - mean) * factor * op->norm[k];
      y[k] = (op->bias ? value + op->bias[k] : value) * scale;
    }
  }
}

/* RMS norm of a head and its rotation, in place. */
static void prepare_head(const Op *op, float *x, const float *weight, double eps, int64_t position) {
  int64_t D = op->head_dim, half = D / 2;
  if (weight) {
    float square = 0;
    for (int64_t d = 0; d < D; d++) square += x[d] * x[d];
    float factor = 1 / sqrtf(square / D + (float)eps);
    for (int64_t d = 0; d < D; d++) x[d] *= factor * weight[d];
  }
  if (op->cos) {
    const float *cos = op->cos + position * D, *sin = op->sin + position * D;
    for (int64_t d = 0; d < half; d++) {
      float first = x[d], second = x[half + d];
      x[d] = first * cos[d] - second * sin[d];
      x[half + d] = second * cos[half + d] + first * sin[half + d];
    }
  }
}

/* Attention of one query over `length` positions; `distance` has the bias of the last one, then backwards. */
#define ATTEND(NAME, T, LOAD, ONE)                                                                               \
  static void NAME##_attend(const float *q, const T *keys, const T *values, const uint8_t *valid, int64_t length, \
                            int64_t D, float scale, const float *bias, int64_t distances, float *weight, float *y) { \
    float largest = -INFINITY, total = 0;                                                                        \
    for (int64_t l = 0; l < length; l++) {                                                                       \
      if (!valid[l]) { weight[l] = -INFINITY; continue; }                                                        \
      const T *key = keys + l * D;                                                                               \
      v16 acc = {0};                                                                                             \
      int64_t d = 0;                                                                                             \
      for (; d + 16 <= D; d += 16) acc += LOAD(key + d) * load_float(q + d);                                     \
      float s = sum(acc);                                                                                        \
      for (; d < D; d++) s += ONE(key + d) * q[d];                                                               \
      s *= scale;                                                                                                \
      int64_t behind = length - 1 - l;                                                                           \
      if (bias) s += bias[behind < distances ? behind : distances - 1];                                          \
      weight[l] = s;                                                                                             \
      largest = s > largest ? s : largest;                                                                       \
    }                                                                                                            \
    for (int64_t l = 0; l < length; l++) {                                                                       \
      weight[l] = weight[l] == -INFINITY ? 0 : exponential(weight[l] - largest);                                 \
      total += weight[l];                                                                                        \
    }                                                                                                            \
    for (int64_t d = 0; d < D; d++) y[d] = 0;                                                                    \
    for (int64_t l = 0; l < length; l++) {                                                                       \
      if (weight[l] == 0) continue;                                                                              \
      const T *value = values + l * D;                                                                           \
      int64_t d = 0;                                                                                             \
      for (; d + 16 <= D; d += 16) *(v16u *)(y + d) += LOAD(value + d) * weight[l];                              \
      for (; d < D; d++) y[d] += ONE(value + d) * weight[l];                                                     \
    }                                                                                                            \
    for (int64_t d = 0; d < D; d++) y[d] /= total;                                                               \
  }

ATTEND(float, float, load_float, one_float)
ATTEND(bfloat16, uint16_t, load_bfloat16, one_bfloat16)

static void attend(const Op *op, const float *q, int64_t head, int64_t row, int64_t length, float *scratch, float *y) {
  int64_t D = op->head_dim, start = row * op->capacity * D, b = row / op->kv_heads;
  const float *bias = op->distance_bias ? op->distance_bias + head * op->distances : 0;
  const uint8_t *valid = op->valid + b * op->capacity;
  if (op->dtype == FLOAT)
    float_attend(q, (float *)op->keys + start, (float *)op->values + start, valid, length, D, (float)op->scale, bias,
                 op->distances, scratch, y);
  else
    bfloat16_attend(q, (uint16_t *)op->keys + start, (uint16_t *)op->values + start, valid, length, D, (float)op->scale,
                    bias, op->distances, scratch, y);
}

static void store(const Op *op, void *cache, int64_t at, const float *x) {
  int64_t D = op->head_dim;
  if (op->dtype == FLOAT) memcpy((float *)cache + at, x, D * sizeof(float));
  else
    for (int64_t d = 0; d < D; d++) ((uint16_t *)cache)[at + d] = bfloat16_bits(x[d]);
}

static void self_attention(const Op *op, int64_t filled, float *scratch, int64_t first, int64_t last) {
  int64_t D = op->head_dim, group = op->heads / op->kv_heads, width = (op->heads + 2 * op->kv_heads) * D;
  for (int64_t row = first; row < last; row++) {
    int64_t b = row / op->kv_heads, kv = row % op->kv_heads, position = op->position[b];
    float *qkv = (float *)op->in + b * width;
    float *k = qkv + (op->heads + kv) * D, *v = k + op->kv_heads * D;
    prepare_head(op, k, op->k_norm, op->k_eps, position);
    store(op, op->keys, (row * op->capacity + filled) * D, k);
    store(op, op->values, (row * op->capacity + filled) * D, v);
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
      prepare_head(op, qkv + head * D, op->norm, op->eps, position);
      attend(op, qkv + head * D, head, row, filled + 1, scratch, op->out + (b * op->heads + head) * D);
    }
  }
}

static void cross_attention(const Op *op, float *scratch, int64_t first, int64_t last) {
  int64_t D = op->head_dim;
  for (int64_t row = first; row < last; row++)
    attend(op, op->in + row * D, row % op->heads, row, op->capacity, scratch, op->out + row * D);
}

/* Pieces of one operation: the next one that nobody has, and how many are done. */
typedef struct {
  _Atomic int64_t next, done;
  char apart[112]; /* two cache lines: processors fetch pairs */
} Progress;

static int64_t pieces(const Op *op, int64_t batch) {
  switch (op->kind) {
    case LINEAR: return (op->rows + 3) / 4;
    case SELF_ATTENTION: return batch * op->kv_heads;
    case CROSS_ATTENTION: return batch * op->heads;
    default: return batch;
  }
}

static void work(const Op *op, int64_t batch, int64_t filled, float *scratch, int64_t first, int64_t last) {
  switch (op->kind) {
    case EMBED: embed(op, first, last); break;
    case NORM: norm(op, first, last); break;
    case LINEAR: linear(op, batch, first, last); break;
    case SELF_ATTENTION: self_attention(op, filled, scratch, first, last); break;
    case CROSS_ATTENTION: cross_attention(op, scratch, first, last); break;
  }
}

/* Run all operations; `scratch` holds `longest` floats for each thread. */
void run(const Op *ops, int64_t count, int64_t batch, int64_t filled, float *scratch, int64_t longest, int64_t asked) {
  Progress progress[count];
  for (int64_t i = 0; i < count; i++) {
    atomic_init(&progress[i].next, 0);
    atomic_init(&progress[i].done, 0);
  }
#pragma omp parallel num_threads((int)asked)
  {
    float *own = scratch + omp_get_thread_num() * longest;
    for (int64_t i = 0; i < count; i++) {
      int64_t all = pieces(ops + i, batch), some = all / (SHARES * omp_get_num_threads()) + 1, first;
      while ((first = atomic_fetch_add(&progress[i].next, some)) < all) {
        int64_t last = first + some < all ? first + some : all;
        work(ops + i, batch, filled, own, first, last);
        atomic_fetch_add_explicit(&progress[i].done, last - first, memory_order_release);
      }
      for (int spins = 0; atomic_load_explicit(&progress[i].done, memory_order_acquire) < all; spins++)
        if (spins > SPINS) sched_yield();
    }
  }
}

/* The first of the largest of each row's logits; the `ends` are left out where `step` is below `min_new`. */
void largest(float *logits, int64_t batch, int64_t vocabulary, const int64_t *ends, int64_t end_count,
             const int64_t *step, int64_t min_new, int64_t *token) {
  for (int64_t b = 0; b < batch; b++) {
    float *row = logits + b * vocabulary, best = -INFINITY;
    for (int64_t e = 0; e < end_count; e++)
      if (step[b] < min_new) row[ends[e]] = -INFINITY;
#pragma omp simd reduction(max : best)
    for (int64_t i = 0; i < vocabulary; i++) best = row[i] > best ? row[i] : best;
    int64_t index = 0;
    while (index < vocabulary - 1 && row[index] != best) index++;
    token[b] = index;
  }
}
