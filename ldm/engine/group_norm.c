// Group normalisation of channels-last bfloat16, and SiLU after it: two passes over a picture, where
// torch takes five, and one rounding.
#include <math.h>
#include <stdlib.h>
#include "native.h"

enum {
    TASK = 16384,  // numbers that a task has at least
    PARTS = 32,    // that a picture is cut into at most
    PIXELS = 64,   // added up in float32, before float64 takes over
};

typedef struct {
    const bf16 *x;  // pictures pixels channels
    const bf16 *weight, *bias;
    bf16 *out;
    int64_t pictures, pixels, channels, groups;  // channels are a multiple of LANES
    float eps;
    int silu;
    int64_t threads;
} Norm;

typedef struct {
    const Norm *norm;
    int64_t parts, next;   // parts of a picture
    double *sums;          // pictures parts 2 channels: of the numbers and of their squares
    float *scale, *shift;  // pictures channels
} Pass;

static inline __m512 load(const bf16 *x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// The first pixel of a part of a picture.
static int64_t start(const Pass *p, int64_t part) { return p->norm->pixels * part / p->parts; }

static inline void add(double *to, __m512 x) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
    _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
}

static void sum_up(void *arg) {
    Pass *p = arg;
    const Norm *n = p->norm;
    int64_t c = n->channels;
    for (int64_t i; (i = take(&p->next)) < n->pictures * p->parts;) {
        double *sums = p->sums + i * 2 * c;  // zeros
        const bf16 *x = n->x + i / p->parts * n->pixels * c;
        int64_t end = start(p, i % p->parts + 1);
        for (int64_t first = start(p, i % p->parts); first < end; first += PIXELS) {
            int64_t last = first + PIXELS < end ? first + PIXELS : end;
            for (int64_t k = 0; k < c; k += LANES) {
                __m512 sum = _mm512_setzero_ps(), squares = sum;
                for (int64_t pixel = first; pixel < last; pixel++) {
                    __m512 y = load(x + pixel * c + k);
                    sum = _mm512_add_ps(sum, y);
                    squares = _mm512_fmadd_ps(y, y, squares);
                }
                add(sums + k, sum);
                add(sums + c + k, squares);
            }
        }
    }
}

static float number(bf16 x) {
    union { uint32_t bits; float number; } of = {(uint32_t)x << 16};
    return of.number;
}

// From sums to what each channel of a picture is multiplied by, and what is added to it.
static void scales_of(const Pass *p, int64_t picture) {
    const Norm *n = p->norm;
    int64_t c = n->channels, size = c / n->groups;
    for (int64_t first = 0; first < c; first += size) {
        double sum = 0, squares = 0, count = n->pixels * size;
        for (int64_t part = 0; part < p->parts; part++)
            for (int64_t k = first; k < first + size; k++) {
                sum += p->sums[(picture * p->parts + part) * 2 * c + k];
                squares += p->sums[(picture * p->parts + part) * 2 * c + c + k];
            }
        double mean = sum / count, variance = squares / count - mean * mean;
        variance = variance < 0 ? 0 : variance;  // what is not a number stays so
        for (int64_t k = first; k < first + size; k++) {
            double scale = number(n->weight[k]) / sqrt(variance + n->eps);
            p->scale[picture * c + k] = scale;
            p->shift[picture * c + k] = number(n->bias[k]) - mean * scale;
        }
    }
}

static inline __m512 silu_of(__m512 x) {
    __m512 power = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

static void apply(void *arg) {
    Pass *p = arg;
    const Norm *n = p->norm;
    int64_t c = n->channels;
    for (int64_t i; (i = take(&p->next)) < n->pictures * p->parts;) {
        int64_t picture = i / p->parts, end = picture * n->pixels + start(p, i % p->parts + 1);
        const float *scale = p->scale + picture * c, *shift = p->shift + picture * c;
        for (int64_t pixel = picture * n->pixels + start(p, i % p->parts); pixel < end; pixel++)
            for (int64_t k = 0; k < c; k += LANES) {
                __m512 y = _mm512_fmadd_ps(load(n->x + pixel * c + k), _mm512_loadu_ps(scale + k),
                                           _mm512_loadu_ps(shift + k));
                if (n->silu) y = silu_of(y);
                _mm256_storeu_si256((__m256i *)(n->out + pixel * c + k),
                                    (__m256i)_mm512_cvtneps_pbh(y));
            }
    }
}

// Gives 0, or 1 for want of memory.
int group_norm(const Norm *n) {
    int64_t c = n->channels, parts = n->pixels * c / TASK;
    Pass p = {.norm = n, .parts = parts < 1 ? 1 : parts < PARTS ? parts : PARTS};
    int64_t tasks = n->pictures * p.parts;
    p.sums = calloc(tasks * 2 * c, sizeof(double));
    p.scale = malloc(n->pictures * 2 * c * sizeof(float));
    int failed = !p.sums || !p.scale;
    if (!failed) {
        p.shift = p.scale + n->pictures * c;
        run(sum_up, &p, &p.next, tasks, n->threads);
        for (int64_t i = 0; i < n->pictures; i++) scales_of(&p, i);
        run(apply, &p, &p.next, tasks, n->threads);
    }
    free(p.sums), free(p.scale);
    return failed;
}
