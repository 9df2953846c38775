/* The linear scan on a CPU, real numbers: equations in `reference.py`, gradients in `portable.py`.
 *
 * Work is split into (sequence, panel of channels) items, which share nothing. A panel is a few
 * vectors wide, so that the state of one lane never waits for another's; time runs in chunks whose
 * rows are first copied to the cache as float32, whatever their dtype and direction. The backward
 * keeps the state of every chunk, then walks the chunks from the last one. Gradients of constant
 * decays are a row per sequence, added by the caller: results do not depend on threads.
 *
 * Letters: S sequences, T tokens, D channels.
 */
#include "../selective/lanes.h"

#define VECTORS 4
#define PANEL (VECTORS * VL) /* channels */
#define STEPS 32             /* of a chunk */
#define LOG2_E 1.44269504f

typedef struct {
    int64_t pointer, type, batch, step; /* dtype and strides of (B, L, D), channels adjacent */
} Rows;

typedef struct {
    int64_t parts, sequences, length, dim, reverse, constant;
    const int64_t *cu;    /* (S + 1,) or NULL */
    const float *initial; /* (S, D) or NULL */
    Rows x, log_a;        /* log_a of constant decays: (D,) float32 */
} Inputs;

typedef struct {
    Inputs in;
    Rows h;
    float *final; /* (S, D) */
} Forward;

typedef struct {
    Inputs in;
    Rows dh;
    const float *dfinal; /* (S, D) or NULL */
    Rows dx, dlog_a;     /* dlog_a of constant decays: (S, D) float32 */
    float *dinitial;     /* (S, D) */
} Backward;

typedef float Panel[PANEL] __attribute__((aligned(64)));

typedef struct {
    int64_t batch, first, length, channel;
    int lanes;
} Item;

static Item item_of(const Inputs *in, int64_t panels, int64_t item) {
    int64_t s = item / panels, channel = item % panels * PANEL, left = in->dim - channel;
    Item found = {in->cu ? 0 : s, in->cu ? in->cu[s] : 0,
                  in->cu ? in->cu[s + 1] - in->cu[s] : in->length, channel,
                  (int)(left < PANEL ? left : PANEL)};
    return found;
}

/* where the row of a step is, in elements */
INLINE int64_t at(const Inputs *in, const Rows *rows, const Item *item, int64_t step) {
    int64_t token = item->first + (in->reverse ? item->length - 1 - step : step);
    return item->batch * rows->batch + token * rows->step + item->channel;
}

static void read_rows(Panel *to, const Inputs *in, const Rows *rows, const Item *item,
                      int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        load(to[i], (const char *)rows->pointer, rows->type, at(in, rows, item, start + i),
             item->lanes);
}

static void write_rows(Panel *from, const Inputs *in, const Rows *rows, const Item *item,
                       int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        store((char *)rows->pointer, from[i], rows->type, at(in, rows, item, start + i),
              item->lanes);
}

static void decays(Panel rows) {
    vf *v = (vf *)rows;
    for (int i = 0; i < VECTORS; i++) v[i] = exp2_of(v[i] * LOG2_E);
}

/* decays of a chunk; constant ones are computed once, in a[0] */
static void read_decays(Panel *a, const Inputs *in, const Item *item, int64_t start,
                        int64_t count) {
    read_rows(a, in, &in->log_a, item, start, count);
    for (int64_t i = 0; i < count; i++) decays(a[i]);
}

static void read_state(Panel h, const float *states, const Inputs *in, int64_t s,
                       const Item *item) {
    memset(h, 0, sizeof(Panel));
    if (states) memcpy(h, states + s * in->dim + item->channel, 4 * (size_t)item->lanes);
}

static void write_state(float *states, Panel h, const Inputs *in, int64_t s, const Item *item) {
    memcpy(states + s * in->dim + item->channel, h, 4 * (size_t)item->lanes);
}

/* states of a chunk in place of its inputs */
static void run_chunk(Panel *x, Panel *a, int64_t constant, Panel state, int64_t count) {
    vf h[VECTORS];
    memcpy(h, state, sizeof(Panel));
    for (int64_t i = 0; i < count; i++) {
        const vf *decay = (const vf *)a[constant ? 0 : i];
        vf *now = (vf *)x[i];
        for (int v = 0; v < VECTORS; v++) now[v] = h[v] = decay[v] * h[v] + now[v];
    }
    memcpy(state, h, sizeof(Panel));
}

static void forward_item(const Forward *f, int64_t s, Item item, Panel *memory) {
    const Inputs *in = &f->in;
    Panel *x = memory, *a = memory + STEPS, *h = memory + 2 * STEPS;
    read_state(*h, in->initial, in, s, &item);
    if (in->constant) {
        load(a[0], (const char *)in->log_a.pointer, FLOAT32, item.channel, item.lanes);
        decays(a[0]);
    }
    for (int64_t start = 0; start < item.length; start += STEPS) {
        int64_t left = item.length - start, count = left < STEPS ? left : STEPS;
        read_rows(x, in, &in->x, &item, start, count);
        if (!in->constant) read_decays(a, in, &item, start, count);
        run_chunk(x, a, in->constant, *h, count);
        write_rows(x, in, &f->h, &item, start, count);
    }
    write_state(f->final, *h, in, s, &item);
}

static void backward_item(const Backward *b, int64_t s, Item item, Panel *memory, Panel *kept) {
    const Inputs *in = &b->in;
    Panel *x = memory, *a = memory + STEPS, *h = memory + 2 * STEPS, *g = h + 1, *total = g + STEPS;
    const int64_t chunks = (item.length + STEPS - 1) / STEPS;
    read_state(*h, in->initial, in, s, &item);
    memset(total, 0, sizeof(Panel));
    if (in->constant) {
        load(a[0], (const char *)in->log_a.pointer, FLOAT32, item.channel, item.lanes);
        decays(a[0]);
    }
    for (int64_t c = 0; c < chunks; c++) {
        memcpy(kept[c], h, sizeof(Panel));
        if (c == chunks - 1) break;
        read_rows(x, in, &in->x, &item, c * STEPS, STEPS);
        if (!in->constant) read_decays(a, in, &item, c * STEPS, STEPS);
        run_chunk(x, a, in->constant, *h, STEPS);
    }
    Panel carry;
    read_state(carry, b->dfinal, in, s, &item);
    vf e[VECTORS], *sum = (vf *)*total;
    memcpy(e, carry, sizeof(Panel));
    for (int64_t c = chunks - 1; c >= 0; c--) {
        int64_t start = c * STEPS, left = item.length - start, count = left < STEPS ? left : STEPS;
        read_rows(x, in, &in->x, &item, start, count);
        if (!in->constant) read_decays(a, in, &item, start, count);
        memcpy(h, kept[c], sizeof(Panel));
        run_chunk(x, a, in->constant, *h, count);
        read_rows(g, in, &b->dh, &item, start, count);
        for (int64_t i = count - 1; i >= 0; i--) {
            vf *slope = (vf *)g[i], *decay = (vf *)a[in->constant ? 0 : i];
            const vf *before = (const vf *)(i ? x[i - 1] : kept[c]);
            vf *now = (vf *)x[i]; /* not read again: the gradient of log_a takes its place */
            for (int v = 0; v < VECTORS; v++) {
                vf grad = slope[v] + e[v];
                e[v] = decay[v] * grad;
                slope[v] = grad;
                now[v] = grad * (decay[v] * before[v]);
                sum[v] += now[v];
            }
        }
        write_rows(g, in, &b->dx, &item, start, count);
        if (!in->constant) write_rows(x, in, &b->dlog_a, &item, start, count);
    }
    memcpy(carry, e, sizeof(Panel));
    write_state(b->dinitial, carry, in, s, &item);
    if (in->constant) write_state((float *)b->dlog_a.pointer, *total, in, s, &item);
}

static int64_t longest(const Inputs *in) {
    int64_t most = in->cu ? 0 : in->length;
    for (int64_t s = 0; in->cu && s < in->sequences; s++)
        if (in->cu[s + 1] - in->cu[s] > most) most = in->cu[s + 1] - in->cu[s];
    return most;
}

/* 0, or 1 without memory */
static int run(const Inputs *in, const Forward *f, const Backward *b) {
    const int64_t panels = (in->dim + PANEL - 1) / PANEL, items = in->sequences * panels;
    const int64_t chunks = b ? (longest(in) + STEPS - 1) / STEPS : 0;
    int failed = 0;
#pragma omp parallel num_threads((int)in->parts) reduction(| : failed)
    {
        Panel *memory = allocate(sizeof(Panel) * (size_t)(3 * STEPS + 2 + chunks));
        if (memory) memset(memory, 0, sizeof(Panel) * (3 * STEPS + 2)); /* lanes past D */
        failed |= !memory;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; i++) {
            if (!memory) continue;
            Item item = item_of(in, panels, i);
            if (f) forward_item(f, i / panels, item, memory);
            else backward_item(b, i / panels, item, memory, memory + 3 * STEPS + 2);
        }
        free(memory);
    }
    return failed;
}

int scanweave_linear_forward(const Forward *f) { return run(&f->in, f, NULL); }
int scanweave_linear_backward(const Backward *b) { return run(&b->in, NULL, b); }
