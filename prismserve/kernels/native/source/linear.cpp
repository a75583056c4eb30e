// y = epilogue(norm(x) W^T + b) over packed weights.
//
// W [n, k] is packed in place: whole groups of 16 rows become panels [k][16], a rest of fewer rows stays as it is.
// Every result is one chain of multiply-adds over k in order, so it depends on its own row alone: one row of x gives
// the same bits as a thousand. Threads divide the panels; each lays out the rows of x for itself.
#include <omp.h>

#include <algorithm>

#include "scratch.h"
#include "tile.h"

namespace prismserve {
namespace {

constexpr int64_t A_BYTES = 400 << 10;  // of x laid out at a time: most of a second-level cache
constexpr int64_t ROWS_MAX = 96;
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

    // Panels [from, to) of all rows of x; in a gated product, of the first half and their partners in the second.
    void run(int64_t from, int64_t to) {
        const int64_t block = std::clamp(A_BYTES / (4 * job.depth) / TILE_ROWS * TILE_ROWS, int64_t{24}, ROWS_MAX);
        const int64_t whole = job.columns / PANEL;
        const bool owns_rest = to * PANEL > job.columns;
        if (owns_rest) lay_out_rest(weight + whole * PANEL * job.depth, job.columns - whole * PANEL, job.depth, rest);
        for (int64_t first = 0; first < job.rows; first += block) {
            const Strips strips(std::min(block, job.rows - first));
            lay_out(job, first, strips, a);
            if (job.gated) {
                for (int64_t panel = from; panel < to; ++panel) gated_panel(first, strips, panel);
                continue;
            }
            int64_t panel = from;
            const int64_t last = std::min(to, whole);
            if (strips.rows == 1) panel = several<1, 4>(first, panel, last);
            if (strips.rows == 2) panel = several<2, 2>(first, panel, last);
            for (; panel < last; ++panel) one_panel(first, strips, panel);
            if (owns_rest) rest_panel(first, strips, whole);
        }
    }

  private:
    const T* at(int64_t panel) const { return weight + panel * PANEL * job.depth; }

    // A panel used by several strips is followed by the next one; one that is used once is fetched just in time.
    int64_t ahead(const Strips& strips) const {
        return strips.count == 1 ? NEAR_BYTES : job.depth * PANEL * static_cast<int64_t>(sizeof(T));
    }

    template <int ROWS, int PANELS>
    int64_t several(int64_t first, int64_t panel, int64_t last) {
        for (; panel + PANELS <= last; panel += PANELS) {
            Floats acc[ROWS][2 * PANELS] = {};
            multiply<ROWS, PANELS, true>(a, 1, ROWS, at(panel), PANEL * job.depth, PANEL, job.depth, NEAR_BYTES / 4, acc);
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p < PANELS; ++p)
                    finish(job, first + r, (panel + p) * PANEL, PANEL, acc[r][2 * p], acc[r][2 * p + 1]);
        }
        return panel;
    }

    template <int ROWS, typename U>
    void tile(const U* panel, const float* strip, bool fetch, int64_t distance, Floats (&acc)[ROWS][2]) {
        if (fetch)
            multiply<ROWS, 1, true>(strip, 1, ROWS, panel, 0, PANEL, job.depth, distance, acc);
        else
            multiply<ROWS, 1, false>(strip, 1, ROWS, panel, 0, PANEL, job.depth, 0, acc);
    }

    void one_panel(int64_t first, const Strips& strips, int64_t panel) {
        each_strip(strips, [&](auto rows, int64_t start) {
            constexpr int ROWS = decltype(rows)::value;
            Floats acc[ROWS][2] = {};
            tile<ROWS>(at(panel), a + start * job.depth, start == 0, ahead(strips), acc);
            for (int r = 0; r < ROWS; ++r)
                finish(job, first + start + r, panel * PANEL, PANEL, acc[r][0], acc[r][1]);
        });
    }

    void rest_panel(int64_t first, const Strips& strips, int64_t panel) {
        each_strip(strips, [&](auto rows, int64_t start) {
            constexpr int ROWS = decltype(rows)::value;
            Floats acc[ROWS][2] = {};
            tile<ROWS>(rest, a + start * job.depth, false, 0, acc);
            for (int r = 0; r < ROWS; ++r)
                finish(job, first + start + r, panel * PANEL, job.columns - panel * PANEL, acc[r][0], acc[r][1]);
        });
    }

    void gated_panel(int64_t first, const Strips& strips, int64_t panel) {
        const int64_t partner = panel + job.columns / 2 / PANEL;
        each_strip(strips, [&](auto rows, int64_t start) {
            constexpr int ROWS = decltype(rows)::value;
            Floats gate[ROWS][2] = {}, up[ROWS][2] = {};
            tile<ROWS>(at(panel), a + start * job.depth, start == 0, ahead(strips), gate);
            tile<ROWS>(at(partner), a + start * job.depth, start == 0, ahead(strips), up);
            for (int r = 0; r < ROWS; ++r) finish_gated(job, first + start + r, panel * PANEL, gate[r], up[r]);
        });
    }

    template <typename Visit>
    void each_strip(const Strips& strips, Visit visit) {
        for (int64_t strip = 0; strip < strips.count; ++strip) {
            const int64_t start = strips.first(strip);
            with_rows(static_cast<int>(strips.first(strip + 1) - start), [&](auto rows) { visit(rows, start); });
        }
    }

    const Product& job;
    const T* weight;
    float *a, *rest;
};

template <typename T>
int run(const Product& job, int threads) {
    int failed = 0;
    const int64_t panels = job.gated ? job.columns / 2 / PANEL : (job.columns + PANEL - 1) / PANEL;
    const int64_t held = std::min(job.rows, std::max(ROWS_MAX, int64_t{24}));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t count = omp_get_num_threads(), index = omp_get_thread_num();
        float* memory = scratch().floats((held + PANEL) * job.depth);
        const int64_t from = panels * index / count, to = panels * (index + 1) / count;
        if (memory == nullptr) {
#pragma omp atomic write
            failed = 1;
        } else if (from < to) {
            Worker<T>(job, memory + PANEL * job.depth, memory).run(from, to);
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

int ps_gather(const void* weight, int element, int64_t columns, int64_t depth, const int64_t* rows, int64_t count,
              float* to) {
    if (element == BFLOAT16)
        gather(static_cast<const uint16_t*>(weight), columns, depth, rows, count, to);
    else
        gather(static_cast<const float*>(weight), columns, depth, rows, count, to);
    return 0;
}
}
