// What attention.c and group_norm.c share: AVX-512 with bfloat16, and threads.
#include <immintrin.h>
#include <stdint.h>

enum { LANES = 16 };

#define LOG2_E 1.44269504f  // exponentials are powers of two

typedef uint16_t bf16;

// Of the OpenMP that torch has loaded, whose threads torch's operators run on, and wait awake for the
// next; others would compete with them. Without it this library does not load, and torch does its work.
void GOMP_parallel(void (*part)(void *), void *data, unsigned threads, unsigned flags);

// `part` by all of torch's threads, each of which takes the `next` task until none is left. By fewer
// would be slower: OpenMP ends those left over, and torch's next operator has to start them again.
static inline void run(void (*part)(void *), void *data, int64_t *next, int64_t tasks,
                       int64_t threads) {
    *next = 0;
    if (tasks < 2 || threads < 2) part(data);
    else GOMP_parallel(part, data, threads, 0);
}

static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

static inline __m512 exp2_of(__m512 x) {  // to 3e-6; of what is below -126, as of that
    x = _mm512_max_ps(_mm512_set1_ps(-126), x);  // in this order, what is not a number stays so
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole), y = _mm512_set1_ps(9.57010034e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.59178591e-2f));  // of the least error
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40247443e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93121791e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.99999285e-1f));
    return _mm512_scalef_ps(y, whole);
}
