/* The short convolution on a CPU: equations in `reference.py`, gradients in `portable.py`.
 *
 * Work is split into (piece, panel) items: a piece is 256 of all tokens, whatever sequences they
 * belong to, a panel a few vectors of channels. Tokens run in natural time: mirrored taps are
 * flipped weights. Rows pass through a window in the cache as float32, whatever their dtype, with
 * zeros or the initial state where a sequence ends, and are read once but for W - 1 rows around a
 * piece. The backward recomputes c. Gradients of weights are a row per piece, added in the order
 * of pieces: results do not depend on threads.
 *
 *     before, after   taps on the past and on the future of natural time: before + after = W - 1
 *     outside         tokens before or after a sequence, where its initial state is met
 *
 * Letters: B batch, L length, D channels, W taps, S packed sequences.
 */
#include "../selective/lanes.h"

#define VECTORS 4
#define PANEL (VECTORS * VL) /* channels */
#define PIECE 256            /* tokens */
#define STEPS 32             /* tokens that pass through the window at once */
#define TAPS 16

typedef struct {
    char *data; /* NULL: absent */
    int64_t type, batch, row; /* strides in elements; channels are adjacent but for the weight */
} Rows;

typedef struct {
    int64_t parts, batch, length, dim, width, left, reverse, silu, sequences;
    const int64_t *cu; /* (S + 1,) or NULL */
    Rows x, weight;    /* (B, L, D); (D, W) with the strides of both */
    Rows bias, state;  /* (D,); (B or S, W - 1, D) */
} Inputs;

typedef struct {
    Inputs in;
    Rows y;
} Forward;

typedef struct {
    Inputs in;
    Rows dy, dx, dstate;   /* dstate: zeros */
    float *dweight, *dbias; /* (D, W), (D,) */
} Backward;

typedef float Panel[PANEL] __attribute__((aligned(64)));

typedef struct {
    Panel weight[TAPS], mirrored[TAPS], bias; /* taps in natural time, and the other way round */
    Panel sums[TAPS + 1];                     /* gradients of taps and bias */
    Panel x[STEPS + 2 * TAPS], c[STEPS + TAPS], to[STEPS];
} Memory;

typedef struct {
    int64_t channel;
    int lanes, vectors;
} Columns;

/* of one sequence: tokens of its batch row, and those of them that are in the piece */
typedef struct {
    int64_t index, batch, start, end, first, last;
} Span;

static int64_t taps_before(const Inputs *in) {
    return in->reverse ? in->width - 1 - in->left : in->left;
}

/* ---- rows ---- */

/* the initial state's row at a token outside, or -1 */
INLINE int64_t state_row(const Inputs *in, const Span *s, int64_t token) {
    int64_t row = in->reverse ? s->end + in->width - 2 - token : token - s->start + in->width - 1;
    return row >= 0 && row < in->width - 1 ? row : -1;
}

static void read_inputs(Panel *to, const Inputs *in, const Span *s, Columns at, int64_t token,
                        int64_t count) {
    const Rows *x = &in->x, *h = &in->state;
    for (int64_t i = 0; i < count; i++, token++) {
        if (token >= s->start && token < s->end) {
            load(to[i], x->data, x->type, s->batch * x->batch + token * x->row + at.channel,
                 at.lanes);
            continue;
        }
        int64_t row = h->data ? state_row(in, s, token) : -1;
        if (row < 0) memset(to[i], 0, sizeof(Panel));
        else
            load(to[i], h->data, h->type, s->index * h->batch + row * h->row + at.channel,
                 at.lanes);
    }
}

static void read_rows(Panel *to, const Rows *r, const Span *s, Columns at, int64_t token,
                      int64_t count) {
    for (int64_t i = 0; i < count; i++)
        load(to[i], r->data, r->type, s->batch * r->batch + (token + i) * r->row + at.channel,
             at.lanes);
}

static void write_rows(Panel *from, const Rows *r, const Span *s, Columns at, int64_t token,
                       int64_t count) {
    for (int64_t i = 0; i < count; i++)
        store(r->data, from[i], r->type, s->batch * r->batch + (token + i) * r->row + at.channel,
              at.lanes);
}

static void read_weights(Memory *m, const Inputs *in, Columns at) {
    const Rows *w = &in->weight;
    for (int64_t j = 0; j < in->width; j++) {
        int64_t k = in->reverse ? in->width - 1 - j : j;
        for (int i = 0; i < at.lanes; i++)
            load(&m->weight[k][i], w->data, w->type,
                 (at.channel + i) * w->batch + j * w->row, 1);
        memcpy(m->mirrored[in->width - 1 - k], m->weight[k], sizeof(Panel));
    }
    memset(m->bias, 0, sizeof(Panel));
    if (in->bias.data) load(m->bias, in->bias.data, in->bias.type, at.channel, at.lanes);
}

/* ---- arithmetic ---- */

enum { PLAIN, SILU, SILU_GRADIENT };

/* to[i] = bias + sum_k weight[k] from[i + k]; or silu of that; or to[i] times silu's slope there */
INLINE void taps_of(Panel *to, const Panel *from, const Panel *weight, const float *bias,
                    int64_t count, int vectors, int width, int what) {
    for (int v = 0; v < vectors; v++) {
        vf w[TAPS], start = bias ? ((const vf *)bias)[v] : splat(0);
        for (int k = 0; k < width; k++) w[k] = ((const vf *)weight[k])[v];
        for (int64_t i = 0; i < count; i++) {
            vf c = start, *out = (vf *)to[i] + v;
            for (int k = 0; k < width; k++) c += w[k] * ((const vf *)from[i + k])[v];
            if (what == PLAIN) {
                *out = c;
            } else {
                vf gate = sigmoid(c);
                *out = what == SILU ? c * gate : *out * (gate * (c * (1.f - gate) + 1.f));
            }
        }
    }
}

/* widths of published models get loops with their taps in registers */
#define FOR_WIDTH(call, width) \
    switch (width) {           \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 7: call(7); break; \
        default: call((int)(width)); \
    }

static void convolve(Panel *to, const Panel *from, const Panel *weight, const float *bias,
                     int64_t count, int vectors, int64_t width, int what) {
#define PLAIN_OF(n) taps_of(to, from, weight, bias, count, vectors, n, PLAIN)
#define SILU_OF(n) taps_of(to, from, weight, bias, count, vectors, n, SILU)
#define SLOPE_OF(n) taps_of(to, from, weight, bias, count, vectors, n, SILU_GRADIENT)
    if (what == PLAIN) FOR_WIDTH(PLAIN_OF, width)
    else if (what == SILU) FOR_WIDTH(SILU_OF, width)
    else FOR_WIDTH(SLOPE_OF, width)
}

/* sums[k] += sum_i dc[i] x[i + k], and that of dc after them */
INLINE void sums_of(Panel *sums, const Panel *dc, const Panel *x, int64_t count, int vectors,
                    int width) {
    for (int v = 0; v < vectors; v++) {
        vf sum[TAPS], all = splat(0);
        for (int k = 0; k < width; k++) sum[k] = splat(0);
        for (int64_t i = 0; i < count; i++) {
            vf d = ((const vf *)dc[i])[v];
            all += d;
            for (int k = 0; k < width; k++) sum[k] += d * ((const vf *)x[i + k])[v];
        }
        for (int k = 0; k < width; k++) ((vf *)sums[k])[v] += sum[k];
        ((vf *)sums[width])[v] += all;
    }
}

static void add_sums(Panel *sums, const Panel *dc, const Panel *x, int64_t count, int vectors,
                     int64_t width) {
#define SUMS_OF(n) sums_of(sums, dc, x, count, vectors, n)
    FOR_WIDTH(SUMS_OF, width)
}

/* ---- one span of one panel ---- */

static void forward_span(const Forward *f, Span s, Columns at, Memory *m) {
    const Inputs *in = &f->in;
    const int64_t halo = in->width - 1, before = taps_before(in);
    /* x[r] is token - before + r */
    read_inputs(m->x, in, &s, at, s.first - before, halo);
    for (int64_t token = s.first; token < s.last; token += STEPS) {
        int64_t left = s.last - token, count = left < STEPS ? left : STEPS;
        read_inputs(m->x + halo, in, &s, at, token - before + halo, count);
        convolve(m->to, m->x, m->weight, m->bias, count, at.vectors, in->width,
                 in->silu ? SILU : PLAIN);
        write_rows(m->to, &f->y, &s, at, token, count);
        memmove(m->x, m->x + count, sizeof(Panel) * (size_t)halo);
    }
}

/* dc of `count` tokens: zero outside the sequence, and elsewhere dy times the slope of silu */
static void slopes(const Backward *b, const Span *s, Columns at, Memory *m, Panel *dc,
                   const Panel *x, int64_t token, int64_t count) {
    const Inputs *in = &b->in;
    int64_t from = token < s->start ? s->start - token : 0, to = s->end - token;
    if (to > count) to = count;
    if (to <= from) from = to = count;
    memset(dc, 0, sizeof(Panel) * (size_t)from);
    memset(dc + to, 0, sizeof(Panel) * (size_t)(count - to));
    read_rows(dc + from, &b->dy, s, at, token + from, to - from);
    if (in->silu)
        convolve(dc + from, x + from, m->weight, m->bias, to - from, at.vectors, in->width,
                 SILU_GRADIENT);
}

static void backward_span(const Backward *b, Span s, Columns at, Memory *m) {
    const Inputs *in = &b->in;
    const int64_t halo = in->width - 1, before = taps_before(in), after = halo - before;
    int64_t first = s.first, last = s.last;
    if (in->state.data && first == s.start) first -= before; /* its gradient is that of tokens */
    if (in->state.data && last == s.end) last += after;
    /* x[r] is token - halo + r, c[r] is the gradient of c at token - after + r */
    read_inputs(m->x, in, &s, at, first - halo, 2 * halo);
    slopes(b, &s, at, m, m->c, m->x, first - after, halo);
    for (int64_t token = first; token < last; token += STEPS) {
        int64_t left = last - token, count = left < STEPS ? left : STEPS;
        read_inputs(m->x + 2 * halo, in, &s, at, token + halo, count);
        slopes(b, &s, at, m, m->c + halo, m->x + halo, token + before, count);
        convolve(m->to, m->c, m->mirrored, NULL, count, at.vectors, in->width, PLAIN);
        int64_t from = token < s.first ? s.first - token : 0, to = s.last - token;
        if (from > count) from = count;
        if (to > count) to = count;
        if (to < from) to = from;
        add_sums(m->sums, m->c + after + from, m->x + after + from, to - from, at.vectors,
                 in->width);
        write_rows(m->to + from, &b->dx, &s, at, token + from, to - from);
        for (int64_t i = 0; i < count; i++) {
            if (i >= from && i < to) continue;
            const Rows *h = &b->dstate;
            int64_t row = state_row(in, &s, token + i);
            store(h->data, m->to[i], h->type, s.index * h->batch + row * h->row + at.channel,
                  at.lanes);
        }
        memmove(m->x, m->x + count, sizeof(Panel) * (size_t)(2 * halo));
        memmove(m->c, m->c + count, sizeof(Panel) * (size_t)halo);
    }
}

/* ---- pieces ---- */

/* the sequence that token `at` of all tokens is in */
static int64_t owner(const Inputs *in, int64_t at) {
    if (!in->cu) return at / in->length;
    int64_t low = 0, high = in->sequences - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (in->cu[middle + 1] > at) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void run_piece(const Inputs *in, const Forward *f, const Backward *b, int64_t piece,
                      Columns at, Memory *m) {
    int64_t first = piece * PIECE, last = first + PIECE, total = in->batch * in->length;
    if (last > total) last = total;
    read_weights(m, in, at);
    for (int64_t i = owner(in, first); first < last; i++) {
        int64_t offset = in->cu ? 0 : i * in->length; /* of the batch row's first token */
        Span s = {i, in->cu ? 0 : i, in->cu ? in->cu[i] : 0,
                  in->cu ? in->cu[i + 1] : in->length, first - offset, last - offset};
        if (s.last > s.end) s.last = s.end;
        if (s.last <= s.first) continue; /* an empty sequence */
        if (f) forward_span(f, s, at, m);
        else backward_span(b, s, at, m);
        first = offset + s.last;
    }
}

static Columns columns_of(const Inputs *in, int64_t panel) {
    int64_t left = in->dim - panel * PANEL;
    int lanes = (int)(left < PANEL ? left : PANEL);
    return (Columns){panel * PANEL, lanes, (lanes + VL - 1) / VL};
}

/* sums (pieces, W + 1, panels) to the gradients of weights and bias */
static void add_pieces(const Backward *b, Panel *sums, int64_t pieces, int64_t panels,
                       int64_t panel) {
    const int64_t width = b->in.width;
    Columns at = columns_of(&b->in, panel);
    for (int64_t k = 0; k <= width; k++) {
        vf total[VECTORS];
        memset(total, 0, sizeof total);
        for (int64_t p = 0; p < pieces; p++)
            for (int v = 0; v < VECTORS; v++)
                total[v] += ((const vf *)sums[(p * (width + 1) + k) * panels + panel])[v];
        const float *value = (const float *)total;
        int64_t tap = b->in.reverse ? width - 1 - k : k;
        for (int i = 0; i < at.lanes; i++) {
            if (k == width) b->dbias[at.channel + i] = value[i];
            else b->dweight[(at.channel + i) * width + tap] = value[i];
        }
    }
}

/* 0, or 1 without memory */
static int run(const Inputs *in, const Forward *f, const Backward *b) {
    const int64_t panels = (in->dim + PANEL - 1) / PANEL;
    const int64_t pieces = (in->batch * in->length + PIECE - 1) / PIECE, rows = in->width + 1;
    Panel *sums = NULL;
    int failed = 0;
    if (b) {
        sums = allocate(sizeof(Panel) * (size_t)(pieces * rows * panels));
        if (!sums) return 1;
    }
#pragma omp parallel num_threads((int)in->parts) if (in->parts > 1) reduction(| : failed)
    {
        Memory *m = allocate(sizeof(Memory));
        if (m) memset(m, 0, sizeof(Memory)); /* lanes past D */
        failed |= !m;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < pieces * panels; i++) {
            if (!m) continue;
            memset(m->sums, 0, sizeof m->sums);
            run_piece(in, f, b, i / panels, columns_of(in, i % panels), m);
            for (int64_t k = 0; b && k < rows; k++)
                memcpy(sums[(i / panels * rows + k) * panels + i % panels], m->sums[k],
                       sizeof(Panel));
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < (b ? panels : 0); panel++)
            if (m) add_pieces(b, sums, pieces, panels, panel);
        free(m);
    }
    free(sums);
    return failed;
}

int scanweave_conv_forward(const Forward *f) { return run(&f->in, f, NULL); }
int scanweave_conv_backward(const Backward *b) { return run(&b->in, NULL, b); }
