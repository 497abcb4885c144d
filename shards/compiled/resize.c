/* Resizes interleaved 8-bit images: the two products of resample.py, bit for bit, in one pass over the source.

   Plain C without Python's headers; resample.py loads it by ctypes where a compiler was there, and does the same in numpy elsewhere.
   All sums are of integers below 2**24, so floats hold them exactly in any order, and fused multiply-adds change nothing. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ROWS 8 /* of the result at a time: their sums down the columns stay in the cache, and are one vector along the rows */
#define TILE 64 /* values of a row at a time, whose sums stay in registers or near them */

/* The fastest form that the processor has is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_PROCESSOR
#endif

/* What each output of an axis reads: `count[i]` neighbours from `start[i]` on, with weights of `taps` room each. */
typedef struct {
    int32_t outputs, taps;
    const int32_t *start, *count;
    const float *weights;
} axis;

/* The nearest integer, halves to even, of |x| < 2**22: as rint, but a vector of them at once on every processor. */
static inline float nearest(float x) {
    const float big = 12582912.0f; /* 1.5 * 2**23 */
    return (x + big) - big;
}

/* 8 by 8 bytes turned: byte r of each of the 8 numbers at `from`, side by side, is number r of `to`. Bytes in this order: */
static inline void turn(const uint8_t *from, uint64_t to[ROWS]) {
    uint64_t v[ROWS];
    memcpy(v, from, sizeof v);
    for (int step = 0; step < 3; step++) {
        const int apart = 1 << step, bits = 8 << step;
        const uint64_t low = step == 0 ? 0x00ff00ff00ff00ffu : step == 1 ? 0x0000ffff0000ffffu : 0x00000000ffffffffu;
        for (int a = 0; a < ROWS; a++) {
            if (a & apart) continue;
            const uint64_t swapped = ((v[a] >> bits) ^ v[a + apart]) & low;
            v[a] ^= swapped << bits;
            v[a + apart] ^= swapped;
        }
    }
    memcpy(to, v, sizeof v);
}

/* source: `stride` bytes a row, `width` pixels of 3 bytes used of each; result: down->outputs rows of along->outputs pixels;
   room: ROWS * 3 * width floats. */
EVERY_PROCESSOR
void alexprep_resize(const uint8_t *restrict source, ptrdiff_t stride, int32_t width, const axis *restrict down,
                     const axis *restrict along, float *restrict room, uint8_t *restrict result) {
    const ptrdiff_t values = 3 * (ptrdiff_t)width, written = 3 * (ptrdiff_t)along->outputs;
    uint8_t *restrict narrow = (uint8_t *)(room + ROWS * values);
    float *restrict turned = room; /* (values, ROWS): the rows' sums side by side */
    for (int32_t top = 0; top < down->outputs; top += ROWS) {
        const int32_t rows = down->outputs - top < ROWS ? down->outputs - top : ROWS;
        for (ptrdiff_t left = 0; left < values; left += TILE) {
            const ptrdiff_t columns = values - left < TILE ? values - left : TILE;
            float sums[ROWS][TILE] = {{0}};
            for (int32_t r = 0; r < rows; r++) {
                const float *weight = down->weights + (ptrdiff_t)(top + r) * down->taps;
                const uint8_t *line = source + down->start[top + r] * stride + left;
                if (columns == TILE) /* of a length that the compiler knows */
                    for (int32_t t = 0; t < down->count[top + r]; t++, line += stride)
                        for (int x = 0; x < TILE; x++) sums[r][x] += weight[t] * (float)line[x];
                else
                    for (int32_t t = 0; t < down->count[top + r]; t++, line += stride)
                        for (ptrdiff_t x = 0; x < columns; x++) sums[r][x] += weight[t] * (float)line[x];
            }
            for (ptrdiff_t x = 0; x < columns; x++)
                for (int r = 0; r < ROWS; r++) turned[(left + x) * ROWS + r] = nearest(sums[r][x]);
        }
        for (int32_t i = 0; i < along->outputs; i++) {
            const float *weight = along->weights + (ptrdiff_t)i * along->taps;
            const float *begin = turned + (ptrdiff_t)along->start[i] * 3 * ROWS;
            float pixel[3 * ROWS] = {0};
            for (int32_t t = 0; t < along->count[i]; t++)
                for (int k = 0; k < 3 * ROWS; k++) pixel[k] += weight[t] * begin[t * 3 * ROWS + k];
            int32_t whole[3 * ROWS];
            uint8_t bytes[3 * ROWS];
            for (int k = 0; k < 3 * ROWS; k++) {
                float value = nearest(pixel[k]);
                value = value < 0.0f ? 0.0f : value;
                whole[k] = (int32_t)(value > 255.0f ? 255.0f : value);
            }
            for (int k = 0; k < 3 * ROWS; k++) bytes[k] = (uint8_t)whole[k];
            memcpy(narrow + 3 * ROWS * (ptrdiff_t)i, bytes, sizeof bytes);
        }
        for (ptrdiff_t x = 0; x < written; x += ROWS) {
            uint64_t lines[ROWS];
            turn(narrow + x * ROWS, lines);
            const size_t size = written - x < ROWS ? (size_t)(written - x) : ROWS;
            for (int32_t r = 0; r < rows; r++) {
                if (size == ROWS) memcpy(result + (top + r) * written + x, lines + r, ROWS);
                else memcpy(result + (top + r) * written + x, lines + r, size);
            }
        }
    }
}
