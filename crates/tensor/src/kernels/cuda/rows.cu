// Kernels that pass over rows once or twice. A block of threads takes a row, or every thread single numbers.
//
// Sums are made in an order that nothing but the shape decides: the same inputs give the same bits on the same device.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#define INFINITY __int_as_float(0x7f800000)

// Rows of 32-bit floats, or of their upper halves. `stride` is in numbers.
struct Rows {
    void *data;
    i64 stride;
    i64 narrow;
};

__device__ inline float load(const Rows &x, i64 row, i64 col) {
    const i64 at = row * x.stride + col;
    if (x.narrow) return __uint_as_float((u32)((const u16 *)x.data)[at] << 16);
    return ((const float *)x.data)[at];
}

// To nearest even; what is not a number stays so.
__device__ inline u16 rounded(float v) {
    const u32 bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

__device__ inline void store(const Rows &y, i64 row, i64 col, float v) {
    const i64 at = row * y.stride + col;
    if (y.narrow) ((u16 *)y.data)[at] = rounded(v);
    else ((float *)y.data)[at] = v;
}

// Every number of `rows` rows of `cols`, as (row, col).
#define EACH(rows, cols, row, col)                                                                                      \
    for (i64 i_ = blockIdx.x * (i64)blockDim.x + threadIdx.x, row = i_ / (cols), col = i_ % (cols);                     \
         i_ < (i64)(rows) * (cols);                                                                                     \
         i_ += (i64)gridDim.x * blockDim.x, row = i_ / (cols), col = i_ % (cols))

// The sum over all threads of the block, for each of them.
__device__ float summed(float v) {
    __shared__ float of_warps[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
    __syncthreads();
    if (!lane) of_warps[warp] = v;
    __syncthreads();
    const int warps = (blockDim.x + 31) >> 5;
    float all = 0;
    for (int i = 0; i < warps; i++) all += of_warps[i];
    return all;
}

__device__ float highest(float v) {
    __shared__ float of_warps[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int step = 16; step; step >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
    __syncthreads();
    if (!lane) of_warps[warp] = v;
    __syncthreads();
    const int warps = (blockDim.x + 31) >> 5;
    float all = of_warps[0];
    for (int i = 1; i < warps; i++) all = fmaxf(all, of_warps[i]);
    return all;
}

extern "C" __global__ void convert(Rows x, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, t, d, load(x, t, d));
}

extern "C" __global__ void add(Rows x, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, t, d, load(y, t, d) + load(x, t, d));
}

extern "C" __global__ void multiply(Rows x, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, t, d, load(y, t, d) * load(x, t, d));
}

extern "C" __global__ void scale(Rows y, float factor, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, t, d, load(y, t, d) * factor);
}

extern "C" __global__ void fill(Rows y, float value, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, t, d, value);
}

extern "C" __global__ void add_to_rows(const float *b_d, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, t, d, load(y, t, d) + b_d[d]);
}

extern "C" __global__ void gather(Rows x, const u32 *ids, Rows y, i64 rows, i64 cols, i64 accumulate) {
    EACH(rows, cols, t, d) {
        const float v = load(x, ids[t], d);
        store(y, t, d, accumulate ? load(y, t, d) + v : v);
    }
}

extern "C" __global__ void scatter(Rows x, const u32 *ids, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, d) store(y, ids[t], d, load(x, t, d));
}

// Blocks of 32 x 8 threads: a thread sums every eighth row of its column, and the eight sums are added in order.
__device__ void column_sums(float sum, float *y_d, i64 cols, i64 col, bool accumulate) {
    __shared__ float sums[8][33];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && col < cols) {
        float all = 0;
        for (int i = 0; i < 8; i++) all += sums[i][threadIdx.x];
        y_d[col] = accumulate ? y_d[col] + all : all;
    }
    __syncthreads();
}

extern "C" __global__ void sum_rows(Rows x, float *y_d, i64 rows, i64 cols, i64 accumulate) {
    const i64 col = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (col < cols)
        for (i64 t = threadIdx.y; t < rows; t += 8) sum += load(x, t, col);
    column_sums(sum, y_d, cols, col, accumulate);
}

// One block a row.
extern "C" __global__ void rms_norm(Rows x, const float *w_d, float eps, Rows y, i64 cols) {
    const i64 t = blockIdx.x;
    float squares = 0;
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) squares += load(x, t, d) * load(x, t, d);
    const float inverse = rsqrtf(summed(squares) / cols + eps);
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) store(y, t, d, load(x, t, d) * inverse * w_d[d]);
}

// dx += (g - x̂ mean(g x̂)) / rms, g = dy w, x̂ = x / rms. `inverse_t` keeps 1 / rms for the gradient by w.
extern "C" __global__ void rms_norm_dx(Rows x, const float *w_d, float eps, Rows dy, Rows dx, float *inverse_t, i64 cols) {
    const i64 t = blockIdx.x;
    float squares = 0, products = 0;
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) {
        const float v = load(x, t, d);
        squares += v * v;
        products += load(dy, t, d) * w_d[d] * v;
    }
    const float inverse = rsqrtf(summed(squares) / cols + eps);
    const float along = summed(products) * inverse * inverse / cols;
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) {
        const float g = load(dy, t, d) * w_d[d];
        store(dx, t, d, load(dx, t, d) + inverse * (g - load(x, t, d) * along));
    }
    if (threadIdx.x == 0) inverse_t[t] = inverse;
}

extern "C" __global__ void rms_norm_dw(Rows x, const float *inverse_t, Rows dy, float *dw_d, i64 rows, i64 cols) {
    const i64 d = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (d < cols)
        for (i64 t = threadIdx.y; t < rows; t += 8) sum += load(dy, t, d) * load(x, t, d) * inverse_t[t];
    column_sums(sum, dw_d, cols, d, true);
}

__device__ void moments(const Rows &x, i64 t, i64 cols, float eps, float &mean, float &inverse) {
    float sum = 0, squares = 0;
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) sum += load(x, t, d);
    mean = summed(sum) / cols;
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) {
        const float off = load(x, t, d) - mean;
        squares += off * off;
    }
    inverse = rsqrtf(summed(squares) / cols + eps);
}

extern "C" __global__ void layer_norm(Rows x, const float *w_d, const float *b_d, float eps, Rows y, i64 cols) {
    const i64 t = blockIdx.x;
    float mean, inverse;
    moments(x, t, cols, eps, mean, inverse);
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x)
        store(y, t, d, (load(x, t, d) - mean) * inverse * w_d[d] + b_d[d]);
}

// dx += (g - mean(g) - x̂ mean(g x̂)) / σ, g = dy w, x̂ = (x - mean) / σ.
extern "C" __global__ void layer_norm_dx(Rows x, const float *w_d, float eps, Rows dy, Rows dx, float *mean_t,
                                         float *inverse_t, i64 cols) {
    const i64 t = blockIdx.x;
    float mean, inverse, sum = 0, products = 0;
    moments(x, t, cols, eps, mean, inverse);
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) {
        const float g = load(dy, t, d) * w_d[d];
        sum += g;
        products += g * (load(x, t, d) - mean) * inverse;
    }
    const float level = summed(sum) / cols;
    const float along = summed(products) / cols;
    for (i64 d = threadIdx.x; d < cols; d += blockDim.x) {
        const float g = load(dy, t, d) * w_d[d], hat = (load(x, t, d) - mean) * inverse;
        store(dx, t, d, load(dx, t, d) + inverse * (g - level - hat * along));
    }
    if (threadIdx.x == 0) {
        mean_t[t] = mean;
        inverse_t[t] = inverse;
    }
}

extern "C" __global__ void layer_norm_dwb(Rows x, const float *mean_t, const float *inverse_t, Rows dy, float *dw_d,
                                          float *db_d, i64 rows, i64 cols) {
    const i64 d = blockIdx.x * 32 + threadIdx.x;
    float by_w = 0, by_b = 0;
    if (d < cols)
        for (i64 t = threadIdx.y; t < rows; t += 8) {
            const float g = load(dy, t, d);
            by_w += g * (load(x, t, d) - mean_t[t]) * inverse_t[t];
            by_b += g;
        }
    column_sums(by_w, dw_d, cols, d, true);
    column_sums(by_b, db_d, cols, d, true);
}

// Pairs (i, i + width / 2) of every head; `sign` is 1, or -1 to turn back.
extern "C" __global__ void rope(Rows x, Rows cos_ti, Rows sin_ti, float sign, i64 rows, i64 heads, i64 width) {
    const i64 half = width / 2;
    EACH(rows, heads * half, t, at) {
        const i64 i = at % half, low = at / half * width + i;
        const float c = load(cos_ti, t, i), s = sign * load(sin_ti, t, i);
        const float a = load(x, t, low), b = load(x, t, low + half);
        store(x, t, low, a * c - b * s);
        store(x, t, low + half, b * c + a * s);
    }
}

enum { SILU, GELU, GELU_TANH, RELU };

__device__ inline float activated(int f, float x) {
    switch (f) {
    case SILU: return x / (1.0f + expf(-x));
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: return fmaxf(x, 0.0f);
    }
}

__device__ inline float slope(int f, float x) {
    switch (f) {
    case SILU: {
        const float s = 1.0f / (1.0f + expf(-x));
        return s * (1.0f + x * (1.0f - s));
    }
    case GELU:
        return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x);
    case GELU_TANH: {
        const float h = tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x));
        return 0.5f * (1.0f + h) + 0.5f * x * (1.0f - h * h) * 0.79788456080286536f * (1.0f + 0.134145f * x * x);
    }
    default: return x > 0.0f ? 1.0f : 0.0f;
    }
}

extern "C" __global__ void gated(int f, Rows gate, Rows up, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, i) store(y, t, i, activated(f, load(gate, t, i)) * load(up, t, i));
}

extern "C" __global__ void gated_vjp(int f, Rows gate, Rows up, Rows dy, Rows dgate, Rows dup, i64 rows, i64 cols) {
    EACH(rows, cols, t, i) {
        const float g = load(gate, t, i), u = load(up, t, i), d = load(dy, t, i);
        store(dgate, t, i, d * u * slope(f, g));
        store(dup, t, i, d * activated(f, g));
    }
}

extern "C" __global__ void activate(int f, Rows x, Rows y, i64 rows, i64 cols) {
    EACH(rows, cols, t, i) store(y, t, i, activated(f, load(x, t, i)));
}

extern "C" __global__ void activate_vjp(int f, Rows x, Rows dy, Rows dx, i64 rows, i64 cols) {
    EACH(rows, cols, t, i) store(dx, t, i, load(dy, t, i) * slope(f, load(x, t, i)));
}

// One block a row. Without weights only the losses are written; with them the gradient takes the logits' place, or goes to
// `rounded` where there is one.
extern "C" __global__ void cross_entropy(Rows logits, const u32 *labels, const float *weights, Rows rounded, float *nll,
                                         i64 cols) {
    const i64 t = blockIdx.x;
    float largest = -INFINITY, total = 0;
    for (i64 v = threadIdx.x; v < cols; v += blockDim.x) largest = fmaxf(largest, load(logits, t, v));
    largest = highest(largest);
    for (i64 v = threadIdx.x; v < cols; v += blockDim.x) total += expf(load(logits, t, v) - largest);
    total = summed(total);
    const i64 label = labels[t];
    if (threadIdx.x == 0) nll[t] = (largest - load(logits, t, label)) + logf(total);
    if (!weights) return;
    // The loss is read from a logit that the gradient takes the place of.
    __syncthreads();
    const float weight = weights[t], factor = weight / total;
    for (i64 v = threadIdx.x; v < cols; v += blockDim.x) {
        const float d = expf(load(logits, t, v) - largest) * factor - (v == label ? weight : 0.0f);
        if (rounded.data) store(rounded, t, v, d);
        else store(logits, t, v, d);
    }
}
