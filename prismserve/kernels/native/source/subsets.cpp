// Choices among rows of features: the largest determinant, the farthest point, pairs that are most alike, the best.
//
// Similarities are computed where they are asked for; no [count, count] matrix is held. All of it runs on one thread,
// since one picture has little work and pictures are prepared side by side.
#include <algorithm>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "tile.h"

namespace prismserve {
namespace {

// Features of `count` rows; row i begins at data + i * stride.
struct Rows {
    const float* data;
    int64_t stride, count, width;
    const float* operator[](int64_t i) const { return data + i * stride; }
};

// 1 / |row|, 0 for a row without direction.
std::vector<float> inverse_norms(const Rows& rows) {
    std::vector<float> inverse(rows.count);
    for (int64_t i = 0; i < rows.count; ++i) {
        const float* row = rows[i];
        Floats squares = splat(0.0f);
        int64_t k = 0;
        for (; k + LANES <= rows.width; k += LANES) squares += load(row + k) * load(row + k);
        float total = sum(squares);
        for (; k < rows.width; ++k) total += row[k] * row[k];
        inverse[i] = total > 0.0f ? 1.0f / std::max(std::sqrt(total), 1e-12f) : 0.0f;
    }
    return inverse;
}

// out[r] = one . rows[first + r] for COUNT neighbours.
template <int COUNT>
void dots(const float* one, const Rows& rows, int64_t first, float* out) {
    Floats sums[COUNT] = {};
    int64_t k = 0;
    for (; k + LANES <= rows.width; k += LANES) {
        const Floats part = load(one + k);
        for (int r = 0; r < COUNT; ++r) sums[r] += part * load(rows[first + r] + k);
    }
    for (int r = 0; r < COUNT; ++r) {
        out[r] = sum(sums[r]);
        for (int64_t rest = k; rest < rows.width; ++rest) out[r] += one[rest] * rows[first + r][rest];
    }
}

// out[j] = cosine of row `pick` with every row j, exactly 1 with itself.
void cosines(const Rows& rows, const std::vector<float>& inverse, int64_t pick, float* out) {
    int64_t j = 0;
    for (; j + 4 <= rows.count; j += 4) dots<4>(rows[pick], rows, j, out + j);
    for (; j < rows.count; ++j) dots<1>(rows[pick], rows, j, out + j);
    for (j = 0; j < rows.count; ++j) out[j] *= inverse[pick] * inverse[j];
    out[pick] = inverse[pick] > 0.0f ? 1.0f : 0.0f;
}

// values[j] *= 1 - share + share * exp(falloff * |place_j - place_pick|^2); places [count, 3].
void fade(float* values, int64_t count, const float* places, int64_t pick, float share, float falloff) {
    const float* here = places + 3 * pick;
    for (int64_t j = 0; j < count; j += LANES) {
        float exponents[LANES] = {};
        const int64_t lanes = std::min<int64_t>(LANES, count - j);
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const float* there = places + 3 * (j + lane);
            float squared = 0.0f;
            for (int axis = 0; axis < 3; ++axis) squared += (there[axis] - here[axis]) * (there[axis] - here[axis]);
            exponents[lane] = falloff * squared;
        }
        const Floats near = exponential(load(exponents));
        for (int64_t lane = 0; lane < lanes; ++lane) values[j + lane] *= 1.0f - share + share * near[lane];
    }
}

// values[j] -= sum over t < factors of held[t][pick] * held[t][j].
void subtract(float* values, const float* held, int64_t factors, int64_t count, int64_t pick) {
    constexpr int WIDE = 4;
    int64_t j = 0;
    for (; j + WIDE * LANES <= count; j += WIDE * LANES) {
        Floats left[WIDE];
        for (int w = 0; w < WIDE; ++w) left[w] = load(values + j + w * LANES);
        for (int64_t t = 0; t < factors; ++t) {
            const float* factor = held + t * count;
            const Floats scale = splat(factor[pick]);
            for (int w = 0; w < WIDE; ++w) left[w] -= scale * load(factor + j + w * LANES);
        }
        for (int w = 0; w < WIDE; ++w) store(values + j + w * LANES, left[w]);
    }
    for (; j < count; ++j)
        for (int64_t t = 0; t < factors; ++t) values[j] -= held[t * count + pick] * held[t * count + j];
}

int64_t largest(const std::vector<float>& values) {
    return std::max_element(values.begin(), values.end()) - values.begin();
}

// Row numbers `which` of `rows`, each times its scale, as panels of 16 columns that multiply() takes.
void pack(const Rows& rows, const std::vector<int64_t>& which, const std::vector<float>& scale, std::vector<float>& to) {
    const int64_t panels = (static_cast<int64_t>(which.size()) + PANEL - 1) / PANEL;
    to.assign(panels * rows.width * PANEL, 0.0f);
    for (size_t c = 0; c < which.size(); ++c) {
        const float* row = rows[which[c]];
        float* panel = to.data() + static_cast<int64_t>(c) / PANEL * rows.width * PANEL + c % PANEL;
        for (int64_t k = 0; k < rows.width; ++k) panel[k * PANEL] = row[k] * scale[which[c]];
    }
}

struct Match {
    float value;
    int64_t proposer, partner;  // numbers within their lists
};

// For every row of `proposers` the most similar of the `partners` that are packed in panels; ties to the earlier.
void match(const Rows& rows, const std::vector<int64_t>& proposers, int64_t partners, const std::vector<float>& scale,
           const std::vector<float>& panels, std::vector<float>& block, std::vector<Match>& found) {
    found.clear();
    block.resize(TILE_ROWS * rows.width);
    for (size_t first = 0; first < proposers.size(); first += TILE_ROWS) {
        const int live = static_cast<int>(std::min<size_t>(TILE_ROWS, proposers.size() - first));
        Match best[TILE_ROWS];
        for (int r = 0; r < live; ++r) {
            const int64_t row = proposers[first + r];
            for (int64_t k = 0; k < rows.width; ++k) block[r * rows.width + k] = rows[row][k] * scale[row];
            best[r] = {-std::numeric_limits<float>::infinity(), static_cast<int64_t>(first) + r, 0};
        }
        for (int64_t column = 0; column < partners; column += PANEL) {
            const float* panel = panels.data() + column * rows.width;
            const int64_t columns = std::min<int64_t>(PANEL, partners - column);
            with_rows(live, [&](auto count) {
                constexpr int ROWS = decltype(count)::value;
                Floats products[ROWS][2] = {};
                multiply<ROWS, 1, false>(block.data(), rows.width, int64_t{1}, panel, int64_t{0}, int64_t{PANEL},
                                         rows.width, int64_t{0}, products);
                for (int r = 0; r < ROWS; ++r)
                    for (int64_t c = 0; c < columns; ++c) {
                        const float value = products[r][c / LANES][c % LANES];
                        if (value > best[r].value) best[r].value = value, best[r].partner = column + c;
                    }
            });
        }
        found.insert(found.end(), best, best + live);
    }
}

// The best `count` matches first, equals in the order of their proposers.
void rank(std::vector<Match>& found, int64_t count) {
    std::partial_sort(found.begin(), found.begin() + count, found.end(), [](const Match& one, const Match& other) {
        return one.value != other.value ? one.value > other.value : one.proposer < other.proposer;
    });
}

// Places of even number and of odd number.
void split(const std::vector<int64_t>& all, std::vector<int64_t>& even, std::vector<int64_t>& odd) {
    even.clear();
    odd.clear();
    for (size_t i = 0; i < all.size(); ++i) (i % 2 ? odd : even).push_back(all[i]);
}

// Standard containers say by an exception that there is no memory; the Python side hears it as a status.
template <typename Work>
int guarded(Work work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

int ps_top_k(const float* scores, int64_t stride, int64_t rows, int64_t count, int64_t keep, int64_t* indices);

// quality [count] and places [count, 3] may be null. See largest_determinant in reference.py.
int ps_largest_determinant(const float* data, int64_t stride, int64_t count, int64_t width, const float* quality,
                           const float* places, float share, float falloff, int64_t picks, float least,
                           int64_t* chosen) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        std::vector<float> weight(count, 1.0f), gain(count), floor(count), held(picks * count);
        if (quality != nullptr) weight.assign(quality, quality + count);
        for (int64_t j = 0; j < count; ++j) {
            gain[j] = inverse[j] > 0.0f ? weight[j] * weight[j] : 0.0f;
            floor[j] = least * gain[j];
        }
        for (int64_t i = 0; i < picks; ++i) {
            const int64_t pick = largest(gain);
            chosen[i] = pick;
            float* row = held.data() + i * count;
            if (gain[pick] > 0.0f) {
                cosines(rows, inverse, pick, row);
                if (places != nullptr) fade(row, count, places, pick, share, falloff);
                for (int64_t j = 0; j < count; ++j) row[j] *= weight[pick] * weight[j];
                subtract(row, held.data(), i, count, pick);
                const float scale = 1.0f / std::sqrt(gain[pick]);
                for (int64_t j = 0; j < count; ++j) {
                    row[j] *= scale;
                    if (gain[j] < 0.0f) continue;
                    gain[j] -= row[j] * row[j];
                    if (gain[j] <= floor[j]) gain[j] = 0.0f;
                }
            }
            gain[pick] = -1.0f;
        }
    });
}

// See farthest_first in reference.py.
int ps_farthest_first(const float* data, int64_t stride, int64_t count, int64_t width, int64_t picks, int64_t* chosen) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        const float infinity = std::numeric_limits<float>::infinity();
        std::vector<float> distance(count, infinity), row(count);
        for (int64_t i = 0; i + 1 < count; ++i) {
            // Every pair once: row i with the rows behind it.
            const Rows behind{rows[i], stride, count - i, width};
            int64_t j = 1;
            for (; j + 4 <= behind.count; j += 4) dots<4>(rows[i], behind, j, row.data() + j);
            for (; j < behind.count; ++j) dots<1>(rows[i], behind, j, row.data() + j);
            for (j = 1; j < behind.count; ++j) {
                const float apart = 1.0f - row[j] * (inverse[i] * inverse[i + j]);
                distance[i] = std::min(distance[i], apart);
                distance[i + j] = std::min(distance[i + j], apart);
            }
        }
        std::vector<char> taken(count, 0);
        for (int64_t i = 0; i < picks; ++i) {
            const int64_t pick = largest(distance);
            chosen[i] = pick;
            taken[pick] = 1;
            if (i == 0) std::fill(distance.begin(), distance.end(), infinity);
            cosines(rows, inverse, pick, row.data());
            for (int64_t j = 0; j < count; ++j)
                distance[j] = taken[j] ? -infinity : std::min(distance[j], 1.0f - row[j]);
        }
    });
}

// owner [count]: which of the groups that are left a row belongs to. See merge_alike in reference.py.
int ps_merge_alike(const float* data, int64_t stride, int64_t count, int64_t width, int64_t groups, int64_t per_round,
                   int64_t* places, int64_t* owner) {
    return guarded([&] {
        std::vector<float> sums(count * width), panels, block;
        for (int64_t i = 0; i < count; ++i) std::copy_n(data + i * stride, width, sums.data() + i * width);
        const Rows rows{sums.data(), width, count, width};
        std::vector<float> inverse = inverse_norms(rows);
        std::vector<int64_t> alive(count), even, odd, joined(count, -1);
        for (int64_t i = 0; i < count; ++i) alive[i] = i;
        std::vector<Match> found;
        while (static_cast<int64_t>(alive.size()) > groups) {
            split(alive, even, odd);
            const int64_t left = alive.size();
            const int64_t pairs = std::min({per_round, left - groups, left / 2});
            pack(rows, odd, inverse, panels);
            match(rows, even, odd.size(), inverse, panels, block, found);
            rank(found, pairs);
            for (int64_t p = 0; p < pairs; ++p) {
                const int64_t source = even[found[p].proposer], target = odd[found[p].partner];
                joined[source] = target;
                float* into = sums.data() + target * width;
                for (int64_t k = 0; k < width; ++k) into[k] += rows[source][k];
                inverse[target] = inverse_norms({into, width, 1, width})[0];
            }
            alive.erase(std::remove_if(alive.begin(), alive.end(), [&](int64_t i) { return joined[i] >= 0; }),
                        alive.end());
        }
        std::vector<int64_t> number(count);
        for (int64_t g = 0; g < groups; ++g) number[places[g] = alive[g]] = g;
        for (int64_t i = 0; i < count; ++i) {
            int64_t last = i;
            while (joined[last] >= 0) last = joined[last];
            owner[i] = number[last];
        }
    });
}

// among [candidates] row numbers, ascending; the first `kept` of them become what is left. See drop_alike.
int ps_drop_alike(const float* data, int64_t stride, int64_t count, int64_t width, int64_t* among, int64_t candidates,
                  int64_t kept, int64_t per_round) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        std::vector<float> panels, block;
        std::vector<int64_t> alive(among, among + candidates), even, odd;
        std::vector<char> gone(count, 0);
        std::vector<Match> found;
        while (static_cast<int64_t>(alive.size()) > kept) {
            split(alive, even, odd);
            const int64_t left = alive.size();
            const int64_t leaving = std::min({per_round, left - kept, static_cast<int64_t>(even.size())});
            pack(rows, odd, inverse, panels);
            match(rows, even, odd.size(), inverse, panels, block, found);
            rank(found, leaving);
            for (int64_t i = 0; i < leaving; ++i) gone[even[found[i].proposer]] = 1;
            alive.erase(std::remove_if(alive.begin(), alive.end(), [&](int64_t i) { return gone[i]; }), alive.end());
        }
        std::copy(alive.begin(), alive.end(), among);
    });
}

// owner [choosers]: which of the rows `partners` each of the rows `among` is most like. See closest in reference.py.
int ps_closest(const float* data, int64_t stride, int64_t count, int64_t width, const int64_t* among, int64_t choosers,
               const int64_t* partners, int64_t chosen, int64_t* owner) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        std::vector<float> panels, block;
        std::vector<Match> found;
        pack(rows, std::vector<int64_t>(partners, partners + chosen), inverse, panels);
        match(rows, std::vector<int64_t>(among, among + choosers), chosen, inverse, panels, block, found);
        for (const Match& one : found) owner[one.proposer] = one.partner;
    });
}

// found [choosers, keep]: the rows most like each of the rows `among`, ascending. See most_alike in reference.py.
int ps_most_alike(const float* data, int64_t stride, int64_t count, int64_t width, const int64_t* among,
                  int64_t choosers, int64_t keep, int64_t* found) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        std::vector<float> similar(count);
        for (int64_t a = 0; a < choosers; ++a) {
            cosines(rows, inverse, among[a], similar.data());
            similar[among[a]] = -std::numeric_limits<float>::infinity();
            ps_top_k(similar.data(), count, 1, count, keep, found + a * keep);
        }
    });
}

// weights [keep, count]: what the rows `kept`, ascending, are made of. See fold_alike in reference.py.
int ps_fold_alike(const float* data, int64_t stride, int64_t count, int64_t width, const int64_t* kept, int64_t keep,
                  float share, float* weights) {
    return guarded([&] {
        const Rows rows{data, stride, count, width};
        const std::vector<float> inverse = inverse_norms(rows);
        const std::vector<int64_t> into(kept, kept + keep);
        std::vector<int64_t> others, members(keep, 0);
        for (int64_t i = 0, next = 0; i < count; ++i)
            if (next < keep && kept[next] == i)
                ++next;
            else
                others.push_back(i);
        std::vector<float> panels, block;
        std::vector<Match> found;
        pack(rows, into, inverse, panels);
        match(rows, others, keep, inverse, panels, block, found);
        for (const Match& one : found) ++members[one.partner];
        std::fill_n(weights, keep * count, 0.0f);
        for (int64_t k = 0; k < keep; ++k) weights[k * count + kept[k]] = members[k] ? 1.0f - share : 1.0f;
        for (const Match& one : found)
            weights[one.partner * count + others[one.proposer]] = share / static_cast<float>(members[one.partner]);
    });
}

// out [merged, width]: sums of rows by weights [merged, count], most of which are 0. See merge_rows in reference.py.
int ps_merge_rows(const float* data, int64_t stride, int64_t count, int64_t width, const float* weights,
                  int64_t weight_stride, int64_t merged, float* out) {
    for (int64_t m = 0; m < merged; ++m) {
        const float* weight = weights + m * weight_stride;
        float* __restrict into = out + m * width;
        bool empty = true;
        for (int64_t j = 0; j < count; ++j) {
            const float scale = weight[j];
            if (scale == 0.0f) continue;
            const float* __restrict row = data + j * stride;
            if (empty)
                for (int64_t k = 0; k < width; ++k) into[k] = scale * row[k];
            else
                for (int64_t k = 0; k < width; ++k) into[k] += scale * row[k];
            empty = false;
        }
        if (empty) std::fill_n(into, width, 0.0f);
    }
    return 0;
}

// indices [rows, keep]: the largest of each row of [rows, count], ascending; of equals the earlier are taken.
int ps_top_k(const float* scores, int64_t stride, int64_t rows, int64_t count, int64_t keep, int64_t* indices) {
    return guarded([&] {
        std::vector<float> values(count);
        for (int64_t r = 0; r < rows && keep > 0; ++r) {
            const float* row = scores + r * stride;
            std::copy_n(row, count, values.begin());
            std::nth_element(values.begin(), values.begin() + keep - 1, values.end(), std::greater<float>());
            const float least = values[keep - 1];
            int64_t equals = keep, *next = indices + r * keep;
            for (int64_t i = 0; i < count; ++i) equals -= row[i] > least;
            for (int64_t i = 0; i < count; ++i)
                if (row[i] > least || (row[i] == least && equals-- > 0)) *next++ = i;
        }
    });
}

}  // extern "C"
