// softmax(q k^T * scale) v of bfloat16, for processors with AVX512-BF16 and without AMX.
//
// Tiles of scores stay in cache, and each row's greatest score and sum so far are corrected as they
// grow (Dao et al. 2022, "FlashAttention", algorithm 1). Products are of pairs of bfloat16, added
// up in float32: keys are packed with their channels in pairs, values with their keys in pairs.
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 6, QUERIES = 48, KEYS = 512, LANES = 16, WIDE = 4, PANEL = LANES * WIDE };

typedef uint16_t bf16;
typedef struct {
    const bf16 *q, *k, *v;
    bf16 *out;
    // strides in numbers, of pictures, heads and rows; the last dimension is contiguous
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
    int64_t pictures, heads, n, m, c;
    float scale;
    int64_t threads;
} Work;

typedef struct {
    const Work *work;
    // packed: of each head panels of c/2 rows of PANEL keys, and padded/2 rows of `wide` values
    uint32_t *keys, *values;
    int64_t padded, wide, next;
    int failed;
} Shared;

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static const bf16 *head_of(const bf16 *x, const int64_t *strides, int64_t heads, int64_t head) {
    return x + head / heads * strides[0] + head % heads * strides[1];
}

static void pack(const Shared *s, int64_t head) {
    const Work *w = s->work;
    const bf16 *k = head_of(w->k, w->k_strides, w->heads, head);
    const bf16 *v = head_of(w->v, w->v_strides, w->heads, head);
    uint32_t *keys = s->keys + head * w->c / 2 * s->padded;
    uint32_t *values = s->values + head * s->padded / 2 * s->wide;
    for (int64_t j = 0; j < w->m; j++)
        for (int64_t c = 0; c < w->c / 2; c++)
            memcpy(keys + (j / PANEL * w->c / 2 + c) * PANEL + j % PANEL,
                   k + j * w->k_strides[2] + 2 * c, 4);
    for (int64_t j = 0; j < w->m; j++)
        for (int64_t c = 0; c < w->c; c++)
            ((bf16 *)(values + j / 2 * s->wide + c))[j % 2] = v[j * w->v_strides[2] + c];
}

// out[r][16 v ...] = start + sum over p of the pairs a[r][p] and b[p][16 v ...]
static inline __attribute__((always_inline)) void product(
    const uint32_t *a, int64_t a_row, const uint32_t *b, int64_t b_row, int64_t pairs,
    float *out, int64_t out_row, int vectors, int add) {
    __m512 sum[ROWS][WIDE];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(out + r * out_row + LANES * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh row[WIDE];
        for (int v = 0; v < vectors; v++)
            row[v] = (__m512bh)_mm512_loadu_si512(b + p * b_row + LANES * v);
        for (int r = 0; r < ROWS; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(a[r * a_row + p]);
            for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, row[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(out + r * out_row + LANES * v, sum[r][v]);
}

// The same for any width; b is a panel after the other, `panel` apart.
static void columns(const uint32_t *a, int64_t a_row, const uint32_t *b, int64_t b_row,
                    int64_t panel, int64_t pairs, float *out, int64_t out_row, int64_t width,
                    int add) {
    for (int64_t x = 0; x < width; x += PANEL, b += panel) {
        int64_t left = (width - x) / LANES;
        if (left >= 4) product(a, a_row, b, b_row, pairs, out + x, out_row, 4, add);
        else if (left == 3) product(a, a_row, b, b_row, pairs, out + x, out_row, 3, add);
        else if (left == 2) product(a, a_row, b, b_row, pairs, out + x, out_row, 2, add);
        else product(a, a_row, b, b_row, pairs, out + x, out_row, 1, add);
    }
}

static inline __m512 exp2_of(__m512 x) {  // of numbers up to 0; to 2e-6
    x = _mm512_max_ps(_mm512_set1_ps(-126), x);  // in this order, what is not a number stays so
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(1.3333558e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1));
    return _mm512_scalef_ps(y, whole);
}

typedef struct {
    float scores[QUERIES * KEYS], greatest[QUERIES], sums[QUERIES];
    bf16 weights[QUERIES * KEYS];
} Tile;

// Queries of a head from `first` on; there is room for QUERIES of them in `out` and `query`.
static void attend(const Shared *s, int64_t head, int64_t first, Tile *t, float *out, bf16 *query) {
    const Work *w = s->work;
    const bf16 *q = head_of(w->q, w->q_strides, w->heads, head) + first * w->q_strides[2];
    int64_t count = w->n - first < QUERIES ? w->n - first : QUERIES, rows = up(count, ROWS);
    memset(query, 0, sizeof(bf16) * QUERIES * w->c);
    for (int64_t i = 0; i < count; i++)
        memcpy(query + i * w->c, q + i * w->q_strides[2], sizeof(bf16) * w->c);
    memset(out, 0, sizeof(float) * QUERIES * s->wide);
    for (int i = 0; i < QUERIES; i++) t->greatest[i] = -INFINITY, t->sums[i] = 0;
    const uint32_t *keys = s->keys + head * w->c / 2 * s->padded;
    const uint32_t *values = s->values + head * s->padded / 2 * s->wide;
    const __m512 scale = _mm512_set1_ps(w->scale * 1.44269504f);  // to powers of two
    for (int64_t j = 0; j < w->m; j += KEYS) {
        int64_t real = w->m - j < KEYS ? w->m - j : KEYS, block = up(real, 2 * LANES);
        for (int64_t i = 0; i < rows; i += ROWS)
            columns((uint32_t *)query + i * w->c / 2, w->c / 2, keys + j * w->c / 2, PANEL,
                    PANEL * w->c / 2, w->c / 2, t->scores + i * KEYS, KEYS, block, 0);
        for (int64_t i = 0; i < rows; i++) {
            float *row = t->scores + i * KEYS;
            __m512 high = _mm512_set1_ps(-INFINITY);
            for (int64_t x = real; x < block; x++) row[x] = -INFINITY;
            for (int64_t x = 0; x < block; x += LANES) {
                __m512 y = _mm512_mul_ps(_mm512_loadu_ps(row + x), scale);
                _mm512_storeu_ps(row + x, y);
                high = _mm512_max_ps(y, high);
            }
            float before = t->greatest[i], now = _mm512_reduce_max_ps(high);
            now = now > before ? now : before;
            __m512 most = _mm512_set1_ps(now), sum = _mm512_setzero_ps();
            for (int64_t x = 0; x < block; x += LANES) {
                __m512 y = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(row + x), most));
                if (x + LANES > real) {
                    __mmask16 inside = real > x ? (1u << (real - x)) - 1 : 0;
                    y = _mm512_maskz_mov_ps(inside, y);
                }
                sum = _mm512_add_ps(sum, y);
                _mm256_storeu_si256((__m256i *)(t->weights + i * KEYS + x),
                                    (__m256i)_mm512_cvtneps_pbh(y));
            }
            float shrink = before == -INFINITY ? 0 : exp2f(before - now);
            t->sums[i] = t->sums[i] * shrink + _mm512_reduce_add_ps(sum);
            t->greatest[i] = now;
            if (shrink != 1)
                for (int64_t x = 0; x < s->wide; x += LANES)
                    _mm512_storeu_ps(out + i * s->wide + x,
                                     _mm512_mul_ps(_mm512_loadu_ps(out + i * s->wide + x),
                                                   _mm512_set1_ps(shrink)));
        }
        for (int64_t i = 0; i < rows; i += ROWS)
            columns((uint32_t *)(t->weights + i * KEYS), KEYS / 2, values + j / 2 * s->wide,
                    s->wide, PANEL, block / 2, out + i * s->wide, s->wide, s->wide, 1);
    }
    bf16 *to = w->out + head / w->heads * w->out_strides[0] + head % w->heads * w->out_strides[1];
    for (int64_t i = 0; i < count; i++) {
        __m512 factor = _mm512_set1_ps(1 / t->sums[i]);
        for (int64_t x = 0; x < w->c; x += LANES) {
            __mmask16 inside = w->c - x >= LANES ? 0xffff : (1u << (w->c - x)) - 1;
            __m512 y = _mm512_mul_ps(_mm512_loadu_ps(out + i * s->wide + x), factor);
            _mm256_mask_storeu_epi16(to + (first + i) * w->out_strides[2] + x, inside,
                                     (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

static int64_t next(Shared *s) { return __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED); }

static void *packer(void *arg) {
    Shared *s = arg;
    int64_t count = s->work->pictures * s->work->heads;
    for (int64_t i; (i = next(s)) < count;) pack(s, i);
    return NULL;
}

static void *attender(void *arg) {
    Shared *s = arg;
    const Work *w = s->work;
    int64_t blocks = (w->n + QUERIES - 1) / QUERIES, count = w->pictures * w->heads * blocks;
    Tile *t = malloc(sizeof(Tile));
    float *out = malloc(sizeof(float) * QUERIES * s->wide);
    bf16 *query = malloc(sizeof(bf16) * QUERIES * w->c);
    if (!t || !out || !query) s->failed = 1;
    else
        for (int64_t i; (i = next(s)) < count;)
            attend(s, i / blocks, i % blocks * QUERIES, t, out, query);
    free(t), free(out), free(query);
    return NULL;
}

static void run(Shared *s, void *(*part)(void *)) {
    int64_t others = s->work->threads - 1, started = 0;
    pthread_t threads[others > 0 ? others : 1];
    s->next = 0;
    while (started < others && !pthread_create(threads + started, NULL, part, s)) started++;
    part(s);
    while (started) pthread_join(threads[--started], NULL);
}

// Gives 0, or 1 for want of memory.
int attention(const Work *w) {
    Shared s = {.work = w, .padded = up(w->m, PANEL), .wide = up(w->c, LANES)};
    int64_t heads = w->pictures * w->heads;
    s.keys = calloc(heads * w->c / 2 * s.padded, 4);
    s.values = calloc(heads * s.padded / 2 * s.wide, 4);
    if (s.keys && s.values) run(&s, packer), run(&s, attender);
    else s.failed = 1;
    free(s.keys), free(s.values);
    return s.failed;
}
