// Cosines between rows of features, where they are asked for, and what is most alike; no [count, count] matrix is held.
//
// A product of two rows is the same bits whatever it is computed beside, so every choice that rests on one is, too.
#pragma once

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "tile.h"

namespace prismserve {

constexpr float NONE = -std::numeric_limits<float>::infinity();

// Features of `count` rows; row i begins at data + i * stride.
struct Rows {
    const float* data;
    int64_t stride, count, width;
    const float* operator[](int64_t i) const { return data + i * stride; }
};

// 1 / |row|, 0 for a row without direction.
inline std::vector<float> inverse_norms(const Rows& rows) {
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

// 0, 1, ... count - 1
inline std::vector<int64_t> numbers(int64_t count) {
    std::vector<int64_t> all(count);
    for (int64_t i = 0; i < count; ++i) all[i] = i;
    return all;
}

// out[a * stride + b] = left[a] . right[b] over `width`, LEFT x RIGHT of them at once.
template <int LEFT, int RIGHT>
inline void dots(const float* const* left, const float* const* right, int64_t width, float* out, int64_t stride) {
    constexpr int FOURS = RIGHT % 4 == 0 ? LEFT * RIGHT : 0;
    Floats products[LEFT * RIGHT];
#pragma GCC unroll 16
    for (int s = 0; s < LEFT * RIGHT; ++s) products[s] = splat(0.0f);
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        Floats parts[LEFT];
#pragma GCC unroll 8
        for (int a = 0; a < LEFT; ++a) parts[a] = load(left[a] + k);
#pragma GCC unroll 8
        for (int b = 0; b < RIGHT; ++b) {
            const Floats other = load(right[b] + k);
#pragma GCC unroll 8
            for (int a = 0; a < LEFT; ++a) products[a * RIGHT + b] += parts[a] * other;
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < FOURS; s += 4)
        *reinterpret_cast<Quad*>(out + s / RIGHT * stride + s % RIGHT) =
            sums(products[s], products[s + 1], products[s + 2], products[s + 3]);
#pragma GCC unroll 16
    for (int s = FOURS; s < LEFT * RIGHT; ++s) out[s / RIGHT * stride + s % RIGHT] = sum(products[s]);
    if (k == width) return;
    for (int s = 0; s < LEFT * RIGHT; ++s)
        for (int64_t rest = k; rest < width; ++rest)
            out[s / RIGHT * stride + s % RIGHT] += left[s / RIGHT][rest] * right[s % RIGHT][rest];
}

constexpr int STRIP = 3;  // rows on the left at once: with 4 on the right 12 accumulators

// As `dots`, for any number on the right.
template <int LEFT, int RIGHT>
inline void strip_of(const float* const* left, const float* const* right, int64_t rights, int64_t width, float* out,
                     int64_t stride) {
    int64_t b = 0;
    for (; b + RIGHT <= rights; b += RIGHT) dots<LEFT, RIGHT>(left, right + b, width, out + b, stride);
    for (; b + 2 <= rights; b += 2) dots<LEFT, 2>(left, right + b, width, out + b, stride);
    if (b < rights) dots<LEFT, 1>(left, right + b, width, out + b, stride);
}

// As `dots`, for 1 to STRIP on the left and any number on the right.
inline void strip(const float* const* left, int64_t lefts, const float* const* right, int64_t rights, int64_t width,
                  float* out, int64_t stride) {
    if (lefts == 1)
        strip_of<1, 8>(left, right, rights, width, out, stride);
    else if (lefts == 2)
        strip_of<2, 4>(left, right, rights, width, out, stride);
    else
        strip_of<3, 4>(left, right, rights, width, out, stride);
}

// Some of the rows, ascending, each with where it lies.
struct Some {
    std::vector<int64_t> which;
    std::vector<const float*> data;

    // All of them.
    explicit Some(const Rows& rows) : which(numbers(rows.count)), data(rows.count) {
        for (int64_t i = 0; i < rows.count; ++i) data[i] = rows[i];
    }

    int64_t count() const { return which.size(); }

    // Nothing happens if it is not among them, as where features are not numbers and a row is chosen twice.
    void drop(int64_t row) {
        const auto place = std::lower_bound(which.begin(), which.end(), row) - which.begin();
        if (place == count() || which[place] != row) return;
        which.erase(which.begin() + place);
        data.erase(data.begin() + place);
    }
};

// out[b] = cosine of row `one` with each of `some`.
inline void cosines(const Rows& rows, const std::vector<float>& inverse, int64_t one, const Some& some, float* out) {
    const float* left = rows[one];
    strip(&left, 1, some.data.data(), some.count(), rows.width, out, some.count());
    for (int64_t b = 0; b < some.count(); ++b) out[b] *= inverse[one] * inverse[some.which[b]];
}

// The first of the largest.
inline int64_t largest(const float* values, int64_t count) {
    Floats lanes = splat(NONE);
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) lanes = maximum(load(values + j), lanes);
    float most = NONE;
    for (int lane = 0; lane < LANES; ++lane) most = std::max(most, lanes[lane]);
    for (; j < count; ++j) most = std::max(most, values[j]);
    for (j = 0; j < count; ++j)
        if (values[j] == most) return j;
    return 0;
}

// Row numbers `which` of `rows`, each times its scale, as panels of 16 columns that multiply() takes.
inline void pack(const Rows& rows, const std::vector<int64_t>& which, const std::vector<float>& scale,
                 std::vector<float>& to) {
    const int64_t columns = which.size();
    to.resize((columns + PANEL - 1) / PANEL * rows.width * PANEL);
    for (int64_t first = 0; first < columns; first += PANEL) {
        const int64_t live = std::min<int64_t>(PANEL, columns - first);
        float* panel = to.data() + first * rows.width;
        if (live < PANEL) std::fill_n(panel, rows.width * PANEL, 0.0f);
        for (int64_t c = 0; c < live; ++c) {
            const float* row = rows[which[first + c]];
            const float factor = scale[which[first + c]];
            for (int64_t k = 0; k < rows.width; ++k) panel[k * PANEL + c] = row[k] * factor;
        }
    }
}

struct Match {
    float value;
    int64_t proposer, partner;  // numbers within their lists
};

// The largest value each lane has seen, and which column it stood in.
struct Leaders {
    Floats values = splat(NONE);
    Ints columns = {};

    // Of equals what came first stays.
    void see(Floats value, Ints column) {
        const Ints better = value > values;
        values = better ? value : values;
        columns = better ? column : columns;
    }

    // The largest of all, of equals that of the lowest column.
    Match best(int64_t proposer) const {
        Match found{values[0], proposer, columns[0]};
        for (int lane = 1; lane < LANES; ++lane)
            if (values[lane] > found.value || (values[lane] == found.value && columns[lane] < found.partner))
                found.value = values[lane], found.partner = columns[lane];
        return found;
    }
};

// For every row of `proposers` the most similar of the `partners` that are packed in panels; ties to the earlier.
inline void match(const Rows& rows, const std::vector<int64_t>& proposers, int64_t partners,
                  const std::vector<float>& scale, const std::vector<float>& panels, std::vector<float>& block,
                  std::vector<Match>& found) {
    found.clear();
    block.resize(TILE_ROWS * rows.width);
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    for (size_t first = 0; first < proposers.size(); first += TILE_ROWS) {
        const int live = static_cast<int>(std::min<size_t>(TILE_ROWS, proposers.size() - first));
        Leaders leaders[TILE_ROWS];
        for (int r = 0; r < live; ++r) {
            const int64_t row = proposers[first + r];
            for (int64_t k = 0; k < rows.width; ++k) block[r * rows.width + k] = rows[row][k] * scale[row];
        }
        with_rows(live, [&](auto count) {
            constexpr int ROWS = decltype(count)::value;
            for (int64_t column = 0; column < partners; column += PANEL) {
                Floats products[ROWS][2] = {};
                multiply<ROWS, 1, false>(block.data(), rows.width, int64_t{1}, panels.data() + column * rows.width,
                                         int64_t{0}, int64_t{PANEL}, rows.width, int64_t{0}, products);
                for (int half = 0; half < 2; ++half) {
                    const Ints place = lanes + static_cast<int32_t>(column + half * LANES);
                    const Ints exists = place < Ints{} + static_cast<int32_t>(partners);
                    for (int r = 0; r < ROWS; ++r) leaders[r].see(exists ? products[r][half] : splat(NONE), place);
                }
            }
        });
        for (int r = 0; r < live; ++r) found.push_back(leaders[r].best(static_cast<int64_t>(first) + r));
    }
}

// weights [keep, count]: rows `kept`, of which each of `centres` takes in those of `others` that it owns; all ascending.
inline void fold(int64_t count, const int64_t* kept, int64_t keep, const std::vector<int64_t>& centres,
                 const std::vector<int64_t>& others, const std::vector<int64_t>& owner, float own, float share,
                 float* weights) {
    std::vector<int64_t> members(centres.size(), 0), places(centres.size());
    std::fill_n(weights, keep * count, 0.0f);
    for (int64_t k = 0; k < keep; ++k) weights[k * count + kept[k]] = 1.0f;
    for (const int64_t one : owner) ++members[one];
    for (size_t m = 0; m < centres.size(); ++m) {
        places[m] = std::lower_bound(kept, kept + keep, centres[m]) - kept;
        if (members[m]) weights[places[m] * count + centres[m]] = own;
    }
    for (size_t a = 0; a < others.size(); ++a)
        weights[places[owner[a]] * count + others[a]] = share / static_cast<float>(members[owner[a]]);
}

// The best `count` matches first, equals in the order of their proposers.
inline void rank(std::vector<Match>& found, int64_t count) {
    std::partial_sort(found.begin(), found.begin() + count, found.end(), [](const Match& one, const Match& other) {
        return one.value != other.value ? one.value > other.value : one.proposer < other.proposer;
    });
}

// Places of even number and of odd number.
inline void split(const std::vector<int64_t>& all, std::vector<int64_t>& even, std::vector<int64_t>& odd) {
    even.clear();
    odd.clear();
    for (size_t i = 0; i < all.size(); ++i) (i % 2 ? odd : even).push_back(all[i]);
}

// The best `keep` of some values, of equals the earlier.
class Best {
  public:
    // values [count], 1 <= keep <= count
    void choose(const float* values, int64_t count, int64_t keep) {
        keys.assign((count + LANES - 1) / LANES * LANES, std::numeric_limits<int32_t>::min());
        for (int64_t i = 0; i < count; ++i) keys[i] = key(values[i]);
        // At least `keep` keys are `low` or more, and fewer than that more than `high`.
        int64_t low = *std::min_element(keys.begin(), keys.begin() + count), high = low;
        for (int64_t i = 0; i < count; ++i) high = std::max<int64_t>(high, keys[i]);
        while (low < high) {
            const int64_t middle = low + (high - low + 1) / 2;
            const int64_t reaching = at_least(static_cast<int32_t>(middle));
            if (reaching == keep) {
                least = static_cast<int32_t>(middle - 1);
                equals = 0;
                return;
            }
            if (reaching > keep)
                low = middle;
            else
                high = middle - 1;
        }
        least = static_cast<int32_t>(low);
        equals = keep;
        for (int64_t i = 0; i < count; ++i) equals -= keys[i] > least;
    }

    // Whether value i is among them; asked once for each, in order.
    bool take(int64_t i) {
        const bool equal = keys[i] == least && equals > 0;
        equals -= equal;
        return equal || keys[i] > least;
    }

  private:
    // Ordered as the values are; 0 and -0 are equal.
    static int32_t key(float value) {
        const float plain = value + 0.0f;
        int32_t bits;
        std::memcpy(&bits, &plain, sizeof bits);
        return bits ^ ((bits >> 31) & 0x7fffffff);
    }

    int64_t at_least(int32_t bound) const {
        Ints counts = {};
        const Ints bounds = Ints{} + bound;
        for (size_t i = 0; i < keys.size(); i += LANES)
            counts -= *reinterpret_cast<const Ints*>(keys.data() + i) >= bounds;
        int64_t total = 0;
        for (int lane = 0; lane < LANES; ++lane) total += counts[lane];
        return total;
    }

    std::vector<int32_t> keys;
    int32_t least = 0;
    int64_t equals = 0;
};

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

}  // namespace prismserve
