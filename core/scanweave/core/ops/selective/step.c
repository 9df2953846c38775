/* One token of the selective scan on a CPU, state updated in place: equations in `reference.py`.
 *
 * An item is VL adjacent channels of one group and batch row: their time steps are one vector. The
 * states of a channel are adjacent in memory, so vectors run along them where they fill vectors,
 * else along all states of the block at once, beside rows that repeat what a channel or a state
 * entry has. Items share nothing: results do not depend on threads.
 *
 * Letters: B batch, D channels, N state, G groups.
 */
#include "lanes.h"

#define LOG2_E 1.44269504f

typedef struct {
    char *data; /* NULL: absent */
    int64_t type, batch, group; /* strides in elements; channels or states are adjacent */
} Rows;

typedef struct {
    int64_t parts, batch, dim, state, groups, softplus;
    float *h; /* (B, D, N), updated */
    int64_t h_batch, h_channel;
    const float *A, *D, *bias; /* (D, N), (D,), (D,); contiguous */
    Rows x, dt, z, B, C, y;
} Step;

INLINE vf read_lanes(const Rows *r, int64_t b, int64_t channel, int lanes) {
    vf v = splat(0);
    load((float *)&v, r->data, r->type, b * r->batch + channel, lanes);
    return v;
}

INLINE vf small(const float *from, int64_t channel, int lanes) {
    vf v = splat(0);
    memcpy(&v, from + channel, 4 * (size_t)lanes);
    return v;
}

INLINE vf unaligned(const float *from) {
    vf v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* y of a block whose channels have a whole number of vectors of states each */
static vf wide(const Step *s, float *h, const float *A, vf delta, vf x, const float *B,
               const float *C, int lanes) {
    vf y[VL];
    memset(y, 0, sizeof y);
    for (int d = 0; d < lanes; d++)
        for (int64_t n = 0; n < s->state; n += VL) {
            float *at = h + d * s->h_channel + n;
            vf decay = exp2_of(unaligned(A + d * s->state + n) * delta[d]);
            vf now = decay * unaligned(at) + unaligned(B + n) * x[d];
            memcpy(at, &now, sizeof now);
            y[d] += now * unaligned(C + n);
        }
    return sums(y);
}

/* any N, in `rows` for time steps, inputs and states: 3 x N vectors; B and C repeat for VL channels */
INLINE vf narrow_of(const Step *s, float *h, const float *A, vf delta, vf x, const vf *B,
                    const vf *C, int lanes, vf *rows, const int64_t N) {
    vf *now = rows + 2 * N;
    float *deltas = (float *)rows, *inputs = (float *)(rows + N), *states = (float *)now;
    if (N == 1 && s->h_channel == 1) { /* channels are adjacent: nothing to repeat */
        vf old = small(h, 0, lanes), last = exp2_of(delta * small(A, 0, lanes)) * old + x * B[0];
        memcpy(h, &last, 4 * (size_t)lanes);
        return last * C[0];
    }
    for (int d = 0; d < lanes; d++)
        for (int64_t n = 0; n < N; n++) {
            deltas[d * N + n] = delta[d] * A[d * N + n];
            inputs[d * N + n] = x[d];
            states[d * N + n] = h[d * s->h_channel + n];
        }
    for (int64_t i = 0; i * VL < lanes * N; i++)
        now[i] = exp2_of(rows[i]) * now[i] + rows[N + i] * B[i];
    for (int d = 0; d < lanes; d++)
        for (int64_t n = 0; n < N; n++) h[d * s->h_channel + n] = states[d * N + n];
    for (int64_t i = 0; i * VL < lanes * N; i++) now[i] *= C[i];
    vf y = splat(0);
    for (int d = 0; d < lanes; d++) {
        float sum = 0;
        for (int64_t n = 0; n < N; n++) sum += states[d * N + n];
        y[d] = sum;
    }
    return y;
}

static vf narrow(const Step *s, float *h, const float *A, vf delta, vf x, const vf *B, const vf *C,
                 int lanes, vf *rows) {
    switch (s->state) { /* loops of known length */
    case 1: return narrow_of(s, h, A, delta, x, B, C, lanes, rows, 1);
    case 4: return narrow_of(s, h, A, delta, x, B, C, lanes, rows, 4);
    case 8: return narrow_of(s, h, A, delta, x, B, C, lanes, rows, 8);
    default: return narrow_of(s, h, A, delta, x, B, C, lanes, rows, s->state);
    }
}

/* blocks [first, last) of one group of one batch row */
static void run_blocks(const Step *s, int64_t b, int64_t group, int64_t first, int64_t last,
                       vf *memory) {
    const int64_t N = s->state, per_group = s->dim / s->groups;
    float *B = (float *)memory, *C = (float *)(memory + N);
    load(B, s->B.data, s->B.type, b * s->B.batch + group * s->B.group, (int)N);
    load(C, s->C.data, s->C.type, b * s->C.batch + group * s->C.group, (int)N);
    if (N % VL)
        for (int64_t i = N; i < VL * N; i++) B[i] = B[i - N], C[i] = C[i - N];
    for (int64_t block = first; block < last; block++) {
        int64_t left = per_group - block * VL, channel = group * per_group + block * VL;
        int lanes = (int)(left < VL ? left : VL);
        vf x = read_lanes(&s->x, b, channel, lanes), delta = read_lanes(&s->dt, b, channel, lanes);
        vf slope;
        if (s->bias) delta += small(s->bias, channel, lanes);
        if (s->softplus) delta = softplus(delta, &slope);
        float *h = s->h + b * s->h_batch + channel * s->h_channel;
        const float *A = s->A + channel * N;
        vf steps = delta * LOG2_E, inputs = delta * x;
        vf y = N % VL ? narrow(s, h, A, steps, inputs, memory, memory + N, lanes, memory + 2 * N)
                      : wide(s, h, A, steps, inputs, B, C, lanes);
        if (s->D) y += small(s->D, channel, lanes) * x;
        if (s->z.data) {
            vf z = read_lanes(&s->z, b, channel, lanes);
            y *= z * sigmoid(z);
        }
        store(s->y.data, (const float *)&y, s->y.type, b * s->y.batch + channel, lanes);
    }
}

/* 0, or 1 without memory */
int scanweave_step(const Step *s) {
    const int64_t per_group = s->dim / s->groups, blocks = (per_group + VL - 1) / VL;
    /* whole groups, but where that leaves threads without work */
    const int64_t rows = s->batch * s->groups, cut = s->parts > rows ? (blocks + 3) / 4 : blocks;
    const int64_t cuts = blocks ? (blocks + cut - 1) / cut : 0;
    int failed = 0;
#pragma omp parallel num_threads((int)s->parts) if (s->parts > 1) reduction(| : failed)
    {
        void *memory = allocate(sizeof(vf) * (size_t)(5 * s->state));
        if (memory) memset(memory, 0, sizeof(vf) * (size_t)(5 * s->state));
        failed |= !memory;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * cuts; i++) {
            if (!memory) continue;
            int64_t row = i / cuts, first = i % cuts * cut, last = first + cut;
            run_blocks(s, row / s->groups, row % s->groups, first, last < blocks ? last : blocks,
                       memory);
        }
        free(memory);
    }
    return failed;
}
