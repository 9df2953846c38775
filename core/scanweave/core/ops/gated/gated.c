/* The matrix-state scan on a CPU, one direction: equations in `reference.py`.
 *
 * Step by step, with the state in the cache: a chunk's matrix products need as many operations for
 * heads of 64 channels, and exponentials of all pairs besides. Work is split into items that share
 * nothing: a sequence, a head and two vectors of values in the forward, a sequence and a head in
 * the backward, so that results do not depend on threads. Gradients of q and k are those of every
 * head, added by the caller over a group.
 *
 * Lanes run along the values in the forward, where an output is a sum over keys, and along the keys
 * in the backward, where only the gradient of a value is:
 *
 *     E[t]  = exp(g[t + 1]) E[t + 1] + q[t] do[t]^T              gradient of h[t]
 *     dq[t] = h[t] do[t]           dk[t] = E[t] v[t]             dv[t] = E[t]^T k[t]
 *     dg[t] = exp(g[t]) h[t - 1] E[t], summed over values
 *
 * with v times `write`. The backward keeps a state per chunk, then walks the chunks from the last
 * one and computes their states again, for a vector of keys and four values at a time.
 *
 * Letters: S sequences, T tokens, H heads, G groups, K keys, V values.
 */
#include "heads.h"

#define STEPS 16 /* of a chunk; more where too many states were kept */
#define MOST_STEPS 128
#define MOST_KEPT ((int64_t)1 << 21) /* floats of a thread */
#define AT_ONCE (VL == 16 ? 4 : 2)   /* tokens, as many as registers allow */
#define QUAD 4                       /* values at once in the backward */

typedef struct {
    Inputs in;
    float *out, *final; /* (B, L, H, V), (S, H, K, V); `final` may be `initial` */
} Forward;

typedef struct {
    Inputs in;
    Rows dout;
    const float *dfinal;               /* (S, H, K, V) or NULL */
    float *dq, *dk, *dv, *dg, *dwrite; /* (B, L, H, K) twice, then as v, g and write */
    float *dinitial;                   /* (S, H, K, V) */
} Backward;

/* ---- forward ---- */

/* `count` tokens: state (K, 2) vectors in place, outputs to `o` */
INLINE void advance(vf *h, const float *q, const float *k, const float *a, const vf *v, vf *o,
                    int64_t keys, int64_t row, int count, int64_t exclusive, int64_t decay) {
    vf sum[AT_ONCE][2], value[AT_ONCE][2];
    for (int t = 0; t < count; t++)
        for (int c = 0; c < 2; c++) {
            sum[t][c] = splat(0);
            value[t][c] = v[2 * t + c];
        }
    for (int64_t i = 0; i < keys; i++) {
        vf now[2] = {h[2 * i], h[2 * i + 1]};
        for (int t = 0; t < count; t++) {
            vf key = splat(k[t * row + i]), query = splat(q[t * row + i]);
            vf across = splat(a[t * row + (decay == OF_KEY ? i : 0)]);
            for (int c = 0; c < 2; c++) {
                if (exclusive) sum[t][c] += query * now[c];
                if (decay != NO_DECAY) now[c] *= across;
                now[c] += key * value[t][c];
                if (!exclusive) sum[t][c] += query * now[c];
            }
        }
        h[2 * i] = now[0];
        h[2 * i + 1] = now[1];
    }
    for (int t = 0; t < count; t++)
        for (int c = 0; c < 2; c++) o[2 * t + c] = sum[t][c];
}

#define ADVANCE(exclusive, decay)                                                             \
    for (; t + AT_ONCE <= count; t += AT_ONCE)                                                \
        advance(h, q + t * row, k + t * row, a + t * row, v + 2 * t, o + 2 * t, keys, row,    \
                AT_ONCE, exclusive, decay);                                                   \
    for (; t < count; t++)                                                                    \
        advance(h, q + t * row, k + t * row, a + t * row, v + 2 * t, o + 2 * t, keys, row, 1, \
                exclusive, decay);

static void advance_all(vf *h, const float *q, const float *k, const float *a, const vf *v, vf *o,
                        int64_t keys, int64_t row, int64_t count, const Inputs *in) {
    int64_t t = 0;
    if (in->exclusive) {
        if (in->decay == OF_KEY) { ADVANCE(1, OF_KEY) }
        else if (in->decay == OF_HEAD) { ADVANCE(1, OF_HEAD) }
        else { ADVANCE(1, NO_DECAY) }
    } else {
        if (in->decay == OF_KEY) { ADVANCE(0, OF_KEY) }
        else if (in->decay == OF_HEAD) { ADVANCE(0, OF_HEAD) }
        else { ADVANCE(0, NO_DECAY) }
    }
}

static int64_t forward_floats(const Inputs *in, const Sizes *size) {
    return in->keys * COLUMNS + 3 * STEPS * size->keys + 2 * STEPS * COLUMNS;
}

static void forward_item(const Forward *f, const Item *item, const Sizes *size, float *memory) {
    const Inputs *in = &f->in;
    float *h = memory, *q = h + in->keys * COLUMNS, *k = q + STEPS * size->keys;
    float *a = k + STEPS * size->keys, *v = a + STEPS * size->keys, *o = v + STEPS * COLUMNS;
    const int64_t rows = (item->sequence * in->heads + item->head) * in->keys;
    const size_t bytes = sizeof(float) * (size_t)item->lanes;
    for (int64_t i = 0; i < in->keys; i++) {
        memset(h + i * COLUMNS, 0, sizeof(float) * COLUMNS);
        if (in->initial)
            memcpy(h + i * COLUMNS, in->initial + (rows + i) * in->width + item->column, bytes);
    }
    for (int64_t start = 0; start < item->length; start += STEPS) {
        int64_t left = item->length - start, count = left < STEPS ? left : STEPS;
        read_keys(q, k, a, in, item, size, start, count);
        for (int64_t i = 0; i < count; i++) {
            float *row = v + i * COLUMNS, write = write_of(in, item, start + i);
            read_row(row, in, &in->v, item, item->head, start + i, item->column, item->lanes);
            for (int c = 0; c < COLUMNS; c += VL) *(vf *)(row + c) *= write;
        }
        advance_all((vf *)h, q, k, a, (vf *)v, (vf *)o, in->keys, size->keys, count, in);
        for (int64_t i = 0; i < count; i++) {
            int64_t token = item->batch * in->length + token_of(in, item, start + i);
            memcpy(f->out + (token * in->heads + item->head) * in->width + item->column,
                   o + i * COLUMNS, bytes);
        }
    }
    for (int64_t i = 0; i < in->keys; i++)
        memcpy(f->final + (rows + i) * in->width + item->column, h + i * COLUMNS, bytes);
}

/* ---- backward ---- */

/* what a thread holds of a chunk; rows of whole vectors, states (V, K) */
typedef struct {
    float *q, *k, *a, *dq, *dk, *dg;  /* (steps, K) */
    float *v, *written, *dout, *dv;   /* (steps, V) */
    float *h, *e, *kept;              /* state, its gradient, and (chunks, V, K) states */
    vf *states, *sums;                /* (steps, QUAD): before each token; gradients of values */
} Chunk;

static int64_t backward_floats(const Sizes *size) {
    return size->steps * (6 * size->keys + 4 * size->width + 2 * QUAD * VL) +
           (2 + size->chunks) * size->keys * size->width;
}

static Chunk chunk_in(float *memory, const Sizes *size) {
    Chunk c;
    float **of_keys[] = {&c.q, &c.k, &c.a, &c.dq, &c.dk, &c.dg};
    float **of_values[] = {&c.v, &c.written, &c.dout, &c.dv};
    for (int i = 0; i < 6; i++, memory += size->steps * size->keys) *of_keys[i] = memory;
    for (int i = 0; i < 4; i++, memory += size->steps * size->width) *of_values[i] = memory;
    c.states = (vf *)memory;
    c.sums = c.states + size->steps * QUAD;
    c.h = (float *)(c.sums + size->steps * QUAD);
    c.e = c.h + size->keys * size->width;
    c.kept = c.e + size->keys * size->width;
    return c;
}

/* (K, V) of a sequence and head to (V, K) in whole vectors, and back */
static void turn_in(float *to, const float *from, const Inputs *in, const Item *item,
                    const Sizes *size) {
    memset(to, 0, sizeof(float) * (size_t)(size->keys * size->width));
    if (!from) return;
    from += (item->sequence * in->heads + item->head) * in->keys * in->width;
    for (int64_t i = 0; i < in->keys; i++)
        for (int64_t j = 0; j < in->width; j++) to[j * size->keys + i] = from[i * in->width + j];
}

static void turn_out(float *to, const float *from, const Inputs *in, const Item *item,
                     const Sizes *size) {
    to += (item->sequence * in->heads + item->head) * in->keys * in->width;
    for (int64_t i = 0; i < in->keys; i++)
        for (int64_t j = 0; j < in->width; j++) to[i * in->width + j] = from[j * size->keys + i];
}

static void read_chunk(const Chunk *c, const Inputs *in, const Rows *dout, const Item *item,
                       const Sizes *size, int64_t start, int64_t count) {
    read_keys(c->q, c->k, c->a, in, item, size, start, count);
    for (int64_t i = 0; i < count; i++) {
        const vf write = splat(write_of(in, item, start + i));
        float *v = c->v + i * size->width, *written = c->written + i * size->width;
        read_row(v, in, &in->v, item, item->head, start + i, 0, in->width);
        for (int64_t j = 0; j < size->width; j += VL) *(vf *)(written + j) = *(vf *)(v + j) * write;
        if (dout)
            read_row(c->dout + i * size->width, in, dout, item, item->head, start + i, 0,
                     in->width);
    }
}

/* the state `h` over a chunk */
static void run_states(const Chunk *c, const Sizes *size, int64_t count) {
    for (int64_t j = 0; j < size->width; j += QUAD)
        for (int64_t n = 0; n < size->keys; n += VL) {
            float *place = c->h + j * size->keys + n;
            vf h[QUAD];
            for (int x = 0; x < QUAD; x++) h[x] = *(vf *)(place + x * size->keys);
            for (int64_t t = 0; t < count; t++) {
                const vf a = *(vf *)(c->a + t * size->keys + n);
                const vf k = *(vf *)(c->k + t * size->keys + n);
                const float *written = c->written + t * size->width + j;
                for (int x = 0; x < QUAD; x++) h[x] = a * h[x] + k * splat(written[x]);
            }
            for (int x = 0; x < QUAD; x++) *(vf *)(place + x * size->keys) = h[x];
        }
}

/* a chunk's tokens back, for VL keys and QUAD values from `j`: their `e` is moved to the state that
 * entered, which is `kept`; gradients of keys are added to, those of values are in `sums` */
INLINE void walk_back(const Chunk *c, const Sizes *size, const float *kept, int64_t j, int64_t n,
                      int64_t count, int64_t exclusive) {
    float *place = c->e + j * size->keys + n;
    vf h[QUAD], e[QUAD];
    for (int x = 0; x < QUAD; x++) {
        h[x] = *(const vf *)(kept + (j + x) * size->keys + n);
        e[x] = *(vf *)(place + x * size->keys);
    }
    for (int64_t t = 0; t < count; t++) {
        const vf a = *(vf *)(c->a + t * size->keys + n), k = *(vf *)(c->k + t * size->keys + n);
        const float *written = c->written + t * size->width + j;
        for (int x = 0; x < QUAD; x++) {
            c->states[t * QUAD + x] = h[x];
            h[x] = a * h[x] + k * splat(written[x]);
        }
    }
    for (int64_t t = count - 1; t >= 0; t--) {
        const int64_t at = t * size->keys + n;
        const vf q = *(vf *)(c->q + at), k = *(vf *)(c->k + at), a = *(vf *)(c->a + at);
        const float *written = c->written + t * size->width + j;
        const float *dout = c->dout + t * size->width + j;
        vf dq = *(vf *)(c->dq + at), dk = *(vf *)(c->dk + at), dg = *(vf *)(c->dg + at);
        for (int x = 0; x < QUAD; x++) {
            const vf before = c->states[t * QUAD + x], out = splat(dout[x]);
            if (!exclusive) e[x] += q * out;
            dq += before * out;
            dk += e[x] * splat(written[x]);
            dg += e[x] * before;
            c->sums[t * QUAD + x] = n ? c->sums[t * QUAD + x] + e[x] * k : e[x] * k;
            e[x] *= a;
            if (exclusive) e[x] += q * out;
        }
        *(vf *)(c->dq + at) = dq;
        *(vf *)(c->dk + at) = dk;
        *(vf *)(c->dg + at) = dg;
    }
    for (int x = 0; x < QUAD; x++) *(vf *)(place + x * size->keys) = e[x];
}

static void values_back(const Chunk *c, const Sizes *size, int64_t j, int64_t count) {
    for (int64_t i = 0; i < count * QUAD; i += VL) {
        const vf found = sums(c->sums + i);
        for (int64_t t = 0; t < VL / QUAD; t++)
            memcpy(c->dv + (i / QUAD + t) * size->width + j, (const float *)&found + t * QUAD,
                   sizeof(float) * QUAD);
    }
}

INLINE float lanes_of(vf v) {
    float sum = 0.f;
    for (int i = 0; i < VL; i++) sum += v[i];
    return sum;
}

INLINE float dot(const float *a, const float *b, int64_t count) {
    vf total = splat(0);
    for (int64_t i = 0; i < count; i += VL) total += *(const vf *)(a + i) * *(const vf *)(b + i);
    return lanes_of(total);
}

/* gradients of a chunk's tokens from what was summed over values */
static void write_gradients(const Backward *b, const Chunk *c, const Item *item, const Sizes *size,
                            int64_t start, int64_t count) {
    const Inputs *in = &b->in;
    const size_t of_keys = sizeof(float) * (size_t)in->keys;
    for (int64_t t = 0; t < count; t++) {
        float *dq = c->dq + t * size->keys, *dg = c->dg + t * size->keys;
        float *dv = c->dv + t * size->width, *written = c->written + t * size->width;
        const float *k = c->k + t * size->keys, *a = c->a + t * size->keys;
        const int64_t place = item->batch * in->length + token_of(in, item, start + t);
        const int64_t at = place * in->heads + item->head;
        if (!in->exclusive) {
            /* the sums are over the state before the token */
            const vf own = splat(dot(c->dout + t * size->width, written, size->width));
            for (int64_t n = 0; n < size->keys; n += VL)
                *(vf *)(dq + n) = *(vf *)(a + n) * *(vf *)(dq + n) + *(vf *)(k + n) * own;
        }
        memcpy(b->dk + at * in->keys, c->dk + t * size->keys, of_keys);
        if (!in->shift) {
            memcpy(b->dq + at * in->keys, dq, of_keys);
        } else if (start + t) {
            const int64_t read = item->batch * in->length + token_of(in, item, start + t - 1);
            memcpy(b->dq + (read * in->heads + item->head) * in->keys, dq, of_keys);
        }
        if (in->decay == OF_HEAD) {
            vf total = splat(0);
            for (int64_t n = 0; n < size->keys; n += VL) total += *(vf *)(dg + n);
            b->dg[at] = a[0] * lanes_of(total);
        } else if (in->decay == OF_KEY) {
            for (int64_t n = 0; n < size->keys; n += VL) *(vf *)(dg + n) *= *(vf *)(a + n);
            memcpy(b->dg + at * in->keys, dg, of_keys);
        }
        if (in->write.data) {
            b->dwrite[at] = dot(dv, c->v + t * size->width, size->width);
            const vf write = splat(write_of(in, item, start + t));
            for (int64_t j = 0; j < size->width; j += VL) *(vf *)(dv + j) *= write;
        }
        memcpy(b->dv + at * in->width, dv, sizeof(float) * (size_t)in->width);
    }
}

static void backward_item(const Backward *b, const Item *item, const Sizes *size, float *memory) {
    const Inputs *in = &b->in;
    const Chunk c = chunk_in(memory, size);
    const int64_t chunks = (item->length + size->steps - 1) / size->steps;
    const int64_t state = size->keys * size->width;
    turn_in(c.h, in->initial, in, item, size);
    for (int64_t i = 0; i < chunks; i++) {
        memcpy(c.kept + i * state, c.h, sizeof(float) * (size_t)state);
        if (i == chunks - 1) break;
        read_chunk(&c, in, NULL, item, size, i * size->steps, size->steps);
        run_states(&c, size, size->steps);
    }
    turn_in(c.e, b->dfinal, in, item, size);
    for (int64_t i = chunks - 1; i >= 0; i--) {
        int64_t start = i * size->steps, left = item->length - start;
        int64_t count = left < size->steps ? left : size->steps;
        read_chunk(&c, in, &b->dout, item, size, start, count);
        memset(c.dq, 0, sizeof(float) * (size_t)(3 * size->steps * size->keys));
        for (int64_t j = 0; j < size->width; j += QUAD) {
            for (int64_t n = 0; n < size->keys; n += VL)
                if (in->exclusive) walk_back(&c, size, c.kept + i * state, j, n, count, 1);
                else walk_back(&c, size, c.kept + i * state, j, n, count, 0);
            values_back(&c, size, j, count);
        }
        write_gradients(b, &c, item, size, start, count);
    }
    turn_out(b->dinitial, c.e, in, item, size);
}

/* ---- all items ---- */

/* 0, or 1 without memory */
static int run(const Inputs *in, const Forward *f, const Backward *b) {
    Sizes size = {(in->keys + VL - 1) / VL * VL, (in->width + VL - 1) / VL * VL, STEPS, 0};
    const int64_t length = longest(in), columns = f ? (in->width + COLUMNS - 1) / COLUMNS : 1;
    while (size.steps < MOST_STEPS && length / size.steps * size.keys * size.width > MOST_KEPT)
        size.steps *= 2;
    size.chunks = (length + size.steps - 1) / size.steps;
    const int64_t items = in->sequences * in->heads * columns;
    const size_t bytes =
        sizeof(float) * (size_t)(f ? forward_floats(in, &size) : backward_floats(&size));
    int failed = 0;
#pragma omp parallel num_threads((int)in->parts) reduction(| : failed)
    {
        float *memory = allocate(bytes);
        if (memory) memset(memory, 0, bytes); /* lanes past K and V */
        failed |= !memory;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; i++) {
            if (!memory) continue;
            int64_t row = i / columns;
            Item item = item_of(in, row / in->heads, row % in->heads, i % columns * COLUMNS);
            if (f) forward_item(f, &item, &size, memory);
            else backward_item(b, &item, &size, memory);
        }
        free(memory);
    }
    return failed;
}

int scanweave_gated_forward(const Forward *f) { return run(&f->in, f, NULL); }
int scanweave_gated_backward(const Backward *b) { return run(&b->in, NULL, b); }
