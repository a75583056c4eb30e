// Functions of this library that others of its functions call.
#pragma once

#include <cstdint>

extern "C" {

int ps_linear(const float* x, int64_t x_stride, int64_t rows, int64_t depth, const void* weight, int element,
              int64_t columns, const float* bias, const float* norm, float eps, const float* residual,
              int64_t residual_stride, float* y, int64_t y_stride, int gated, int threads);

int ps_rotary(float* x, int64_t token_stride, int64_t tokens, int64_t heads, int64_t width, const float* cosine,
              const float* sine, int64_t angle_stride, const float* q_gain, const float* k_gain, int64_t q_heads,
              float eps, int threads);

int ps_write_kv(void* base, int element, const int64_t* strides, int64_t block_tokens, int64_t kv_heads, int64_t width,
                const int64_t* slots, int64_t tokens, const float* keys, int64_t key_stride, const float* values,
                int64_t value_stride);

int ps_attend(void* base, int element, const int64_t* strides, int64_t block_tokens, int64_t kv_heads, int64_t width,
              const float* q, int64_t token_stride, int64_t heads, const int32_t* tables, int64_t table_width,
              const int32_t* starts, const int32_t* queries, const int32_t* cached, int64_t sequences, float scale,
              float* out, float* lse, int threads);
}
