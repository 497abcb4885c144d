/* Makes of 8-bit views what a network reads: reflects, subtracts, divides, orders the axes, and converts, in one pass over each row.

   Plain C without Python's headers; normalisation.py loads it by ctypes where a compiler was there. No operation here can be fused with
   another or change its order, so every machine and every compiler makes the same bits. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* The fastest form that the processor has is chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_PROCESSOR
#endif

/* One view: rows of RGB bytes, `stride` bytes apart; a mean image as large, or NULL; what is subtracted from each value of a row, and
   what it is then multiplied by. */
typedef struct {
    const uint8_t *pixels;
    const float *mean, *minus, *factor;
    int64_t stride, mirrored;
} view;

/* The nearest half-precision number, ties to even, of any that is not NaN; branch-free, so that a vector of them is made at once. */
static inline uint16_t half(float x) {
    uint32_t bits, small;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits & 0x80000000u, size = bits ^ sign;
    float shifted;
    memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5f; /* of less than 2**-14, the sum's last bits count what a subnormal number counts */
    memcpy(&small, &shifted, sizeof small);
    const uint32_t usual = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1)) >> 13;
    const uint32_t found = size >= 0x477ff000u ? 0x7c00u : size < 0x38800000u ? small - 0x3f000000u : usual;
    return (uint16_t)(found | sign >> 16);
}

/* A row of pixels from right to left; writes one byte more. */
static inline void reflect(const uint8_t *restrict row, ptrdiff_t width, uint8_t *restrict reflected) {
    memcpy(reflected, row + 3 * (width - 1), 3);
    for (ptrdiff_t x = 1; x < width; x++) memcpy(reflected + 3 * x, row + 3 * (width - 1 - x), 4);
}

/* Copies a row to where it is not read soon: past the caches, where the processor can, so that nothing is read there before. */
static inline void put(void *to, const void *from, size_t size) {
#ifdef __SSE2__
    if ((uintptr_t)to % 16 == 0 && size % 16 == 0) {
        for (size_t n = 0; n < size; n += 16)
            _mm_stream_si128((__m128i *)((char *)to + n), _mm_loadu_si128((const __m128i *)((const char *)from + n)));
        return;
    }
#endif
    memcpy(to, from, size);
}

/* result: `count` views of height x width pixels, channels last, or first if `planar`; floats, or half floats if `halves`.
   room: 5 * width floats. */
EVERY_PROCESSOR
void alexprep_views(const view *views, int32_t count, int32_t height, int32_t width, int32_t planar, int32_t halves,
                    float *restrict room, void *result) {
    const ptrdiff_t values = 3 * (ptrdiff_t)width, area = (ptrdiff_t)height * width;
    uint8_t *restrict turned = (uint8_t *)(room + values);
    float *restrict piece = room + 4 * (ptrdiff_t)width;
    for (int32_t n = 0; n < count; n++) {
        const float *restrict minus = views[n].minus, *restrict factor = views[n].factor;
        for (int32_t y = 0; y < height; y++) {
            const uint8_t *restrict row = views[n].pixels + y * views[n].stride;
            const ptrdiff_t place = 3 * area * n + (planar ? (ptrdiff_t)y * width : y * values);
            if (views[n].mirrored) {
                reflect(row, width, turned);
                row = turned;
            }
            if (views[n].mean) {
                const float *restrict mean = views[n].mean + y * values;
                for (ptrdiff_t x = 0; x < values; x++) room[x] = (((float)row[x] - mean[x]) - minus[x]) * factor[x];
            } else
                for (ptrdiff_t x = 0; x < values; x++) room[x] = ((float)row[x] - minus[x]) * factor[x];
            if (halves) {
                uint16_t *restrict narrow = (uint16_t *)result + place;
                if (planar)
                    for (ptrdiff_t c = 0; c < 3; c++)
                        for (ptrdiff_t x = 0; x < width; x++) narrow[c * area + x] = half(room[3 * x + c]);
                else
                    for (ptrdiff_t x = 0; x < values; x++) narrow[x] = half(room[x]);
            } else if (planar)
                for (ptrdiff_t c = 0; c < 3; c++) {
                    for (ptrdiff_t x = 0; x < width; x++) piece[x] = room[3 * x + c];
                    put((float *)result + place + c * area, piece, (size_t)width * sizeof(float));
                }
            else
                put((float *)result + place, room, (size_t)values * sizeof(float));
        }
    }
#ifdef __SSE2__
    _mm_sfence(); /* before any other thread is told that it is done */
#endif
}
