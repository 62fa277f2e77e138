/* One step of an LSTM or GRU between its matrix products: all records, both ways, float32.

   A plain shared library for medfed/recurrent_cells.py, which says what the arguments are. It needs no Python headers and
   no mathematics library. Matrices are rows of floats without gaps: gates [n, 4 h] of an LSTM, [n, 3 h] of a GRU, the others
   [n, h]. `inside` is one byte a record, or NULL where every record is inside; a record outside keeps its row as it is.

   Only +, -, *, / of IEEE 754 and integers, and the compiler is told not to contract them: a value is the same bits at any
   place of a row, in any record, with any width of vectors, on any processor. Not a number stays so; infinities saturate. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One copy of each function a generation of vector units; the loader takes what the processor has. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif

#if defined(_MSC_VER)
#define EXPORTED __declspec(dllexport)
#define INLINE static __forceinline
#define NO_OVERLAP __pragma(loop(ivdep))
#elif defined(__GNUC__)
#define EXPORTED __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define NO_OVERLAP _Pragma("GCC ivdep")
#else
#define EXPORTED
#define INLINE static inline
#define NO_OVERLAP
#endif

/* Build tools expect a Python module and ask for its initialiser by name. Nobody imports this one. */
EXPORTED void *PyInit_recurrent_cell(void);
EXPORTED void *PyInit_recurrent_cell(void) { return NULL; }

/* What the functions expect: raised with every change of their arguments, for a library left from an earlier installation. */
EXPORTED int medfed_cell_version(void);
EXPORTED int medfed_cell_version(void) { return 1; }

/* x = n ln 2 + r with |r| <= ln 2 / 2: `power` is 2^n, `rest` is exp(r) - 1 to 1.4e-8 of itself before rounding.
   For |x| <= 87, so that 2^n is neither denormal nor infinite. */
typedef struct {
    float power, rest;
} parts;

INLINE parts split_exponential(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits */
    union {
        float value;
        uint32_t bits;
    } shifted, power;
    shifted.value = x * 1.44269504f + magic;
    const float n = shifted.value - magic;
    /* of x that is not a number the bits are anything; then `rest` is not a number either */
    power.bits = (shifted.bits + 127u) << 23;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float q = 1.3882514e-3f;
    q = q * r + 8.3665475e-3f;
    q = q * r + 4.1667201e-2f;
    q = q * r + 1.6666543e-1f;
    q = q * r + 0.5f;
    const parts found = {power.value, r + r * r * q};
    return found;
}

/* Comparisons that are false for what is not a number, which therefore stays. */
INLINE float bounded(float x, float bound) {
    x = x > bound ? bound : x;
    return x < -bound ? -bound : x;
}

INLINE float sigmoid(float x) {
    const parts e = split_exponential(bounded(-x, 87.0f));
    return 1.0f / (1.0f + (e.power + e.power * e.rest));
}

/* (exp(2 x) - 1) / (exp(2 x) + 1), with the difference from 1 kept apart: small x lose no digits */
INLINE float hyperbolic_tangent(float x) {
    const parts e = split_exponential(bounded(2.0f * x, 20.0f));
    const float less_one = e.power * e.rest + (e.power - 1.0f);
    return less_one / (less_one + 2.0f);
}

EACH_PROCESSOR EXPORTED void medfed_lstm_forward(
    float *restrict gates, const float *restrict cells, const float *restrict states, const uint8_t *restrict inside,
    float *restrict next_cells, float *restrict next_states, ptrdiff_t n, ptrdiff_t h
) {
    for (ptrdiff_t b = 0; b < n; b++) {
        float *restrict enter = gates + b * 4 * h, *restrict forget = enter + h;
        float *restrict candidate = forget + h, *restrict output = candidate + h;
        const float *restrict cell = cells + b * h, *restrict state = states + b * h;
        float *restrict next_cell = next_cells + b * h, *restrict next_state = next_states + b * h;
        if (inside != NULL && !inside[b]) {
            memcpy(next_cell, cell, (size_t)h * sizeof(float));
            memcpy(next_state, state, (size_t)h * sizeof(float));
            continue;
        }
        NO_OVERLAP
        for (ptrdiff_t j = 0; j < h; j++) {
            const float i = sigmoid(enter[j]), f = sigmoid(forget[j]);
            const float g = hyperbolic_tangent(candidate[j]), o = sigmoid(output[j]);
            const float c = f * cell[j] + i * g;
            enter[j] = i;
            forget[j] = f;
            candidate[j] = g;
            output[j] = o;
            next_cell[j] = c;
            next_state[j] = o * hyperbolic_tangent(c);
        }
    }
}

EACH_PROCESSOR EXPORTED void medfed_lstm_backward(
    float *restrict gates, const float *restrict cells, const float *restrict next_cells,
    const uint8_t *restrict inside, float *restrict by_states, float *restrict by_cells,
    const float *restrict earlier, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t h
) {
    for (ptrdiff_t b = 0; b < n; b++) {
        float *restrict enter = gates + b * 4 * h, *restrict forget = enter + h;
        float *restrict candidate = forget + h, *restrict output = candidate + h;
        const float *restrict cell = cells + b * h, *restrict next_cell = next_cells + b * h;
        float *restrict by_state = by_states + b * h, *restrict by_cell = by_cells + b * h;
        const float *restrict more = earlier == NULL ? NULL : earlier + b * stride;
        if (inside != NULL && !inside[b]) {
            memset(enter, 0, 4 * (size_t)h * sizeof(float));
            if (more != NULL) {
                NO_OVERLAP
                for (ptrdiff_t j = 0; j < h; j++)
                    by_state[j] += more[j];
            }
            continue;
        }
        NO_OVERLAP
        for (ptrdiff_t j = 0; j < h; j++) {
            const float i = enter[j], f = forget[j], g = candidate[j], o = output[j];
            const float shown = hyperbolic_tangent(next_cell[j]), s = by_state[j];
            const float c = by_cell[j] + s * o * (1.0f - shown * shown);
            enter[j] = c * g * (i * (1.0f - i));
            forget[j] = c * cell[j] * (f * (1.0f - f));
            candidate[j] = c * i * (1.0f - g * g);
            output[j] = s * shown * (o * (1.0f - o));
            by_cell[j] = c * f;
        }
        if (more != NULL)
            memcpy(by_state, more, (size_t)h * sizeof(float));
        else
            memset(by_state, 0, (size_t)h * sizeof(float));
    }
}

EACH_PROCESSOR EXPORTED void medfed_gru_forward(
    float *restrict gates, float *restrict products, const float *restrict bias, const float *restrict states,
    const uint8_t *restrict inside, float *restrict next_states, ptrdiff_t n, ptrdiff_t h
) {
    const float *restrict reset_bias = bias, *restrict update_bias = bias + h, *restrict candidate_bias = bias + 2 * h;
    for (ptrdiff_t b = 0; b < n; b++) {
        float *restrict reset = gates + b * 3 * h, *restrict update = reset + h, *restrict candidate = update + h;
        const float *restrict to_reset = products + b * 3 * h, *restrict to_update = to_reset + h;
        const float *restrict state = states + b * h;
        float *restrict recalled = products + (b * 3 + 2) * h, *restrict next_state = next_states + b * h;
        if (inside != NULL && !inside[b]) {
            memcpy(next_state, state, (size_t)h * sizeof(float));
            continue;
        }
        NO_OVERLAP
        for (ptrdiff_t j = 0; j < h; j++) {
            const float r = sigmoid(reset[j] + (to_reset[j] + reset_bias[j]));
            const float z = sigmoid(update[j] + (to_update[j] + update_bias[j]));
            const float q = recalled[j] + candidate_bias[j], c = hyperbolic_tangent(candidate[j] + r * q);
            reset[j] = r;
            update[j] = z;
            candidate[j] = c;
            recalled[j] = q;
            next_state[j] = c + z * (state[j] - c);
        }
    }
}

EACH_PROCESSOR EXPORTED void medfed_gru_backward(
    float *restrict gates, float *restrict products, const float *restrict states, const uint8_t *restrict inside,
    float *restrict by_states, const float *restrict earlier, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t h
) {
    for (ptrdiff_t b = 0; b < n; b++) {
        float *restrict reset = gates + b * 3 * h, *restrict update = reset + h, *restrict candidate = update + h;
        float *restrict to_reset = products + b * 3 * h, *restrict to_update = to_reset + h;
        float *restrict recalled = to_update + h;
        const float *restrict state = states + b * h;
        float *restrict by_state = by_states + b * h;
        const float *restrict more = earlier == NULL ? NULL : earlier + b * stride;
        if (inside != NULL && !inside[b]) {
            memset(reset, 0, 3 * (size_t)h * sizeof(float));
            memset(to_reset, 0, 3 * (size_t)h * sizeof(float));
        } else {
            NO_OVERLAP
            for (ptrdiff_t j = 0; j < h; j++) {
                const float r = reset[j], z = update[j], c = candidate[j], s = by_state[j];
                const float of_candidate = s * (1.0f - z) * (1.0f - c * c);
                const float of_reset = of_candidate * recalled[j] * (r * (1.0f - r));
                const float of_update = s * (state[j] - c) * (z * (1.0f - z));
                reset[j] = to_reset[j] = of_reset;
                update[j] = to_update[j] = of_update;
                candidate[j] = of_candidate;
                recalled[j] = of_candidate * r;
                by_state[j] = s * z;
            }
        }
        if (more != NULL) {
            NO_OVERLAP
            for (ptrdiff_t j = 0; j < h; j++)
                by_state[j] += more[j];
        }
    }
}
