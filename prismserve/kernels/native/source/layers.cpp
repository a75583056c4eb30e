// Several decoder layers in one call, so that nothing but their arithmetic lies between two products.
#include "ops.h"
#include "simd.h"

using namespace prismserve;

namespace {

// As prismserve/kernels/layer_stack/native.py writes them: pointers, null where a layer has no such part.
struct Layer {
    const float* input_norm;
    const void* qkv;
    const float* qkv_bias;
    const float *q_norm, *k_norm;
    const void* output;
    const float* output_bias;
    const float* mlp_norm;
    const void* gate_up;
    const float* gate_up_bias;
    const void* down;
    const float* down_bias;
};

struct Shape {
    int64_t hidden, inner, heads, kv_heads, width;
};

}  // namespace

extern "C" {

// x [tokens, hidden] becomes what leaves the last of the layers; their keys and values enter the cache, whose layers
// lie strides[4] elements apart. Working memory: qkv [tokens, heads + 2 kv_heads, width], attended [tokens, heads,
// width], gated [tokens, inner].
int ps_layers(const void* records, int64_t layers, int element, const int64_t* shape, float eps, float* x,
              int64_t tokens, const float* cosine, const float* sine, void* cache, int cache_element,
              const int64_t* strides, int64_t block_tokens, const int64_t* slots, const int32_t* tables,
              int64_t table_width, const int32_t* starts, const int32_t* queries, const int32_t* cached,
              int64_t sequences, float scale, float* qkv, float* attended, float* gated, int threads) {
    const Layer* all = static_cast<const Layer*>(records);
    const Shape of{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const int64_t queried = of.heads * of.width, stored = of.kv_heads * of.width, wide = queried + 2 * stored;
    const int64_t cache_bytes = strides[4] * (cache_element == BFLOAT16 ? 2 : 4);
    int failed = 0;
    for (int64_t index = 0; index < layers && !failed; ++index) {
        const Layer& layer = all[index];
        void* base = static_cast<char*>(cache) + index * cache_bytes;
        failed |= ps_linear(x, of.hidden, tokens, of.hidden, layer.qkv, element, wide, layer.qkv_bias, layer.input_norm,
                            eps, nullptr, 0, qkv, wide, 0, threads);
        ps_rotary(qkv, wide, tokens, of.heads + of.kv_heads, of.width, cosine, sine, of.width, layer.q_norm,
                  layer.k_norm, of.heads, eps, threads);
        ps_write_kv(base, cache_element, strides, block_tokens, of.kv_heads, of.width, slots, tokens, qkv + queried,
                    wide, qkv + queried + stored, wide);
        failed |= ps_attend(base, cache_element, strides, block_tokens, of.kv_heads, of.width, qkv, wide, of.heads,
                            tables, table_width, starts, queries, cached, sequences, scale, attended, nullptr, threads);
        failed |= ps_linear(attended, queried, tokens, queried, layer.output, element, of.hidden, layer.output_bias,
                            nullptr, 0.0f, x, of.hidden, x, of.hidden, 0, threads);
        failed |= ps_linear(x, of.hidden, tokens, of.hidden, layer.gate_up, element, 2 * of.inner, layer.gate_up_bias,
                            layer.mlp_norm, eps, nullptr, 0, gated, of.inner, 1, threads);
        failed |= ps_linear(gated, of.inner, tokens, of.inner, layer.down, element, of.hidden, layer.down_bias, nullptr,
                            0.0f, x, of.hidden, x, of.hidden, 0, threads);
    }
    return failed;
}
}
