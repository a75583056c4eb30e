// Operations on rows of activations: RMS norm, gate, rotary embedding.
#include <algorithm>

#include "ops.h"
#include "tile.h"

namespace prismserve {
namespace {

void rotate(float* head, int64_t half, const float* cosine, const float* sine) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats first = load(head + i), second = load(head + half + i);
        store(head + i, first * load(cosine + i) - second * load(sine + i));
        store(head + half + i, second * load(cosine + half + i) + first * load(sine + half + i));
    }
    for (; i < half; ++i) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cosine[i] - second * sine[i];
        head[half + i] = second * cosine[half + i] + first * sine[half + i];
    }
}

}  // namespace
}  // namespace prismserve

using namespace prismserve;

extern "C" {

int ps_rms_norm(const float* x, int64_t x_stride, int64_t rows, int64_t width, const float* gain, float eps, float* y,
                int64_t y_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * width > 65536)
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = x + r * x_stride;
        float* to = y + r * y_stride;
        const float scale = inverse_norm(from, width, eps);
        for (int64_t k = 0; k < width; ++k) to[k] = from[k] * scale * gain[k];
    }
    return 0;
}

// y[r, i] = silu(x[r, i]) * x[r, half + i].
int ps_silu_mul(const float* x, int64_t x_stride, int64_t rows, int64_t half, float* y, int64_t y_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * half > 65536)
    for (int64_t r = 0; r < rows; ++r) {
        const float *gate = x + r * x_stride, *up = gate + half;
        float* to = y + r * y_stride;
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) store(to + i, silu(load(gate + i)) * load(up + i));
        if (i < half) {
            float rest[LANES] = {};
            std::copy(gate + i, gate + half, rest);
            store(rest, silu(load(rest)));
            for (int64_t j = i; j < half; ++j) to[j] = rest[j - i] * up[j];
        }
    }
    return 0;
}

// Heads [tokens, heads, width] turned in place by the angles of their token; where there are gains, normalised
// before that, the first `q_heads` with q_gain, the others with k_gain.
int ps_rotary(float* x, int64_t token_stride, int64_t tokens, int64_t heads, int64_t width, const float* cosine,
              const float* sine, int64_t angle_stride, const float* q_gain, const float* k_gain, int64_t q_heads,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * width > 65536)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            float* head = x + t * token_stride + h * width;
            const float* gain = h < q_heads ? q_gain : k_gain;
            if (gain != nullptr) {
                const float scale = inverse_norm(head, width, eps);
                for (int64_t k = 0; k < width; ++k) head[k] *= scale * gain[k];
            }
            rotate(head, width / 2, cosine + t * angle_stride, sine + t * angle_stride);
        }
    return 0;
}
}
