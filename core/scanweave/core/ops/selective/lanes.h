/* Vectors of the machine's width, the functions of a scan on them, and rows of any dtype.
 *
 * Included before everything else: it asks the system's headers for posix_memalign. */
#ifndef SCANWEAVE_LANES_H
#define SCANWEAVE_LANES_H

#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* the widest vector that the machine has: twice that runs ten times slower */
#if defined(__AVX512F__)
#define VL 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)
#define VL 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define VL 4
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif

typedef float vf __attribute__((vector_size(4 * VL), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), may_alias));
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* ---- what Python asks a library ---- */

int scanweave_lanes(void) { return VL; }

int scanweave_float16(void) {
#if defined(__FLT16_MAX__)
    return 1;
#else
    return 0;
#endif
}

int scanweave_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* a vector's start, or NULL */
INLINE void *allocate(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) ? NULL : memory;
}

/* ---- numbers ---- */

INLINE vf splat(float v) { return v - (vf){0}; }
INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf rounded(vf v) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)v, 8);
#else
    return (v + 12582912.f) - 12582912.f; /* 1.5 * 2^23 */
#endif
}

/* 2^f for |f| <= 1/2, relative error 2e-9 before rounding; exactly 1 at 0 */
INLINE vf power_of_fraction(vf f) {
    vf p = f * 1.53533619e-4f + 1.33988744e-3f;
    p = f * p + 9.61843736e-3f;
    p = f * p + 5.55033247e-2f;
    p = f * p + 2.40226479e-1f;
    p = f * p + 6.93147203e-1f;
    return f * p + 1.f;
}

/* p * 2^r for p in [0.7, 1.5] and whole r; 0 below the normal numbers, NaN stays NaN */
INLINE vf scaled(vf p, vf r) {
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)r);
#else
    vi shifted = (vi)p + (((vi)(r + 12582912.f)) << 23);
    vi big = ~(r < 128.f); /* and NaN */
    vf value = (vf)(shifted & ~(r < -126.f));
    return select(big, r + INFINITY, value);
#endif
}

INLINE vf exp2_of(vf v) {
#if defined(__AVX512F__)
    v = (vf)_mm512_max_ps(_mm512_set1_ps(-1e4f), (__m512)v); /* -inf - -inf is NaN; NaN stays */
#else
    v = select(v < -1e4f, splat(-1e4f), v);
#endif
    vf r = rounded(v);
    return scaled(power_of_fraction(v - r), r);
}

/* exp(-|v|); log2(e) in two parts, for a relative error of 1e-7 at any v */
INLINE vf exp_of_minus_abs(vf v) {
    vf m = (vf)((vi)v | INT32_MIN);
    m = select(m < -1e3f, splat(-1e3f), m);
    vf r = rounded(m * 1.44269502f);
    return scaled(power_of_fraction((m * 1.44269502f - r) + m * 1.92596303e-8f), r);
}

/* log(1 + e^v) = max(v, 0) + 2 atanh(s), s = e^-|v| / (2 + e^-|v|); and its derivative */
INLINE vf softplus(vf v, vf *slope) {
    vf e = exp_of_minus_abs(v), s = e / (e + 2.f), w = s * s, big = 1.f / (e + 1.f);
    vf p = w * (w * (w * 0.28174657f + 0.27961418f) + 0.40024853f) + 0.66666317f;
    *slope = select(v < 0.f, e * big, big);
    return select(v > 0.f, v, splat(0)) + s * (w * p + 2.f);
}

INLINE vf sigmoid(vf v) {
    vf e = exp_of_minus_abs(v), big = 1.f / (e + 1.f);
    return select(v < 0.f, e * big, big);
}

INLINE vf pairs(vf a, vf b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
#else
    return __builtin_shuffle(a, b, (vi){EVEN}) + __builtin_shuffle(a, b, (vi){ODD});
#endif
}

/* the sum of each of VL vectors, as one vector */
INLINE vf sums_2(const vf *v) { return pairs(v[0], v[1]); }
INLINE vf sums_4(const vf *v) { return pairs(sums_2(v), sums_2(v + 2)); }
INLINE vf sums_8(const vf *v) { return pairs(sums_4(v), sums_4(v + 4)); }
INLINE vf sums_16(const vf *v) { return pairs(sums_8(v), sums_8(v + 8)); }
INLINE vf sums(const vf *v) { return VL == 16 ? sums_16(v) : VL == 8 ? sums_8(v) : sums_4(v); }

/* ---- rows of any dtype ---- */

INLINE float from_bfloat16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near;
}

INLINE void load(float *to, const char *from, int64_t type, int64_t at, int count) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + at, 4 * (size_t)count);
    } else if (type == BFLOAT16) {
        for (int i = 0; i < count; i++) to[i] = from_bfloat16(((const uint16_t *)from)[at + i]);
    } else {
#if defined(__FLT16_MAX__)
        for (int i = 0; i < count; i++) to[i] = (float)((const _Float16 *)from)[at + i];
#endif
    }
}

INLINE void store(char *to, const float *from, int64_t type, int64_t at, int count) {
    if (type == FLOAT32) {
        memcpy((float *)to + at, from, 4 * (size_t)count);
    } else if (type == BFLOAT16) {
        for (int i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_bfloat16(from[i]);
    } else {
#if defined(__FLT16_MAX__)
        for (int i = 0; i < count; i++) ((_Float16 *)to)[at + i] = (_Float16)from[i];
#endif
    }
}

#endif
