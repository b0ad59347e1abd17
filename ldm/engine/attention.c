// softmax(q k^T * scale) v of bfloat16, and its gradients, for processors with AVX512-BF16 and
// without AMX.
//
// Tiles of scores stay in cache, and each row's greatest score and sum so far are corrected as they
// grow (Dao et al. 2022, "FlashAttention", algorithm 1; backward, algorithm 4). Products are of
// pairs of bfloat16, added up in float32: what is multiplied from the right is packed beforehand,
// with its channels in pairs where the sum is over channels, and its rows where it is over rows.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "native.h"

enum { ROWS = 6, QUERIES = 48, KEYS = 384, HALF = LANES / 2, WIDE = 4, PANEL = LANES * WIDE };

typedef struct {  // pictures of heads of rows of c numbers
    bf16 *data;
    int64_t strides[3];  // in numbers; that of the last dimension is 1
} Rows;

typedef struct {
    Rows q, k, v, out;
    Rows grad, dq, dk, dv;  // of `out`, and of q, k and v
    float *lse;             // pictures heads n, log2(sum of exp(score)); or NULL: not wanted
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

static int64_t blocks_of(const Work *w) { return up(w->n, QUERIES) / QUERIES; }

static Rows head_of(Rows x, const Work *w, int64_t head) {
    x.data += head / w->heads * x.strides[0] + head % w->heads * x.strides[1];
    return x;
}

static bf16 *row_of(Rows x, int64_t row) { return x.data + row * x.strides[2]; }

// Panels of c/2 rows of PANEL columns.
static void pair_channels(Rows x, int64_t count, int64_t c, uint32_t *to) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t p = 0; p < c / 2; p++)
            memcpy(to + (j / PANEL * c / 2 + p) * PANEL + j % PANEL, row_of(x, j) + 2 * p, 4);
}

// Rows of `wide` columns, one of every two.
static void pair_rows(Rows x, int64_t count, int64_t c, int64_t wide, uint32_t *to) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < c; i++)
            ((bf16 *)(to + j / 2 * wide + i))[j % 2] = row_of(x, j)[i];
}

// out[r][16 v ...] = start + sum over p of the pairs a[r][p] and b[p][16 v ...]; `half` a vector more
static inline __attribute__((always_inline)) void product(
    const uint32_t *a, int64_t a_row, int64_t a_pair, const uint32_t *b, int64_t b_row,
    int64_t pairs, float *out, int64_t out_row, int vectors, int half, int add) {
    __m512 sum[ROWS][WIDE];
    __m256 rest[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const float *start = out + r * out_row;
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(start + LANES * v) : _mm512_setzero_ps();
        if (half) rest[r] = add ? _mm256_loadu_ps(start + LANES * vectors) : _mm256_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; p++, b += b_row) {
        __m512bh row[WIDE];
        __m256bh end;
        for (int v = 0; v < vectors; v++) row[v] = (__m512bh)_mm512_loadu_si512(b + LANES * v);
        if (half) end = (__m256bh)_mm256_loadu_si256((const __m256i *)(b + LANES * vectors));
        for (int r = 0; r < ROWS; r++) {
            __m512i pair = _mm512_set1_epi32(a[r * a_row + p * a_pair]);
            for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)pair, row[v]);
            if (half)
                rest[r] = _mm256_dpbf16_ps(rest[r], (__m256bh)_mm512_castsi512_si256(pair), end);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(out + r * out_row + LANES * v, sum[r][v]);
        if (half) _mm256_storeu_ps(out + r * out_row + LANES * vectors, rest[r]);
    }
}

// The same for any width in half vectors; b is a panel after the other, `panel` apart.
static inline __attribute__((always_inline)) void columns(
    const uint32_t *a, int64_t a_row, int64_t a_pair, const uint32_t *b, int64_t b_row,
    int64_t panel, int64_t pairs, float *out, int64_t out_row, int64_t width, int add) {
#define PRODUCT(vectors, half) \
    product(a, a_row, a_pair, b, b_row, pairs, out + x, out_row, vectors, half, add)
    for (int64_t x = 0; x < width; x += PANEL, b += panel) switch ((width - x) / HALF) {
        case 1: PRODUCT(0, 1); break;
        case 2: PRODUCT(1, 0); break;
        case 3: PRODUCT(1, 1); break;
        case 4: PRODUCT(2, 0); break;
        case 5: PRODUCT(2, 1); break;
        case 6: PRODUCT(3, 0); break;
        case 7: PRODUCT(3, 1); break;
        default: PRODUCT(4, 0);
    }
#undef PRODUCT
}

// scores[rows][KEYS] = a b^T, over channels; b from its row j, packed by `pair_channels`.
static void scores_of(const bf16 *a, int64_t rows, const uint32_t *b, int64_t j, int64_t block,
                      int64_t c, float *scores) {
    for (int64_t i = 0; i < rows; i += ROWS)
        columns((uint32_t *)a + i * c / 2, c / 2, 1, b + j * c / 2, PANEL, PANEL * c / 2, c / 2,
                scores + i * KEYS, KEYS, block, 0);
}

// out[rows][wide] += a b; a of KEYS columns, b packed by `pair_rows`.
static void add_rows(const bf16 *a, int64_t rows, const uint32_t *b, int64_t block, int64_t c,
                     int64_t wide, float *out) {
    for (int64_t i = 0; i < rows; i += ROWS)
        columns((uint32_t *)a + i * KEYS / 2, KEYS / 2, 1, b, wide, PANEL, block / 2,
                out + i * wide, wide, up(c, HALF), 1);
}

// out[rows][wide] += a^T b; both with their rows in pairs, a of KEYS columns.
static void add_columns(const uint32_t *a, int64_t rows, const uint32_t *b, int64_t pairs,
                        int64_t c, int64_t wide, float *out) {
    for (int64_t i = 0; i < rows; i += ROWS)
        columns(a + i, 1, KEYS, b, wide, PANEL, pairs, out + i * wide, wide, up(c, HALF), 1);
}

static inline __mmask16 lanes(int64_t left) {
    return left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
}

// Rows from `first` on one after the other, and zeros up to QUERIES of them.
static void copy(Rows x, int64_t first, int64_t count, int64_t c, bf16 *to) {
    for (int64_t i = 0; i < count; i++) memcpy(to + i * c, row_of(x, first + i), sizeof(bf16) * c);
    memset(to + count * c, 0, sizeof(bf16) * (QUERIES - count) * c);
}

static void store(const float *row, float factor, int64_t c, bf16 *to) {
    for (int64_t x = 0; x < c; x += LANES) {
        __m512 y = _mm512_mul_ps(_mm512_loadu_ps(row + x), _mm512_set1_ps(factor));
        _mm256_mask_storeu_epi16(to + x, lanes(c - x), (__m256i)_mm512_cvtneps_pbh(y));
    }
}

typedef struct {
    float scores[QUERIES * KEYS], greatest[QUERIES], sums[QUERIES];
    bf16 weights[QUERIES * KEYS];
} Tile;

// Queries of a head from `first` on; there is room for QUERIES of them in `out` and `query`.
static void attend(const Shared *s, int64_t head, int64_t first, Tile *t, float *out, bf16 *query) {
    const Work *w = s->work;
    Rows q = head_of(w->q, w, head), to = head_of(w->out, w, head);
    int64_t count = w->n - first < QUERIES ? w->n - first : QUERIES, rows = up(count, ROWS);
    copy(q, first, count, w->c, query);
    memset(out, 0, sizeof(float) * QUERIES * s->wide);
    for (int i = 0; i < QUERIES; i++) t->greatest[i] = -INFINITY, t->sums[i] = 0;
    const uint32_t *keys = s->keys + head * w->c / 2 * s->padded;
    const uint32_t *values = s->values + head * s->padded / 2 * s->wide;
    const float factor = w->scale * LOG2_E;
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t j = 0; j < w->m; j += KEYS) {
        int64_t real = w->m - j < KEYS ? w->m - j : KEYS, block = up(real, 2 * LANES);
        scores_of(query, rows, keys, j, block, w->c, t->scores);
        for (int64_t i = 0; i < rows; i++) {
            float *row = t->scores + i * KEYS;
            __m512 high = _mm512_set1_ps(-INFINITY);
            for (int64_t x = real; x < block; x++) row[x] = -INFINITY;
            for (int64_t x = 0; x < block; x += LANES)
                high = _mm512_max_ps(_mm512_loadu_ps(row + x), high);
            float before = t->greatest[i], now = _mm512_reduce_max_ps(high) * factor;
            now = now > before ? now : before;
            __m512 most = _mm512_set1_ps(now), sum = _mm512_setzero_ps();
            for (int64_t x = 0; x < block; x += LANES) {
                __m512 y = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(row + x), scale, most));
                sum = _mm512_add_ps(sum, y);  // beyond the last key 2^-126, which 1 does not feel
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
        add_rows(t->weights, rows, values + j / 2 * s->wide, block, w->c, s->wide, out);
    }
    for (int64_t i = 0; i < count; i++) {
        store(out + i * s->wide, 1 / t->sums[i], w->c, row_of(to, first + i));
        if (w->lse) w->lse[head * w->n + first + i] = t->greatest[i] + log2f(t->sums[i]);
    }
}

typedef struct {
    float scores[QUERIES * KEYS], dweights[QUERIES * KEYS], lse[QUERIES], delta[QUERIES];
    bf16 dscores[QUERIES * KEYS];
    uint32_t weight_pairs[QUERIES / 2 * KEYS], dscore_pairs[QUERIES / 2 * KEYS];
} BackwardTile;

// Two rows of 16 as bfloat16 in pairs.
static inline __m512i pairs_of(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// From scores and the gradients of weights to weights p = 2^(score log2(e) - lse) and the gradients
// of scores, p (dweight - delta) scale, in a block of keys of which `real` are there.
static void dscores_of(const Work *w, BackwardTile *t, int64_t rows, int64_t real, int64_t block) {
    const __m512 base = _mm512_set1_ps(w->scale * LOG2_E), scale = _mm512_set1_ps(w->scale);
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t x = 0; x < block; x += LANES) {
            __m256i weights[2], dscores[2];
            for (int r = 0; r < 2; r++) {
                int64_t at = (i + r) * KEYS + x;
                __m512 y = _mm512_fmsub_ps(_mm512_loadu_ps(t->scores + at), base,
                                           _mm512_set1_ps(t->lse[i + r]));
                y = _mm512_maskz_mov_ps(lanes(real - x), exp2_of(y));
                __m512 dscore = _mm512_sub_ps(_mm512_loadu_ps(t->dweights + at),
                                              _mm512_set1_ps(t->delta[i + r]));
                dscore = _mm512_mul_ps(_mm512_mul_ps(y, dscore), scale);
                dscore = _mm512_maskz_mov_ps(lanes(real - x), dscore);
                weights[r] = (__m256i)_mm512_cvtneps_pbh(y);
                dscores[r] = (__m256i)_mm512_cvtneps_pbh(dscore);
                _mm256_storeu_si256((__m256i *)(t->dscores + at), dscores[r]);
            }
            int64_t at = i / 2 * KEYS + x;
            _mm512_storeu_si512(t->weight_pairs + at, pairs_of(weights[0], weights[1]));
            _mm512_storeu_si512(t->dscore_pairs + at, pairs_of(dscores[0], dscores[1]));
        }
}

static float dot(const bf16 *a, const bf16 *b, int64_t c) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t x = 0; x < c; x += 2 * LANES) {
        int64_t left = c - x;
        __mmask32 inside = left >= 2 * LANES ? 0xffffffff : (1u << left) - 1;
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(inside, a + x),
                               (__m512bh)_mm512_maskz_loadu_epi16(inside, b + x));
    }
    return _mm512_reduce_add_ps(sum);
}

// What one thread needs for the gradients of a head.
typedef struct {
    uint32_t *keys, *key_rows, *values;  // packed
    float *dk, *dv;                      // padded rows of `wide` numbers
    uint32_t *query_rows, *grad_rows;    // packed
    float *dq;
    bf16 *query, *grad;
    BackwardTile *tile;
} Space;

// The gradients of q, k and v of a head.
static void attend_backward(const Shared *s, int64_t head, Space *m) {
    const Work *w = s->work;
    int64_t wide = s->wide, padded = s->padded, c = w->c;
    BackwardTile *t = m->tile;
    Rows q = head_of(w->q, w, head), k = head_of(w->k, w, head), v = head_of(w->v, w, head);
    Rows out = head_of(w->out, w, head), grad = head_of(w->grad, w, head);
    Rows dq = head_of(w->dq, w, head), dk = head_of(w->dk, w, head), dv = head_of(w->dv, w, head);
    pair_channels(k, w->m, c, m->keys);
    pair_rows(k, w->m, c, wide, m->key_rows);
    pair_channels(v, w->m, c, m->values);
    memset(m->dk, 0, sizeof(float) * padded * wide);
    memset(m->dv, 0, sizeof(float) * padded * wide);
    for (int64_t first = 0; first < w->n; first += QUERIES) {
        int64_t count = w->n - first < QUERIES ? w->n - first : QUERIES, rows = up(count, ROWS);
        copy(q, first, count, c, m->query);
        copy(grad, first, count, c, m->grad);
        // the rows of zeros have gradients of zero, whatever their lse
        pair_rows((Rows){m->query, {0, 0, c}}, QUERIES, c, wide, m->query_rows);
        pair_rows((Rows){m->grad, {0, 0, c}}, QUERIES, c, wide, m->grad_rows);
        for (int64_t i = 0; i < count; i++) {
            t->lse[i] = w->lse[head * w->n + first + i];
            t->delta[i] = dot(m->grad + i * c, row_of(out, first + i), c);
        }
        for (int64_t i = count; i < rows; i++) t->lse[i] = t->delta[i] = 0;
        memset(m->dq, 0, sizeof(float) * QUERIES * wide);
        for (int64_t j = 0; j < w->m; j += KEYS) {
            int64_t real = w->m - j < KEYS ? w->m - j : KEYS, block = up(real, 2 * LANES);
            scores_of(m->query, rows, m->keys, j, block, c, t->scores);
            scores_of(m->grad, rows, m->values, j, block, c, t->dweights);
            dscores_of(w, t, rows, real, block);
            add_rows(t->dscores, rows, m->key_rows + j / 2 * wide, block, c, wide, m->dq);
            int64_t keys = up(real, ROWS);
            add_columns(t->dscore_pairs, keys, m->query_rows, rows / 2, c, wide, m->dk + j * wide);
            add_columns(t->weight_pairs, keys, m->grad_rows, rows / 2, c, wide, m->dv + j * wide);
        }
        for (int64_t i = 0; i < count; i++) store(m->dq + i * wide, 1, c, row_of(dq, first + i));
    }
    for (int64_t j = 0; j < w->m; j++) {
        store(m->dk + j * wide, 1, c, row_of(dk, j));
        store(m->dv + j * wide, 1, c, row_of(dv, j));
    }
}

static void packer(void *arg) {
    Shared *s = arg;
    const Work *w = s->work;
    for (int64_t i, count = w->pictures * w->heads; (i = take(&s->next)) < count;) {
        pair_channels(head_of(w->k, w, i), w->m, w->c, s->keys + i * w->c / 2 * s->padded);
        pair_rows(head_of(w->v, w, i), w->m, w->c, s->wide,
                  s->values + i * s->padded / 2 * s->wide);
    }
}

static void attender(void *arg) {
    Shared *s = arg;
    const Work *w = s->work;
    int64_t blocks = blocks_of(w), count = w->pictures * w->heads * blocks, i = take(&s->next);
    if (i >= count) return;  // before it takes memory
    Tile *t = malloc(sizeof(Tile));
    float *out = malloc(sizeof(float) * QUERIES * s->wide);
    bf16 *query = malloc(sizeof(bf16) * QUERIES * w->c);
    if (!t || !out || !query) s->failed = 1;
    else
        for (; i < count; i = take(&s->next))
            attend(s, i / blocks, i % blocks * QUERIES, t, out, query);
    free(t), free(out), free(query);
}

static void backward_attender(void *arg) {
    Shared *s = arg;
    int64_t c = s->work->c, wide = s->wide, padded = s->padded;
    int64_t count = s->work->pictures * s->work->heads, head = take(&s->next);
    if (head >= count) return;
    // zeroed: what is packed has rows and columns beyond the last
    Space m = {
        .keys = calloc(c / 2 * padded, 4), .values = calloc(c / 2 * padded, 4),
        .key_rows = calloc(padded / 2 * wide, 4),
        .dk = malloc(sizeof(float) * padded * wide), .dv = malloc(sizeof(float) * padded * wide),
        .query_rows = calloc(QUERIES / 2 * wide, 4), .grad_rows = calloc(QUERIES / 2 * wide, 4),
        .dq = malloc(sizeof(float) * QUERIES * wide),
        .query = malloc(sizeof(bf16) * QUERIES * c), .grad = malloc(sizeof(bf16) * QUERIES * c),
        .tile = calloc(1, sizeof(BackwardTile)),
    };
    void *all[] = {m.keys, m.values, m.key_rows, m.dk, m.dv, m.query_rows, m.grad_rows, m.dq,
                   m.query, m.grad, m.tile};
    int64_t parts = sizeof(all) / sizeof(*all), had = 0;
    for (int64_t i = 0; i < parts; i++) had += all[i] != NULL;
    if (had < parts) s->failed = 1;
    else
        for (; head < count; head = take(&s->next)) attend_backward(s, head, &m);
    for (int64_t i = 0; i < parts; i++) free(all[i]);
}

// Gives 0, or 1 for want of memory.
int attention(const Work *w) {
    Shared s = {.work = w, .padded = up(w->m, PANEL), .wide = up(w->c, LANES)};
    int64_t heads = w->pictures * w->heads;
    s.keys = calloc(heads * w->c / 2 * s.padded, 4);
    s.values = calloc(heads * s.padded / 2 * s.wide, 4);
    if (s.keys && s.values) {
        run(packer, &s, &s.next, heads, w->threads);
        run(attender, &s, &s.next, heads * blocks_of(w), w->threads);
    } else s.failed = 1;
    free(s.keys), free(s.values);
    return s.failed;
}

// The gradients of q, k and v, each head by one thread; `out` and `lse` are from before.
int attention_backward(const Work *w) {
    // a block's last rows are taken ROWS at a time
    Shared s = {.work = w, .padded = up(w->m, PANEL) + ROWS, .wide = up(w->c, LANES)};
    run(backward_attender, &s, &s.next, w->pictures * w->heads, w->threads);
    return s.failed;
}
