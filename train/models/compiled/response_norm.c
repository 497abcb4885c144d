/* Response normalisation across maps, b = a * s^-3/4 with s = k + alpha * (sum of a*a over neighbouring maps), and its gradient, in one pass each.

   Plain C without Python's headers; cpu_kernels.py loads it by ctypes where a compiler was there. Every number comes by the same operations in
   the same order as from torch's passes in layers.py, none of them fused, so the bits are theirs on every machine. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* The fastest form that the processor has is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_PROCESSOR
#endif

/* sum: of each of `maps` values and its neighbours up to `reach` away, nearest first. `values` has `reach` numbers before and after, all -0.0,
   which change no sum. */
static inline void add_neighbours(const float *restrict values, ptrdiff_t maps, ptrdiff_t reach, float *restrict sum) {
    for (ptrdiff_t c = 0; c < maps; c++) sum[c] = values[c];
    for (ptrdiff_t d = 1; d <= reach; d++)
        for (ptrdiff_t c = 0; c < maps; c++) sum[c] = (sum[c] + values[c - d]) + values[c + d];
}

static inline void clear_edges(float *values, ptrdiff_t maps, ptrdiff_t reach) {
    for (ptrdiff_t d = 1; d <= reach; d++) values[-d] = values[maps - 1 + d] = -0.0f;
}

/* a, b, s: `rows` times `maps` numbers, those of a tower's maps at a place; `room`: 2 * (maps + reach) floats. */
EVERY_PROCESSOR
void alexprep_response_norm(const float *restrict a, int64_t rows, int64_t maps, int64_t reach, float k, float alpha, float *restrict room,
                            float *restrict b, float *restrict s) {
    float *restrict squares = room + reach;
    clear_edges(squares, maps, reach);
    for (int64_t row = 0; row < rows; row++, a += maps, b += maps, s += maps) {
        for (int64_t c = 0; c < maps; c++) squares[c] = a[c] * a[c];
        add_neighbours(squares, maps, reach, s);
        for (int64_t c = 0; c < maps; c++) {
            s[c] = s[c] * alpha + k;
            const float root = 1.0f / sqrtf(s[c]);
            b[c] = sqrtf(root) * root * a[c];
        }
    }
}

/* The gradient by a, of that by b: gradient * s^-3/4 - factor * a * (sum of gradient * b / s over the neighbours). `room` likewise. */
EVERY_PROCESSOR
void alexprep_response_norm_gradient(const float *restrict a, const float *restrict b, const float *restrict s, const float *restrict gradient,
                                     int64_t rows, int64_t maps, int64_t reach, float factor, float *restrict room, float *restrict result) {
    float *restrict parts = room + reach, *restrict crossed = room + 2 * reach + maps;
    clear_edges(parts, maps, reach);
    for (int64_t row = 0; row < rows; row++, a += maps, b += maps, s += maps, gradient += maps, result += maps) {
        for (int64_t c = 0; c < maps; c++) parts[c] = gradient[c] * b[c] / s[c];
        add_neighbours(parts, maps, reach, crossed);
        for (int64_t c = 0; c < maps; c++) {
            const float root = 1.0f / sqrtf(s[c]);
            result[c] = sqrtf(root) * root * gradient[c] - crossed[c] * a[c] * factor;
        }
    }
}
