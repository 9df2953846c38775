/* One chunk of time for one block of channels: where its rows are, there and back through it. */
#ifndef SCANWEAVE_CHUNK_H
#define SCANWEAVE_CHUNK_H

#include "lanes.h"

#define STEPS 32 /* of a chunk: all that a chunk of two state entries touches fits in L1 */

/* ---- arguments: all fields have 8 bytes, so that the caller fills an array of int64 ---- */

typedef struct {
    char *data; /* NULL: absent */
    int64_t type, batch, row, group; /* strides in elements; channels or states are adjacent */
} Rows;

typedef struct {
    int64_t parts, sequences, length, dim, state, groups, reverse, softplus;
    const int64_t *cu; /* (S + 1,) starts in the one batch row, or NULL */
    const int32_t *path; /* (L,) token of every step of a batch row, or NULL: step t is token t */
    const float *A, *D, *bias, *initial; /* (D, N), (D,), (D,), (S, D, N); contiguous */
    Rows x, dt, B, C, z;
} Inputs;

/* ---- where things are ---- */

typedef struct {
    int64_t batch, first, length; /* batch row, first token in it, tokens */
    int64_t token;                /* the first token's place among all T */
} Sequence;

static Sequence sequence_of(const Inputs *in, int64_t s) {
    if (!in->cu) return (Sequence){s, 0, in->length, s * in->length};
    return (Sequence){0, in->cu[s], in->cu[s + 1] - in->cu[s], in->cu[s]};
}

/* a chunk's rows, in the order of the scan */
typedef struct {
    const int32_t *path;
    int64_t start, step, length; /* its first row's place in the path; +1 or -1; of the path */
    int64_t batch;
    int64_t ahead; /* from a row to the one that the chunk after this one has in its place */
    int rows;
} Chunk;

static Chunk chunk_of(const Inputs *in, Sequence q, int64_t index, int back) {
    int64_t at = index * STEPS, left = q.length - at;
    if (in->reverse) at = q.length - 1 - at;
    return (Chunk){in->path, q.first + at, in->reverse ? -1 : 1, in->length, q.batch,
                   !in->reverse == !back ? STEPS : -STEPS, (int)(left < STEPS ? left : STEPS)};
}

/* the batch row's token in row t of a chunk */
INLINE int64_t token_of(Chunk c, int t) {
    int64_t at = c.start + t * c.step;
    return c.path ? c.path[at] : at;
}

INLINE int64_t place(const Rows *r, Chunk c, int t) {
    return c.batch * r->batch + token_of(c, t) * r->row;
}

/* where the chunk after this one has its row t; not read, so it may be out of bounds */
INLINE int64_t place_ahead(const Rows *r, Chunk c, int t) {
    int64_t at = c.start + t * c.step + c.ahead;
    if (c.path) at = at >= 0 && at < c.length ? c.path[at] : 0;
    return c.batch * r->batch + at * r->row;
}

static void load_block(vf *to, const Rows *r, Chunk c, int64_t channel, int lanes) {
    const int64_t size = r->type == FLOAT32 ? 4 : 2;
    if (lanes == VL) {
        for (int t = 0; t < c.rows; t++) {
            uintptr_t ahead = (uintptr_t)r->data + (place_ahead(r, c, t) + channel) * size;
            __builtin_prefetch((const char *)ahead);
            load((float *)(to + t), r->data, r->type, place(r, c, t) + channel, VL);
        }
        return;
    }
    for (int t = 0; t < c.rows; t++) {
        to[t] = splat(0);
        load((float *)(to + t), r->data, r->type, place(r, c, t) + channel, lanes);
    }
}

static void store_block(const Rows *r, const vf *from, Chunk c, int64_t channel, int lanes) {
    if (lanes == VL) {
        for (int t = 0; t < c.rows; t++)
            store(r->data, (const float *)(from + t), r->type, place(r, c, t) + channel, VL);
        return;
    }
    for (int t = 0; t < c.rows; t++)
        store(r->data, (const float *)(from + t), r->type, place(r, c, t) + channel, lanes);
}

/* a chunk's rows of B or C as float32: where they are if they can be, else copied to `buffer` */
typedef struct {
    const float *data;
    ptrdiff_t row;
} Vectors;

static Vectors vectors_of(const Rows *r, Chunk c, int64_t group, int64_t state, float *buffer) {
    int64_t at = place(r, c, 0) + group * r->group;
    if (r->type == FLOAT32 && !c.path)
        return (Vectors){(const float *)r->data + at, (ptrdiff_t)(c.step * r->row)};
    for (int t = 0; t < c.rows; t++)
        load(buffer + t * state, r->data, r->type, place(r, c, t) + group * r->group, (int)state);
    return (Vectors){buffer, (ptrdiff_t)state};
}

/* `lanes` rows of a (D, N) array to N vectors, times a factor; and back */
static void load_state(vf *to, const float *from, int64_t state, int lanes, float factor) {
    for (int64_t n = 0; n < state; n++) {
        to[n] = splat(0);
        if (from)
            for (int i = 0; i < lanes; i++) ((float *)(to + n))[i] = factor * from[i * state + n];
    }
}

static void store_state(float *to, const vf *from, int64_t state, int lanes) {
    for (int64_t n = 0; n < state; n++)
        for (int i = 0; i < lanes; i++) to[i * state + n] = ((const float *)(from + n))[i];
}

static vf load_channels(const float *from, int64_t channel, int lanes) {
    vf v = splat(0);
    if (from) memcpy(&v, from + channel, 4 * (size_t)lanes);
    return v;
}

/* ---- one chunk of one block ---- */

typedef struct {
    vf x[STEPS], delta[STEPS], slope[STEPS], input[STEPS]; /* input = delta x */
} Steps;

static void load_steps(Steps *s, const Inputs *in, Chunk c, int64_t channel, int lanes) {
    vf bias = load_channels(in->bias, channel, lanes);
    load_block(s->x, &in->x, c, channel, lanes);
    load_block(s->delta, &in->dt, c, channel, lanes);
    for (int t = 0; t < c.rows; t++) {
        vf raw = s->delta[t] + bias;
        s->slope[t] = splat(1.f);
        s->delta[t] = in->softplus ? softplus(raw, &s->slope[t]) : raw;
        s->input[t] = s->delta[t] * s->x[t];
    }
}

/* run `count` state entries through a chunk; y NULL: only the states */
INLINE void advance(const int count, int rows, const Steps *s, const vf *A2, vf *h,
                    const float *B, ptrdiff_t row_b, const float *C, ptrdiff_t row_c, vf *y) {
    vf state[4], rate[4];
    for (int j = 0; j < count; j++) state[j] = h[j], rate[j] = A2[j];
    for (int t = 0; t < rows; t++) {
        vf delta = s->delta[t], input = s->input[t], read = splat(0);
        for (int j = 0; j < count; j++) {
            state[j] = exp2_of(delta * rate[j]) * state[j] + input * B[t * row_b + j];
            if (y) read += state[j] * C[t * row_c + j];
        }
        if (y) y[t] += read;
    }
    for (int j = 0; j < count; j++) h[j] = state[j];
}

static void advance_all(int64_t state, int rows, const Steps *s, const vf *A2, vf *h, Vectors B,
                        Vectors C, vf *y) {
    int64_t n = 0;
    for (; n + 4 <= state; n += 4)
        advance(4, rows, s, A2 + n, h + n, B.data + n, B.row, C.data + n, C.row, y);
    for (; n < state; n++)
        advance(1, rows, s, A2 + n, h + n, B.data + n, B.row, C.data + n, C.row, y);
}

static void skim_all(int64_t state, int rows, const Steps *s, const vf *A2, vf *h, Vectors B) {
    int64_t n = 0;
    for (; n + 4 <= state; n += 4)
        advance(4, rows, s, A2 + n, h + n, B.data + n, B.row, NULL, 0, NULL);
    for (; n < state; n++)
        advance(1, rows, s, A2 + n, h + n, B.data + n, B.row, NULL, 0, NULL);
}

typedef struct {
    Steps steps;
    vf g[STEPS];              /* gradient of y */
    vf r1[STEPS], r2[STEPS];  /* sum_n s B, sum_n s decay h[t-1] A */
    vf decay[2 * STEPS], moved[2 * STEPS], for_B[2 * STEPS], for_C[2 * STEPS];
} Walk;

/* run `count` state entries through a chunk and back; dB, dC (count, STEPS) are added to */
INLINE void walk(const int count, int rows, Walk *k, const vf *A2, const vf *A, const vf *h, vf *e,
                 vf *dA, const float *B, ptrdiff_t row_b, const float *C, ptrdiff_t row_c,
                 float *dB, float *dC) {
    const Steps *s = &k->steps;
    vf state[2], later[2], rate[2], slope[2];
    for (int j = 0; j < count; j++) state[j] = h[j], rate[j] = A2[j];
    for (int t = 0; t < rows; t++) {
        vf delta = s->delta[t], input = s->input[t], g = k->g[t];
        for (int j = 0; j < count; j++) {
            vf decay = exp2_of(delta * rate[j]), moved = decay * state[j];
            state[j] = moved + input * B[t * row_b + j];
            k->decay[j * STEPS + t] = decay;
            k->moved[j * STEPS + t] = moved;
            k->for_C[j * STEPS + t] = g * state[j];
        }
    }
    for (int j = 0; j < count; j++) later[j] = e[j], rate[j] = A[j], slope[j] = splat(0);
    for (int t = rows - 1; t >= 0; t--) {
        vf delta = s->delta[t], input = s->input[t], g = k->g[t], r1 = k->r1[t], r2 = k->r2[t];
        for (int j = 0; j < count; j++) {
            vf sent = g * C[t * row_c + j] + later[j];
            vf q = sent * k->moved[j * STEPS + t];
            k->for_B[j * STEPS + t] = sent * input;
            r1 += sent * B[t * row_b + j];
            r2 += q * rate[j];
            slope[j] += q * delta;
            later[j] = k->decay[j * STEPS + t] * sent;
        }
        k->r1[t] = r1;
        k->r2[t] = r2;
    }
    for (int j = 0; j < count; j++) {
        e[j] = later[j];
        dA[j] += slope[j];
        for (int t = rows; t % VL; t++)
            k->for_B[j * STEPS + t] = k->for_C[j * STEPS + t] = splat(0);
        for (int t = 0; t < rows; t += VL) {
            *(vf *)(dB + j * STEPS + t) += sums(k->for_B + j * STEPS + t);
            *(vf *)(dC + j * STEPS + t) += sums(k->for_C + j * STEPS + t);
        }
    }
}

#endif
