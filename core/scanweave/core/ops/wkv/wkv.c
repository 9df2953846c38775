/* The exponentially weighted average on a CPU: equations in `reference.py`, gradients in
 * `portable.py`.
 *
 * Work is split as `panels.h` says; time runs in chunks. Of the two weights by which two sums are
 * put together one is 1, so that a token costs one exponential, or two with a bonus. The backward
 * keeps the state of every chunk, then walks the chunks from the last one, and computes a chunk's
 * tokens again. Gradients of constant decays and of the bonus are a row per sequence, added by the
 * caller: results do not depend on threads.
 *
 * Letters: S sequences, T tokens, D channels.
 */
#include "../linear/panels.h"

#define STEPS 16 /* of a chunk */

typedef struct {
    Layout of;
    const float *bonus;   /* (D,) or NULL */
    const float *initial; /* (S, 3, D) or NULL */
    Rows k, v, w;         /* constant decays: (D,) float32 */
} Inputs;

typedef struct {
    Inputs in;
    Rows y;
    float *final; /* (S, 3, D) */
} Forward;

typedef struct {
    Inputs in;
    Rows dy;
    const float *dfinal; /* (S, 3, D) or NULL */
    Rows dk, dv, dw;     /* dw of constant decays: (S, D) float32 */
    float *dbonus;       /* (S, D) */
    float *dinitial;     /* (S, 3, D) */
} Backward;

/* what a thread holds; `kept` is a state per chunk */
typedef struct {
    Panel k[STEPS], v[STEPS], w[STEPS], y[STEPS];
    Panel u, n, d, m;
} Tokens;

typedef struct {
    Tokens t;
    Panel g[STEPS];                                  /* gradients of y, then those over its sum */
    Panel n[STEPS], d[STEPS], m[STEPS + 1];          /* the state before each token */
    Panel past[STEPS], now[STEPS];                   /* weights of that state and of the token */
    Panel own[STEPS], top[STEPS];                    /* weight of the token in its read; its scale */
    Panel en, ed, low, dw, du;
    Panel kept[][3];
} Chunk;

/* NaN if one of them is */
INLINE vf larger(vf a, vf b) { return select((a > b) | (a != a), a, b); }

/* exp(v - scale) for v <= scale; 0 for v = -inf and 1 for two +inf, where the difference is NaN */
INLINE vf power(vf v, vf scale) {
    vf same = select(v == -INFINITY, splat(0), splat(1));
    return select(v == scale, same, exp_of_minus_abs(v - scale));
}

/* the larger of two logarithms, and the powers of both over it */
INLINE vf join(vf a, vf b, vf *of_a, vf *of_b) {
    vf top = larger(a, b), one = select(top == -INFINITY, splat(0), splat(1));
    vf e = select(a == b, one, exp_of_minus_abs(a - b));
    vf bad = e - e; /* NaN if one of them is, else 0 */
    *of_a = select(a < b, e, one) + bad;
    *of_b = select(a > b, e, one) + bad;
    return top;
}

/* 0 where nothing was seen */
INLINE vf ratio(vf a, vf b) {
    vi empty = b == 0.f;
    return select(empty, splat(0), a / select(empty, splat(1), b));
}

static void start_at(Tokens *t, const Inputs *in, const Item *item) {
    memset(t->n, 0, sizeof(Panel));
    memset(t->d, 0, sizeof(Panel));
    for (int v = 0; v < VECTORS; v++) ((vf *)t->m)[v] = splat(-INFINITY);
    if (in->initial) {
        read_row(t->n, in->initial, &in->of, 3 * item->sequence, item);
        read_row(t->d, in->initial, &in->of, 3 * item->sequence + 1, item);
        read_row(t->m, in->initial, &in->of, 3 * item->sequence + 2, item);
    }
    if (in->bonus) read_row(t->u, in->bonus, &in->of, 0, item);
    if (in->of.constant) read_row(t->w[0], (const float *)in->w.pointer, &in->of, 0, item);
}

static void read_tokens(Tokens *t, const Inputs *in, const Item *item, int64_t start,
                        int64_t count) {
    read_rows(t->k, &in->of, &in->k, item, start, count);
    read_rows(t->v, &in->of, &in->v, item, start, count);
    if (!in->of.constant) read_rows(t->w, &in->of, &in->w, item, start, count);
}

/* the state after a chunk; outputs to `y` if `reads`, and what the backward needs to `c` */
INLINE void run_tokens(Tokens *t, Chunk *c, int64_t count, int64_t constant, int64_t bonus,
                       int reads) {
    for (int x = 0; x < VECTORS; x++) {
        vf n = ((vf *)t->n)[x], d = ((vf *)t->d)[x], m = ((vf *)t->m)[x], u = ((vf *)t->u)[x];
        for (int64_t i = 0; i < count; i++) {
            vf k = ((vf *)t->k[i])[x], v = ((vf *)t->v[i])[x], past, now;
            vf w = ((vf *)t->w[constant ? 0 : i])[x], y, sum, top;
            if (reads && bonus) {
                top = join(m, u + k, &past, &now);
                sum = past * d + now;
                y = ratio(past * n + now * v, sum);
                if (c) ((vf *)c->own[i])[x] = now;
            }
            if (c) {
                ((vf *)c->n[i])[x] = n;
                ((vf *)c->d[i])[x] = d;
                ((vf *)c->m[i])[x] = m;
            }
            m = join(m + w, k, &past, &now);
            n = past * n + now * v;
            d = past * d + now;
            if (reads && !bonus) {
                top = m;
                sum = d;
                y = ratio(n, d);
            }
            if (reads) ((vf *)t->y[i])[x] = y;
            if (c) {
                ((vf *)c->past[i])[x] = past;
                ((vf *)c->now[i])[x] = now;
                ((vf *)c->top[i])[x] = select(sum == 0.f, splat(INFINITY), top);
                ((vf *)c->g[i])[x] = ratio(((vf *)c->g[i])[x], sum);
            }
        }
        ((vf *)t->n)[x] = n;
        ((vf *)t->d)[x] = d;
        ((vf *)t->m)[x] = m;
        if (c) ((vf *)c->m[count])[x] = m;
    }
}

static void forward_item(const void *call, const Item *item, Panel *memory) {
    const Forward *f = call;
    const Inputs *in = &f->in;
    Tokens *t = (Tokens *)memory;
    start_at(t, in, item);
    for (int64_t start = 0; start < item->length; start += STEPS) {
        int64_t left = item->length - start, count = left < STEPS ? left : STEPS;
        read_tokens(t, in, item, start, count);
        if (in->bonus) run_tokens(t, NULL, count, in->of.constant, 1, 1);
        else run_tokens(t, NULL, count, in->of.constant, 0, 1);
        write_rows(t->y, &in->of, &f->y, item, start, count);
    }
    write_row(f->final, t->n, &in->of, 3 * item->sequence, item);
    write_row(f->final, t->d, &in->of, 3 * item->sequence + 1, item);
    write_row(f->final, t->m, &in->of, 3 * item->sequence + 2, item);
}

/* gradients of a chunk in place of k, v and w; (en, ed) exp(-low) are those of the sums after it */
INLINE void walk_back(Chunk *c, int64_t count, int64_t constant, int64_t bonus) {
    Tokens *t = &c->t;
    for (int x = 0; x < VECTORS; x++) {
        vf en = ((vf *)c->en)[x], ed = ((vf *)c->ed)[x], low = ((vf *)c->low)[x];
        vf sum_w = ((vf *)c->dw)[x], sum_u = ((vf *)c->du)[x];
        for (int64_t i = count - 1; i >= 0; i--) {
            vf v = ((vf *)t->v[i])[x], y = ((vf *)t->y[i])[x], g = ((vf *)c->g[i])[x];
            vf w = ((vf *)t->w[constant ? 0 : i])[x], top = ((vf *)c->top[i])[x], before, here;
            if (!bonus) { /* read after the token was added */
                low = -join(-low, -top, &before, &here);
                en = before * en + here * g;
                ed = before * ed - here * g * y;
            }
            vf scale = power(((vf *)c->m[i + 1])[x], low);
            vf now = ((vf *)c->now[i])[x] * scale, past = ((vf *)c->past[i])[x] * scale;
            vf dv = now * en, dk = now * (v * en + ed);
            vf dw = past * (((vf *)c->n[i])[x] * en + ((vf *)c->d[i])[x] * ed);
            low -= w;
            if (bonus) {
                vf own = ((vf *)c->own[i])[x] * g, du = own * (v - y);
                dv += own;
                dk += du;
                sum_u += du;
                low = -join(-low, -top, &before, &here);
                en = before * en + here * g;
                ed = before * ed - here * g * y;
            }
            ((vf *)t->k[i])[x] = dk;
            ((vf *)t->v[i])[x] = dv;
            if (constant) sum_w += dw;
            else ((vf *)t->w[i])[x] = dw;
        }
        ((vf *)c->en)[x] = en;
        ((vf *)c->ed)[x] = ed;
        ((vf *)c->low)[x] = low;
        ((vf *)c->dw)[x] = sum_w;
        ((vf *)c->du)[x] = sum_u;
    }
}

/* gradients of the sums after the last token, whose scale is `m`; infinity is no gradient */
static void end_at(Chunk *c, const Backward *b, const Item *item, const Panel m) {
    memset(c->en, 0, sizeof(Panel));
    memset(c->ed, 0, sizeof(Panel));
    if (b->dfinal) {
        read_row(c->en, b->dfinal, &b->in.of, 3 * item->sequence, item);
        read_row(c->ed, b->dfinal, &b->in.of, 3 * item->sequence + 1, item);
    }
    for (int x = 0; x < VECTORS; x++) {
        vf scale = b->dfinal ? ((const vf *)m)[x] : splat(INFINITY);
        ((vf *)c->low)[x] = select(scale == -INFINITY, splat(INFINITY), scale);
    }
}

static void backward_item(const void *call, const Item *item, Panel *memory) {
    const Backward *b = call;
    const Inputs *in = &b->in;
    Chunk *c = (Chunk *)memory;
    Tokens *t = &c->t;
    const int64_t chunks = (item->length + STEPS - 1) / STEPS, constant = in->of.constant;
    const int64_t row = 3 * item->sequence;
    memset(c->dw, 0, sizeof(Panel));
    memset(c->du, 0, sizeof(Panel));
    start_at(t, in, item);
    for (int64_t i = 0; i < chunks; i++) {
        memcpy(c->kept[i][0], t->n, sizeof(Panel));
        memcpy(c->kept[i][1], t->d, sizeof(Panel));
        memcpy(c->kept[i][2], t->m, sizeof(Panel));
        if (i == chunks - 1) break;
        read_tokens(t, in, item, i * STEPS, STEPS);
        run_tokens(t, NULL, STEPS, constant, 0, 0);
    }
    for (int64_t i = chunks - 1; i >= 0; i--) {
        int64_t start = i * STEPS, left = item->length - start;
        int64_t count = left < STEPS ? left : STEPS;
        memcpy(t->n, c->kept[i][0], sizeof(Panel));
        memcpy(t->d, c->kept[i][1], sizeof(Panel));
        memcpy(t->m, c->kept[i][2], sizeof(Panel));
        read_tokens(t, in, item, start, count);
        read_rows(c->g, &in->of, &b->dy, item, start, count);
        if (in->bonus) run_tokens(t, c, count, constant, 1, 1);
        else run_tokens(t, c, count, constant, 0, 1);
        if (i == chunks - 1) end_at(c, b, item, t->m);
        if (in->bonus) walk_back(c, count, constant, 1);
        else walk_back(c, count, constant, 0);
        write_rows(t->k, &in->of, &b->dk, item, start, count);
        write_rows(t->v, &in->of, &b->dv, item, start, count);
        if (!constant) write_rows(t->w, &in->of, &b->dw, item, start, count);
    }
    if (constant) write_row((float *)b->dw.pointer, c->dw, &in->of, item->sequence, item);
    write_row(b->dbonus, c->du, &in->of, item->sequence, item);
    if (chunks) {
        for (int x = 0; x < VECTORS; x++) {
            vf scale = power(((vf *)c->m[0])[x], ((vf *)c->low)[x]);
            vf dn = ((vf *)c->en)[x] * scale, dd = ((vf *)c->ed)[x] * scale;
            ((vf *)c->en)[x] = dn;
            ((vf *)c->ed)[x] = dd;
            ((vf *)c->low)[x] = dn * ((vf *)c->n[0])[x] + dd * ((vf *)c->d[0])[x];
        }
    } else { /* without tokens the state is handed on, and the gradient back */
        memset(c->en, 0, sizeof(Panel));
        memset(c->ed, 0, sizeof(Panel));
        memset(c->low, 0, sizeof(Panel));
        if (b->dfinal) {
            read_row(c->en, b->dfinal, &in->of, row, item);
            read_row(c->ed, b->dfinal, &in->of, row + 1, item);
            read_row(c->low, b->dfinal, &in->of, row + 2, item);
        }
    }
    write_row(b->dinitial, c->en, &in->of, row, item);
    write_row(b->dinitial, c->ed, &in->of, row + 1, item);
    write_row(b->dinitial, c->low, &in->of, row + 2, item);
}

int scanweave_wkv_forward(const Forward *f) {
    return run(&f->in.of, forward_item, f, sizeof(Tokens) / sizeof(Panel));
}

int scanweave_wkv_backward(const Backward *b) {
    const int64_t chunks = (longest(&b->in.of) + STEPS - 1) / STEPS;
    return run(&b->in.of, backward_item, b, sizeof(Chunk) / sizeof(Panel) + 3 * chunks);
}
