/* The selective scan on a CPU: equations in `reference.py`, gradients in `portable.py`.
 *
 * One vector holds the same state entry of VL adjacent channels ("a block"). Time runs in chunks
 * of 32 steps whose rows are first copied to the cache as float32, whatever their dtype and
 * direction; then the chunk is run for a few state entries at a time with those in registers.
 * Work is split into (sequence, panel of blocks) items, a contiguous range of them per part, and
 * sums over channels or sequences are added part by part: results repeat bit by bit for a given
 * number of parts. No -ffast-math: it removes the rounding in `rounded`.
 *
 *     lanes.h   vectors, exponentials, dtypes
 *     chunk.h   one chunk of one block
 *     here      parts, the forward and the backward of whole sequences
 *
 * Letters: S sequences, T tokens, D channels, N state, G groups.
 */
#include "chunk.h"

#define PANEL 4 /* blocks that share one pass over B and C */

typedef struct {
    Inputs in;
    const float *before; /* (T, D) y of the directions before this one, or NULL */
    float *y;            /* (T, D) sum of directions, before the gate, or NULL */
    Rows out;            /* absent but for the last direction */
    float *final;        /* (S, D, N) */
} Forward;

typedef struct {
    Inputs in;
    Rows dout;
    const float *y, *dfinal;                /* as the forward's; dfinal may be NULL */
    Rows dx, ddt, dz;                       /* dz absent but for one direction */
    int64_t add;                            /* dx is added to, not written */
    float *dA, *dB, *dC, *dD, *dbias, *dinitial; /* (D, N), 2 x (T, G, N) of zeros, ... */
} Backward;

typedef struct {
    int64_t per_group, blocks, panel, panels; /* channels, blocks, blocks a panel, panels a group */
    int64_t *bounds;                          /* (parts + 1,) ranges of items */
} Plan;

/* ---- plans and memory ---- */

static int make_plan(Plan *plan, const Inputs *in) {
    plan->per_group = in->dim / in->groups;
    plan->blocks = (plan->per_group + VL - 1) / VL;
    /* small panels where large ones would leave parts without work */
    for (plan->panel = PANEL; plan->panel > 1; plan->panel /= 2) {
        plan->panels = (plan->blocks + plan->panel - 1) / plan->panel;
        if (in->parts == 1 || in->sequences * in->groups * plan->panels >= 4 * in->parts) break;
    }
    plan->panels = (plan->blocks + plan->panel - 1) / plan->panel;
    plan->bounds = malloc(sizeof(int64_t) * (size_t)(in->parts + 1));
    if (!plan->bounds) return 1;
    /* parts of equal work: a sequence costs its steps and a few for starting */
    const int64_t per_sequence = in->groups * plan->panels, fixed = 4;
    int64_t tokens = in->cu ? in->length : in->sequences * in->length;
    double total = (double)(tokens + fixed * in->sequences), before = 0;
    int64_t part = 0;
    for (int64_t s = 0; s < in->sequences; s++) {
        double cost = (double)(sequence_of(in, s).length + fixed);
        for (; part < in->parts; part++) {
            double share = (total * (double)part / (double)in->parts - before) / cost;
            if (share >= 1) break;
            int64_t item = (int64_t)ceil(share * (double)per_sequence);
            plan->bounds[part] = s * per_sequence + (item < 0 ? 0 : item);
        }
        before += cost;
    }
    for (; part <= in->parts; part++) plan->bounds[part] = in->sequences * per_sequence;
    return 0;
}

typedef struct {
    Sequence sequence;
    int64_t index, group, block, channel, count; /* first block in the group, its channel, blocks */
} Item;

static Item item_of(const Inputs *in, const Plan *plan, int64_t item) {
    int64_t per_sequence = in->groups * plan->panels, s = item / per_sequence;
    int64_t group = item % per_sequence / plan->panels, block = item % plan->panels * plan->panel;
    int64_t left = plan->blocks - block;
    return (Item){sequence_of(in, s), s, group, block, group * plan->per_group + block * VL,
                  left < plan->panel ? left : plan->panel};
}

INLINE int lanes_of(const Plan *plan, int64_t block) {
    int64_t left = plan->per_group - block * VL;
    return (int)(left < VL ? left : VL);
}

static const float *row_of(const float *states, const Inputs *in, int64_t s, int64_t channel) {
    return states ? states + (s * in->dim + channel) * in->state : NULL;
}

#define LOG2_E 1.44269504f

/* ---- forward ---- */

static size_t forward_bytes(const Inputs *in) {
    return sizeof(vf) * (size_t)in->state * 2 * PANEL + 8 * STEPS * (size_t)in->state;
}

static void forward_item(const Forward *f, const Plan *plan, Item item, char *memory) {
    const Inputs *in = &f->in;
    const int64_t N = in->state;
    vf *A2 = (vf *)memory, *h = A2 + PANEL * N;
    float *buffer_b = (float *)(h + PANEL * N), *buffer_c = buffer_b + STEPS * N;
    const int64_t end = item.sequence.length;
    for (int64_t b = 0; b < item.count; b++) {
        int64_t channel = item.channel + b * VL;
        int lanes = lanes_of(plan, item.block + b);
        load_state(A2 + b * N, in->A + channel * N, N, lanes, LOG2_E);
        load_state(h + b * N, row_of(in->initial, in, item.index, channel), N, lanes, 1);
    }
    for (int64_t i = 0; i * STEPS < end; i++) {
        Chunk c = chunk_of(in, item.sequence, i, 0);
        Vectors B = vectors_of(&in->B, c, item.group, N, buffer_b);
        Vectors C = vectors_of(&in->C, c, item.group, N, buffer_c);
        for (int64_t b = 0; b < item.count; b++) {
            Steps s;
            vf y[STEPS], other[STEPS];
            int64_t channel = item.channel + b * VL;
            int lanes = lanes_of(plan, item.block + b);
            Rows before = {(char *)f->before, FLOAT32, in->length * in->dim, in->dim, 0};
            Rows kept = {(char *)f->y, FLOAT32, in->length * in->dim, in->dim, 0};
            load_steps(&s, in, c, channel, lanes);
            vf D = load_channels(in->D, channel, lanes);
            if (in->D)
                for (int t = 0; t < c.rows; t++) y[t] = D * s.x[t];
            else
                memset(y, 0, sizeof y);
            advance_all(N, c.rows, &s, A2 + b * N, h + b * N, B, C, y);
            if (f->before) {
                load_block(other, &before, c, channel, lanes);
                for (int t = 0; t < c.rows; t++) y[t] = other[t] + y[t];
            }
            if (f->y) store_block(&kept, y, c, channel, lanes);
            if (!f->out.data) continue;
            if (in->z.data) {
                load_block(other, &in->z, c, channel, lanes);
                for (int t = 0; t < c.rows; t++) y[t] *= other[t] * sigmoid(other[t]);
            }
            store_block(&f->out, y, c, channel, lanes);
        }
    }
    for (int64_t b = 0; b < item.count; b++)
        store_state((float *)row_of(f->final, in, item.index, item.channel + b * VL), h + b * N, N,
                    lanes_of(plan, item.block + b));
}

/* 0, or 1 where memory runs out */
int scanweave_scan_forward(const Forward *f) {
    Plan plan;
    if (make_plan(&plan, &f->in)) return 1;
    const int parts = (int)f->in.parts;
    size_t bytes = (forward_bytes(&f->in) + 63) / 64 * 64;
    char *memory = allocate(bytes * (size_t)parts);
    if (memory) {
        /* not a team of one: after a fork only that is safe */
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
        for (int part = 0; part < parts; part++)
            for (int64_t i = plan.bounds[part]; i < plan.bounds[part + 1]; i++)
                forward_item(f, &plan, item_of(&f->in, &plan, i), memory + (size_t)part * bytes);
    }
    free(memory);
    free(plan.bounds);
    return memory ? 0 : 1;
}

/* ---- backward ---- */

/* what one part adds up; `shared` are sequences that it does not run alone */
typedef struct {
    char *memory;
    vf *sums;        /* (G, blocks, N + 2): dA, dD, dbias */
    int64_t shared[2]; /* index of a sequence, or -1 */
    float *sums_of[2]; /* 2 x (its tokens, G, N) for dB and dC, or NULL */
} Part;

static size_t backward_bytes(const Inputs *in, const Plan *plan, int part) {
    int64_t longest = 0, per_sequence = in->groups * plan->panels;
    int64_t first = plan->bounds[part] / per_sequence, end = plan->bounds[part + 1];
    for (int64_t s = first; s * per_sequence < end; s++) {
        int64_t length = sequence_of(in, s).length;
        if (length > longest) longest = length;
    }
    size_t kept = (size_t)(longest / STEPS + 2) * (size_t)(plan->panel * in->state) * sizeof(vf);
    /* states at chunk starts; A2, A, e of a panel; rows of B and C; dB and dC of a chunk */
    return kept + 3 * PANEL * (size_t)in->state * sizeof(vf) + 16 * STEPS * (size_t)in->state;
}

static void backward_block(const Backward *k, Chunk c, int64_t channel, int lanes, const vf *A2,
                           const vf *A, const vf *h, vf *e, Vectors B, Vectors C, float *dB,
                           float *dC, vf *total) {
    const Inputs *in = &k->in;
    const int64_t N = in->state;
    Walk w;
    vf z[STEPS], y[STEPS];
    load_steps(&w.steps, in, c, channel, lanes);
    load_block(w.g, &k->dout, c, channel, lanes);
    if (in->z.data) {
        Rows kept = {(char *)k->y, FLOAT32, in->length * in->dim, in->dim, 0};
        load_block(z, &in->z, c, channel, lanes);
        if (k->dz.data) load_block(y, &kept, c, channel, lanes);
        for (int t = 0; t < c.rows; t++) {
            vf gate = sigmoid(z[t]), dout = w.g[t];
            w.g[t] = dout * z[t] * gate;
            if (k->dz.data) y[t] = dout * y[t] * gate * (1.f + z[t] * (1.f - gate));
        }
        if (k->dz.data) store_block(&k->dz, y, c, channel, lanes);
    }
    for (int t = 0; t < c.rows; t++) w.r1[t] = w.r2[t] = splat(0);
    int64_t n = 0;
    for (; n + 2 <= N; n += 2)
        walk(2, c.rows, &w, A2 + n, A + n, h + n, e + n, total + n, B.data + n, B.row, C.data + n,
             C.row, dB + n * STEPS, dC + n * STEPS);
    for (; n < N; n++)
        walk(1, c.rows, &w, A2 + n, A + n, h + n, e + n, total + n, B.data + n, B.row, C.data + n,
             C.row, dB + n * STEPS, dC + n * STEPS);
    vf D = load_channels(in->D, channel, lanes), dD = splat(0), dbias = splat(0);
    for (int t = 0; t < c.rows; t++) {
        vf x = w.steps.x[t];
        vf ddt = (w.r1[t] * x + w.r2[t]) * w.steps.slope[t];
        dD += w.g[t] * x;
        dbias += ddt;
        w.r1[t] *= w.steps.delta[t];
        if (in->D) w.r1[t] += D * w.g[t];
        w.r2[t] = ddt;
    }
    total[N] += dD;
    total[N + 1] += dbias;
    if (k->add) {
        load_block(y, &k->dx, c, channel, lanes);
        for (int t = 0; t < c.rows; t++) w.r1[t] += y[t];
    }
    store_block(&k->dx, w.r1, c, channel, lanes);
    store_block(&k->ddt, w.r2, c, channel, lanes);
}

static void backward_item(const Backward *k, const Plan *plan, Item item, Part *part) {
    const Inputs *in = &k->in;
    const int64_t N = in->state, G = in->groups, size = plan->panel * N;
    const int64_t chunks = (item.sequence.length + STEPS - 1) / STEPS;
    vf *A2 = (vf *)part->memory, *A = A2 + PANEL * N, *e = A + PANEL * N;
    float *buffer_b = (float *)(e + PANEL * N), *buffer_c = buffer_b + STEPS * N;
    float *chunk_b = buffer_c + STEPS * N, *chunk_c = chunk_b + STEPS * N;
    vf *kept = (vf *)(chunk_c + STEPS * N);
    vf *total = part->sums + (item.group * plan->blocks + item.block) * (N + 2);
    float *dB = k->dB + item.sequence.token * G * N, *dC = k->dC + item.sequence.token * G * N;
    for (int i = 0; i < 2; i++)
        if (part->shared[i] == item.index) {
            dB = part->sums_of[i];
            dC = dB + item.sequence.length * G * N;
        }
    for (int64_t b = 0; b < item.count; b++) {
        int64_t channel = item.channel + b * VL;
        int lanes = lanes_of(plan, item.block + b);
        load_state(A2 + b * N, in->A + channel * N, N, lanes, LOG2_E);
        load_state(A + b * N, in->A + channel * N, N, lanes, 1);
        load_state(kept + b * N, row_of(in->initial, in, item.index, channel), N, lanes, 1);
        load_state(e + b * N, row_of(k->dfinal, in, item.index, channel), N, lanes, 1);
    }
    for (int64_t i = 0; i + 1 < chunks; i++) {
        Chunk c = chunk_of(in, item.sequence, i, 0);
        Vectors B = vectors_of(&in->B, c, item.group, N, buffer_b);
        vf *h = kept + (i + 1) * size;
        memcpy(h, kept + i * size, (size_t)size * sizeof(vf));
        for (int64_t b = 0; b < item.count; b++) {
            Steps s;
            int lanes = lanes_of(plan, item.block + b);
            load_steps(&s, in, c, item.channel + b * VL, lanes);
            skim_all(N, c.rows, &s, A2 + b * N, h + b * N, B);
        }
    }
    for (int64_t i = chunks - 1; i >= 0; i--) {
        Chunk c = chunk_of(in, item.sequence, i, 1);
        Vectors B = vectors_of(&in->B, c, item.group, N, buffer_b);
        Vectors C = vectors_of(&in->C, c, item.group, N, buffer_c);
        memset(chunk_b, 0, 8 * STEPS * (size_t)N);
        for (int64_t b = 0; b < item.count; b++)
            backward_block(k, c, item.channel + b * VL, lanes_of(plan, item.block + b), A2 + b * N,
                           A + b * N, kept + i * size + b * N, e + b * N, B, C, chunk_b, chunk_c,
                           total + b * (N + 2));
        for (int t = 0; t < c.rows; t++) {
            int64_t token = token_of(c, t) - item.sequence.first;
            float *row_b = dB + (token * G + item.group) * N;
            float *row_c = dC + (token * G + item.group) * N;
            for (int64_t n = 0; n < N; n++) {
                row_b[n] += chunk_b[n * STEPS + t];
                row_c[n] += chunk_c[n * STEPS + t];
            }
        }
    }
    for (int64_t b = 0; b < item.count; b++)
        store_state((float *)row_of(k->dinitial, in, item.index, item.channel + b * VL), e + b * N,
                    N, lanes_of(plan, item.block + b));
}

static int open_part(Part *p, const Inputs *in, const Plan *plan, int part) {
    int64_t per_sequence = in->groups * plan->panels;
    int64_t low = plan->bounds[part], high = plan->bounds[part + 1];
    size_t blocks = (size_t)(in->groups * plan->blocks * (in->state + 2));
    *p = (Part){NULL, NULL, {-1, -1}, {NULL, NULL}};
    if (low == high) return 0;
    int64_t first = low / per_sequence, last = (high - 1) / per_sequence;
    if (low % per_sequence || (first == last && high % per_sequence)) p->shared[0] = first;
    if (last > first && high % per_sequence) p->shared[1] = last;
    for (int i = 0; i < 2; i++) {
        if (p->shared[i] < 0) continue;
        int64_t length = sequence_of(in, p->shared[i]).length;
        p->sums_of[i] = calloc((size_t)(2 * length * in->groups * in->state) + 1, sizeof(float));
        if (!p->sums_of[i]) return 1;
    }
    p->memory = allocate(backward_bytes(in, plan, part));
    p->sums = allocate(blocks * sizeof(vf));
    if (!p->memory || !p->sums) return 1;
    memset(p->sums, 0, blocks * sizeof(vf));
    return 0;
}

/* dA, dD and dbias of one block, over all parts in their order */
static void add_block(const Backward *k, const Plan *plan, const Part *parts, int64_t index) {
    const Inputs *in = &k->in;
    const int64_t N = in->state, group = index / plan->blocks, block = index % plan->blocks;
    const int64_t channel = group * plan->per_group + block * VL;
    const int lanes = lanes_of(plan, block);
    for (int64_t n = 0; n < N + 2; n++) {
        vf total = splat(0);
        for (int part = 0; part < (int)in->parts; part++)
            if (parts[part].sums) total += parts[part].sums[index * (N + 2) + n];
        for (int i = 0; i < lanes; i++) {
            float v = ((float *)&total)[i];
            if (n < N) k->dA[(channel + i) * N + n] = v;
            else if (n == N) k->dD[channel + i] = v;
            else k->dbias[channel + i] = v;
        }
    }
}

/* a slice of the dB and dC of the shared sequences, over all parts in their order */
static void add_shared(const Backward *k, const Part *parts, int slice) {
    const Inputs *in = &k->in;
    const int64_t row = in->groups * in->state;
    for (int part = 0; part < (int)in->parts; part++)
        for (int i = 0; i < 2; i++) {
            if (parts[part].shared[i] < 0) continue;
            Sequence q = sequence_of(in, parts[part].shared[i]);
            const float *from = parts[part].sums_of[i], *from_c = from + q.length * row;
            float *to_b = k->dB + q.token * row, *to_c = k->dC + q.token * row;
            int64_t stop = q.length * (slice + 1) / in->parts * row;
            for (int64_t n = q.length * slice / in->parts * row; n < stop; n++) {
                to_b[n] += from[n];
                to_c[n] += from_c[n];
            }
        }
}

/* 0, or 1 where memory runs out */
int scanweave_scan_backward(const Backward *k) {
    const Inputs *in = &k->in;
    const int count = (int)in->parts;
    Plan plan;
    if (make_plan(&plan, in)) return 1;
    Part *parts = calloc((size_t)count, sizeof(Part));
    int failed = !parts;
    for (int part = 0; part < count && !failed; part++)
        failed = open_part(parts + part, in, &plan, part);
    if (!failed) {
        int64_t blocks = in->groups * plan.blocks;
#pragma omp parallel num_threads(count) if (count > 1)
        {
#pragma omp for schedule(static, 1)
            for (int part = 0; part < count; part++)
                for (int64_t i = plan.bounds[part]; i < plan.bounds[part + 1]; i++)
                    backward_item(k, &plan, item_of(in, &plan, i), parts + part);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < blocks; i++) add_block(k, &plan, parts, i);
#pragma omp for schedule(static, 1)
            for (int slice = 0; slice < count; slice++) add_shared(k, parts, slice);
        }
    }
    for (int part = 0; parts && part < count; part++) {
        free(parts[part].memory);
        free(parts[part].sums);
        free(parts[part].sums_of[0]);
        free(parts[part].sums_of[1]);
    }
    free(parts);
    free(plan.bounds);
    return failed;
}
