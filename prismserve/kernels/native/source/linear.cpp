// y = epilogue(norm(x) W^T + b) over packed weights.
//
// W [n, k] is packed in place: whole groups of 16 rows become panels [k][16], a rest of fewer rows stays as it is.
// Every result is one chain of multiply-adds over k in order, so it depends on its own row alone: one row of x gives
// the same bits as a thousand. Threads divide the panels; each lays out the rows of x for itself.
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "ops.h"
#include "scratch.h"
#include "tile.h"

namespace prismserve {
namespace {

constexpr int64_t A_BYTES = 400 << 10;  // of x laid out at a time: most of a second-level cache
constexpr int64_t ROWS_MAX = 96;
constexpr int64_t PIECE_PANELS = 4;  // panels that are read side by side for one row
constexpr int64_t PIECES = 6;        // per thread
constexpr int64_t DEPTH_STEP = 448;  // of a panel that several strips share
constexpr int64_t NEAR_BYTES = 4096;  // how far ahead a panel is fetched that is used once

struct Product {
    const float* x;
    int64_t x_stride, rows, depth;
    const void* weight;
    int element;
    int64_t columns;
    const float* bias;
    const float* norm;  // gain of an RMS norm over x, or null
    float eps;
    const float* residual;
    int64_t residual_stride;
    float* y;
    int64_t y_stride;
    bool gated;  // y[:, i] = silu(column i) * column i + columns / 2
};

// Rows in groups of nearly equal size, so that no group is left with one row.
struct Strips {
    int64_t rows, count;
    explicit Strips(int64_t rows) : rows(rows), count((rows + TILE_ROWS - 1) / TILE_ROWS) {}
    int64_t first(int64_t strip) const { return rows * strip / count; }
};

// Lay out rows [first, first + count) as strips [k][rows of the strip].
void lay_out(const Product& job, int64_t first, const Strips& strips, float* to) {
    for (int64_t strip = 0; strip < strips.count; ++strip) {
        const int64_t start = strips.first(strip), width = strips.first(strip + 1) - start;
        float* base = to + start * job.depth;
        for (int64_t r = 0; r < width; ++r) {
            const float* row = job.x + (first + start + r) * job.x_stride;
            if (job.norm == nullptr) {
                for (int64_t k = 0; k < job.depth; ++k) base[k * width + r] = row[k];
            } else {
                const float scale = inverse_norm(row, job.depth, job.eps);
                for (int64_t k = 0; k < job.depth; ++k) base[k * width + r] = row[k] * scale * job.norm[k];
            }
        }
    }
}

// The last, incomplete group of rows of W as a float32 panel [k][16].
template <typename T>
void lay_out_rest(const T* rest, int64_t width, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t c = 0; c < PANEL; ++c) {
            float value = 0.0f;
            if (c < width) value = load_one(rest + c * depth + k);
            to[k * PANEL + c] = value;
        }
}

// Write up to 16 columns of one row.
void finish(const Product& job, int64_t row, int64_t column, int64_t width, Floats low, Floats high) {
    float* y = job.y + row * job.y_stride + column;
    if (width == PANEL) {
        if (job.bias != nullptr) {
            low += load(job.bias + column);
            high += load(job.bias + column + LANES);
        }
        if (job.residual != nullptr) {
            const float* residual = job.residual + row * job.residual_stride + column;
            low += load(residual);
            high += load(residual + LANES);
        }
        store(y, low);
        store(y + LANES, high);
        return;
    }
    float values[PANEL];
    store(values, low);
    store(values + LANES, high);
    for (int64_t c = 0; c < width; ++c) {
        float value = values[c];
        if (job.bias != nullptr) value += job.bias[column + c];
        if (job.residual != nullptr) value += job.residual[row * job.residual_stride + column + c];
        y[c] = value;
    }
}

void finish_gated(const Product& job, int64_t row, int64_t column, const Floats* gate, const Floats* up) {
    const int64_t half = job.columns / 2;
    for (int c = 0; c < 2; ++c) {
        Floats g = gate[c], u = up[c];
        const int64_t at = column + c * LANES;
        if (job.bias != nullptr) {
            g += load(job.bias + at);
            u += load(job.bias + half + at);
        }
        store(job.y + row * job.y_stride + at, silu(g) * u);
    }
}

template <typename T>
class Worker {
  public:
    Worker(const Product& job, float* a, float* rest) : job(job), weight(static_cast<const T*>(job.weight)), a(a), rest(rest) {}

    // Panels [from, to) of rows [first, first + rows) of x; in a gated product, of the first half and their partners
    // in the second. The rows are laid out unless they were those of the call before.
    void run(int64_t first, int64_t rows, int64_t from, int64_t to) {
        const Strips strips(rows);
        if (first != laid) lay_out(job, first, strips, a);
        laid = first;
        if (job.gated) {
            int64_t panel = from;
            if (rows == 1) panel = several_gated<1, 4>(first, panel, to);
            if (rows == 2) panel = several_gated<2, 2>(first, panel, to);
            for (; panel < to; ++panel) gated_panel(first, strips, panel);
            return;
        }
        const int64_t whole = job.columns / PANEL, last = std::min(to, whole);
        int64_t panel = from;
        if (rows == 1) panel = several<1, 4>(first, panel, last);
        if (rows == 2) panel = several<2, 2>(first, panel, last);
        for (; panel < last; ++panel) one_panel(first, strips, panel);
        if (to > whole) {
            lay_out_rest(at(whole), job.columns - whole * PANEL, job.depth, rest);
            rest_panel(first, strips, whole);
        }
    }

  private:
    const T* at(int64_t panel) const { return weight + panel * PANEL * job.depth; }

    // A panel used by several strips is followed by the next one; one that is used once is fetched just in time.
    int64_t ahead(const Strips& strips) const {
        return strips.count == 1 ? NEAR_BYTES : job.depth * PANEL * static_cast<int64_t>(sizeof(T));
    }

    // Few rows leave room for several panels side by side, which memory delivers faster than one after another.
    template <int ROWS, int PANELS>
    void side_by_side(int64_t panel, Floats (&acc)[ROWS][2 * PANELS]) {
        multiply<ROWS, PANELS, true>(a, 1, ROWS, at(panel), PANEL * job.depth, PANEL, job.depth, NEAR_BYTES / 4, acc);
    }

    template <int ROWS, int PANELS>
    int64_t several(int64_t first, int64_t panel, int64_t last) {
        for (; panel + PANELS <= last; panel += PANELS) {
            Floats acc[ROWS][2 * PANELS] = {};
            side_by_side<ROWS, PANELS>(panel, acc);
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p < PANELS; ++p)
                    finish(job, first + r, (panel + p) * PANEL, PANEL, acc[r][2 * p], acc[r][2 * p + 1]);
        }
        return panel;
    }

    template <int ROWS, int PANELS>
    int64_t several_gated(int64_t first, int64_t panel, int64_t last) {
        for (; panel + PANELS <= last; panel += PANELS) {
            Floats gate[ROWS][2 * PANELS] = {}, up[ROWS][2 * PANELS] = {};
            side_by_side<ROWS, PANELS>(panel, gate);
            side_by_side<ROWS, PANELS>(panel + job.columns / 2 / PANEL, up);
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p < PANELS; ++p)
                    finish_gated(job, first + r, (panel + p) * PANEL, gate[r] + 2 * p, up[r] + 2 * p);
        }
        return panel;
    }

    // sums [rows][16]: all rows that are laid out times one panel. Where several strips share it, a piece of the panel
    // stays in the first-level cache while they pass; the chain over k is the same.
    template <typename U>
    void product(const U* panel, const Strips& strips, bool fetch, float* sums) {
        const int64_t step = strips.count == 1 ? job.depth : DEPTH_STEP;
        for (int64_t from = 0; from < job.depth; from += step)
            for (int64_t strip = 0; strip < strips.count; ++strip) {
                const int64_t start = strips.first(strip);
                with_rows(static_cast<int>(strips.first(strip + 1) - start), [&](auto rows) {
                    constexpr int ROWS = decltype(rows)::value;
                    const int64_t depth = std::min(step, job.depth - from);
                    const float* part = a + start * job.depth + from * ROWS;
                    float* line = sums + start * PANEL;
                    Floats acc[ROWS][2] = {};
                    if (from > 0)
                        for (int r = 0; r < ROWS; ++r) {
                            acc[r][0] = load(line + r * PANEL);
                            acc[r][1] = load(line + r * PANEL + LANES);
                        }
                    if (fetch && strip == 0)
                        multiply<ROWS, 1, true>(part, 1, ROWS, panel + from * PANEL, 0, PANEL, depth, ahead(strips), acc);
                    else
                        multiply<ROWS, 1, false>(part, 1, ROWS, panel + from * PANEL, 0, PANEL, depth, 0, acc);
                    for (int r = 0; r < ROWS; ++r) {
                        store(line + r * PANEL, acc[r][0]);
                        store(line + r * PANEL + LANES, acc[r][1]);
                    }
                });
            }
    }

    void one_panel(int64_t first, const Strips& strips, int64_t panel) {
        float sums[ROWS_MAX * PANEL];
        product(at(panel), strips, true, sums);
        for (int64_t r = 0; r < strips.rows; ++r)
            finish(job, first + r, panel * PANEL, PANEL, load(sums + r * PANEL), load(sums + r * PANEL + LANES));
    }

    void rest_panel(int64_t first, const Strips& strips, int64_t panel) {
        float sums[ROWS_MAX * PANEL];
        const int64_t width = job.columns - panel * PANEL;
        product(rest, strips, false, sums);
        for (int64_t r = 0; r < strips.rows; ++r)
            finish(job, first + r, panel * PANEL, width, load(sums + r * PANEL), load(sums + r * PANEL + LANES));
    }

    void gated_panel(int64_t first, const Strips& strips, int64_t panel) {
        float gate[ROWS_MAX * PANEL], up[ROWS_MAX * PANEL];
        product(at(panel), strips, true, gate);
        product(at(panel + job.columns / 2 / PANEL), strips, true, up);
        for (int64_t r = 0; r < strips.rows; ++r) {
            const Floats g[2] = {load(gate + r * PANEL), load(gate + r * PANEL + LANES)};
            const Floats u[2] = {load(up + r * PANEL), load(up + r * PANEL + LANES)};
            finish_gated(job, first + r, panel * PANEL, g, u);
        }
    }

    const Product& job;
    const T* weight;
    float *a, *rest;
    int64_t laid = -1;  // first of the rows that are laid out
};

// Threads take pieces of the panels as they get done, so that one that lost its core for a while holds nobody up.
template <typename T>
int run(const Product& job, int threads) {
    const int64_t panels = job.gated ? job.columns / 2 / PANEL : (job.columns + PANEL - 1) / PANEL;
    const int64_t block = std::clamp(A_BYTES / (4 * job.depth) / TILE_ROWS * TILE_ROWS, int64_t{24}, ROWS_MAX);
    const int64_t blocks = (job.rows + block - 1) / block;
    const int64_t piece = std::max<int64_t>(PIECE_PANELS, panels / (PIECES * threads) / PIECE_PANELS * PIECE_PANELS);
    const int64_t pieces = (panels + piece - 1) / piece;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* memory = scratch().floats((std::min(job.rows, block) + PANEL) * job.depth);
        if (memory == nullptr) {
#pragma omp atomic write
            failed = 1;
        }
        Worker<T> worker(job, memory + PANEL * job.depth, memory);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < blocks * pieces; ++unit) {
            if (memory == nullptr) continue;
            const int64_t first = unit / pieces * block, from = unit % pieces * piece;
            worker.run(first, std::min(block, job.rows - first), from, std::min(from + piece, panels));
        }
    }
    return failed;
}

// Panels in place, through one panel of working memory.
template <typename T, bool PACK>
int repack(T* weight, int64_t columns, int64_t depth, int threads) {
    const int64_t panels = columns / PANEL;
    T* copies = static_cast<T*>(std::malloc(threads * PANEL * depth * sizeof(T)));
    if (copies == nullptr) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        T* copy = copies + omp_get_thread_num() * PANEL * depth;
#pragma omp for
        for (int64_t panel = 0; panel < panels; ++panel) {
            T* base = weight + panel * PANEL * depth;
            std::memcpy(copy, base, PANEL * depth * sizeof(T));
            for (int64_t k = 0; k < depth; ++k)
                for (int64_t c = 0; c < PANEL; ++c) {
                    const int64_t packed = k * PANEL + place<T>(c), plain = c * depth + k;
                    if (PACK)
                        base[packed] = copy[plain];
                    else
                        base[plain] = copy[packed];
                }
        }
    }
    std::free(copies);
    return 0;
}

template <typename T>
void gather(const T* weight, int64_t columns, int64_t depth, const int64_t* rows, int64_t count, float* to) {
    const int64_t whole = columns / PANEL * PANEL;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows[i], panel = row / PANEL;
        float* out = to + i * depth;
        if (row >= whole) {
            for (int64_t k = 0; k < depth; ++k) out[k] = load_one(weight + row * depth + k);
            continue;
        }
        const T* base = weight + panel * PANEL * depth + place<T>(row - panel * PANEL);
        for (int64_t k = 0; k < depth; ++k) out[k] = load_one(base + k * PANEL);
    }
}

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

int ps_linear(const float* x, int64_t x_stride, int64_t rows, int64_t depth, const void* weight, int element,
              int64_t columns, const float* bias, const float* norm, float eps, const float* residual,
              int64_t residual_stride, float* y, int64_t y_stride, int gated, int threads) {
    const Product job{x,    x_stride, rows,     depth,           weight, element,  columns, bias,
                      norm, eps,      residual, residual_stride, y,      y_stride, gated != 0};
    if (rows == 0 || columns == 0) return 0;
    return element == BFLOAT16 ? run<uint16_t>(job, threads) : run<float>(job, threads);
}

int ps_repack(void* weight, int element, int64_t columns, int64_t depth, int pack, int threads) {
    if (element == BFLOAT16) {
        uint16_t* values = static_cast<uint16_t*>(weight);
        return pack ? repack<uint16_t, true>(values, columns, depth, threads)
                    : repack<uint16_t, false>(values, columns, depth, threads);
    }
    float* values = static_cast<float*>(weight);
    return pack ? repack<float, true>(values, columns, depth, threads)
                : repack<float, false>(values, columns, depth, threads);
}

// Ask for large pages under memory that was not touched yet: weights are read through from end to end for every token.
int ps_advise(void* memory, int64_t nbytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(nbytes)) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a hint: failing costs nothing
#else
    (void)memory, (void)nbytes;
#endif
    return 0;
}

int ps_gather(const void* weight, int element, int64_t columns, int64_t depth, const int64_t* rows, int64_t count,
              float* to) {
    if (element == BFLOAT16)
        gather(static_cast<const uint16_t*>(weight), columns, depth, rows, count, to);
    else
        gather(static_cast<const float*>(weight), columns, depth, rows, count, to);
    return 0;
}
}
