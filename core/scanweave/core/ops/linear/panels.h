/* Scans of independent channels: work in (sequence, panel of channels) items, which share nothing.
 *
 * A panel is a few vectors wide, so that the state of one lane never waits for another's. Rows go
 * to the cache and back as float32, whatever their dtype and direction. The file that includes this
 * says how many rows an item holds at most, and what is to be done with it.
 *
 * Letters: S sequences, T tokens, D channels.
 */
#include "../selective/lanes.h"

#define VECTORS 4
#define PANEL (VECTORS * VL) /* channels */
#define LOG2_E 1.44269504f

typedef float Panel[PANEL] __attribute__((aligned(64)));

typedef struct {
    int64_t pointer, type, batch, step; /* dtype and strides of (B, L, D), channels adjacent */
} Rows;

typedef struct {
    int64_t parts, sequences, length, dim, reverse, constant; /* decays of (D,) */
    const int64_t *cu;                                        /* (S + 1,) or NULL */
} Layout;

typedef struct {
    int64_t sequence, batch, first, length, channel;
    int lanes;
} Item;

/* what a thread does with an item; memory is its own, zeros at first */
typedef void (*Work)(const void *call, const Item *item, Panel *memory);

static Item item_of(const Layout *in, int64_t panels, int64_t item) {
    int64_t s = item / panels, channel = item % panels * PANEL, left = in->dim - channel;
    Item found = {s, in->cu ? 0 : s, in->cu ? in->cu[s] : 0,
                  in->cu ? in->cu[s + 1] - in->cu[s] : in->length, channel,
                  (int)(left < PANEL ? left : PANEL)};
    return found;
}

/* where the row of a step is, in elements */
INLINE int64_t at(const Layout *in, const Rows *rows, const Item *item, int64_t step) {
    int64_t token = item->first + (in->reverse ? item->length - 1 - step : step);
    return item->batch * rows->batch + token * rows->step + item->channel;
}

static void read_rows(Panel *to, const Layout *in, const Rows *rows, const Item *item,
                      int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        load(to[i], (const char *)rows->pointer, rows->type, at(in, rows, item, start + i),
             item->lanes);
}

static void write_rows(Panel *from, const Layout *in, const Rows *rows, const Item *item,
                       int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        store((char *)rows->pointer, from[i], rows->type, at(in, rows, item, start + i),
              item->lanes);
}

/* rows of (., D) in float32 */
INLINE void read_row(Panel to, const float *from, const Layout *in, int64_t row, const Item *item) {
    memcpy(to, from + row * in->dim + item->channel, 4 * (size_t)item->lanes);
}

INLINE void write_row(float *to, Panel from, const Layout *in, int64_t row, const Item *item) {
    memcpy(to + row * in->dim + item->channel, from, 4 * (size_t)item->lanes);
}

static int64_t longest(const Layout *in) {
    int64_t most = in->cu ? 0 : in->length;
    for (int64_t s = 0; in->cu && s < in->sequences; s++)
        if (in->cu[s + 1] - in->cu[s] > most) most = in->cu[s + 1] - in->cu[s];
    return most;
}

/* 0, or 1 without memory; `rows` are a thread's panels */
static int run(const Layout *in, Work work, const void *call, int64_t rows) {
    const int64_t panels = (in->dim + PANEL - 1) / PANEL, items = in->sequences * panels;
    int failed = 0;
#pragma omp parallel num_threads((int)in->parts) reduction(| : failed)
    {
        Panel *memory = allocate(sizeof(Panel) * (size_t)rows);
        if (memory) memset(memory, 0, sizeof(Panel) * (size_t)rows); /* lanes past D */
        failed |= !memory;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < items; i++) {
            Item item = item_of(in, panels, i);
            if (memory) work(call, &item, memory);
        }
        free(memory);
    }
    return failed;
}
