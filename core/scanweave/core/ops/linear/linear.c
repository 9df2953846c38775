/* The linear scan on a CPU, real numbers: equations in `reference.py`, gradients in `portable.py`.
 *
 * Work is split as `panels.h` says; time runs in chunks. The backward keeps the state of every
 * chunk, then walks the chunks from the last one. Gradients of constant decays are a row per
 * sequence, added by the caller: results do not depend on threads.
 *
 * Letters: S sequences, T tokens, D channels.
 */
#include "panels.h"

#define STEPS 32 /* of a chunk */

typedef struct {
    Layout of;
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

static void decays(Panel rows) {
    vf *v = (vf *)rows;
    for (int i = 0; i < VECTORS; i++) v[i] = exp2_of(v[i] * LOG2_E);
}

/* decays of a chunk; constant ones are computed once, in a[0] */
static void read_decays(Panel *a, const Inputs *in, const Item *item, int64_t start,
                        int64_t count) {
    read_rows(a, &in->of, &in->log_a, item, start, count);
    for (int64_t i = 0; i < count; i++) decays(a[i]);
}

static void read_state(Panel h, const float *states, const Inputs *in, const Item *item) {
    memset(h, 0, sizeof(Panel));
    if (states) read_row(h, states, &in->of, item->sequence, item);
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

static void forward_item(const void *call, const Item *item, Panel *memory) {
    const Forward *f = call;
    const Inputs *in = &f->in;
    Panel *x = memory, *a = memory + STEPS, *h = memory + 2 * STEPS;
    read_state(*h, in->initial, in, item);
    if (in->of.constant) {
        read_row(a[0], (const float *)in->log_a.pointer, &in->of, 0, item);
        decays(a[0]);
    }
    for (int64_t start = 0; start < item->length; start += STEPS) {
        int64_t left = item->length - start, count = left < STEPS ? left : STEPS;
        read_rows(x, &in->of, &in->x, item, start, count);
        if (!in->of.constant) read_decays(a, in, item, start, count);
        run_chunk(x, a, in->of.constant, *h, count);
        write_rows(x, &in->of, &f->h, item, start, count);
    }
    write_row(f->final, *h, &in->of, item->sequence, item);
}

static void backward_item(const void *call, const Item *item, Panel *memory) {
    const Backward *b = call;
    const Inputs *in = &b->in;
    Panel *x = memory, *a = memory + STEPS, *h = memory + 2 * STEPS, *g = h + 1, *total = g + STEPS;
    Panel *kept = total + 1;
    const int64_t chunks = (item->length + STEPS - 1) / STEPS;
    read_state(*h, in->initial, in, item);
    memset(total, 0, sizeof(Panel));
    if (in->of.constant) {
        read_row(a[0], (const float *)in->log_a.pointer, &in->of, 0, item);
        decays(a[0]);
    }
    for (int64_t c = 0; c < chunks; c++) {
        memcpy(kept[c], h, sizeof(Panel));
        if (c == chunks - 1) break;
        read_rows(x, &in->of, &in->x, item, c * STEPS, STEPS);
        if (!in->of.constant) read_decays(a, in, item, c * STEPS, STEPS);
        run_chunk(x, a, in->of.constant, *h, STEPS);
    }
    Panel carry;
    read_state(carry, b->dfinal, in, item);
    vf e[VECTORS], *sum = (vf *)*total;
    memcpy(e, carry, sizeof(Panel));
    for (int64_t c = chunks - 1; c >= 0; c--) {
        int64_t start = c * STEPS, left = item->length - start, count = left < STEPS ? left : STEPS;
        read_rows(x, &in->of, &in->x, item, start, count);
        if (!in->of.constant) read_decays(a, in, item, start, count);
        memcpy(h, kept[c], sizeof(Panel));
        run_chunk(x, a, in->of.constant, *h, count);
        read_rows(g, &in->of, &b->dh, item, start, count);
        for (int64_t i = count - 1; i >= 0; i--) {
            vf *slope = (vf *)g[i], *decay = (vf *)a[in->of.constant ? 0 : i];
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
        write_rows(g, &in->of, &b->dx, item, start, count);
        if (!in->of.constant) write_rows(x, &in->of, &b->dlog_a, item, start, count);
    }
    memcpy(carry, e, sizeof(Panel));
    write_row(b->dinitial, carry, &in->of, item->sequence, item);
    if (in->of.constant) write_row((float *)b->dlog_a.pointer, *total, &in->of, item->sequence, item);
}

int scanweave_linear_forward(const Forward *f) {
    return run(&f->in.of, forward_item, f, 2 * STEPS + 1);
}

int scanweave_linear_backward(const Backward *b) {
    const int64_t chunks = (longest(&b->in.of) + STEPS - 1) / STEPS;
    return run(&b->in.of, backward_item, b, 3 * STEPS + 2 + chunks);
}
