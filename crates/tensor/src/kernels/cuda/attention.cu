// Attention within documents by online softmax, forward and reverse, compiled for one width of heads, W. It follows `rows.cu`.
//
// A block of 16 x 16 threads takes 32 rows of one head against 32 others at a time. A thread has two rows, and every
// sixteenth column of what they give: rows are spread over half-warps, whose threads make sums together.

#define B 32
#define NC ((W + 15) / 16)
#define WP (W + 1)

// 32 rows at most of a document, and the rows of the other side that they meet.
struct Tile {
    // Their first row, their number, and the position of the first in its document.
    int row, count, position;
    // The first row of the other side's document, and its length.
    int other, length;
};

// Whether a query sees a key, by their positions.
__device__ inline bool sees(int query, int key, int causal, int window) {
    return !causal || (key <= query && (!window || query - key < window));
}

__device__ inline void fetch(float *to, const Rows &from, int row, int count, int head) {
    for (int i = threadIdx.y * 16 + threadIdx.x; i < B * W; i += 256) {
        const int r = i / W, w = i % W;
        to[r * WP + w] = r < count ? load(from, row + r, (i64)head * W + w) : 0.0f;
    }
}

__device__ inline float half_warp_sum(float v) {
    for (int step = 8; step; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

__device__ inline float half_warp_max(float v) {
    for (int step = 8; step; step >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}

// Products of two rows of `a` with two of `b`.
__device__ inline void dots(const float *a, const float *b, float s[2][2]) {
    const int r = threadIdx.y * 2, c = threadIdx.x;
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0;
    for (int w = 0; w < W; w++) {
        const float a0 = a[r * WP + w], a1 = a[(r + 1) * WP + w], b0 = b[c * WP + w], b1 = b[(c + 16) * WP + w];
        s[0][0] += a0 * b0;
        s[0][1] += a0 * b1;
        s[1][0] += a1 * b0;
        s[1][1] += a1 * b1;
    }
}

// `sum += p v` for the thread's rows of `p` and its columns.
__device__ inline void mix(float sum[2][NC], const float *p, const float *v) {
    const int r = threadIdx.y * 2;
    for (int k = 0; k < B; k++) {
        const float p0 = p[r * (B + 1) + k], p1 = p[(r + 1) * (B + 1) + k];
#pragma unroll
        for (int c = 0; c < NC; c++) {
            const int w = threadIdx.x + 16 * c;
            if (w < W) {
                const float x = v[k * WP + w];
                sum[0][c] += p0 * x;
                sum[1][c] += p1 * x;
            }
        }
    }
}

__device__ inline void put(const Rows &to, float sum[2][NC], const Tile &at, int head, float f0, float f1) {
#pragma unroll
    for (int c = 0; c < NC; c++) {
        const int w = threadIdx.x + 16 * c, r = threadIdx.y * 2;
        if (w < W && r < at.count) store(to, at.row + r, (i64)head * W + w, sum[0][c] * f0);
        if (w < W && r + 1 < at.count) store(to, at.row + r + 1, (i64)head * W + w, sum[1][c] * f1);
    }
}

extern "C" __global__ void attention(Rows q, Rows k, Rows v, Rows o, float *lse, const Tile *tiles, int heads,
                                     int kv_heads, float factor, int causal, int window) {
    extern __shared__ float shared[];
    float *qs = shared, *ks = qs + B * WP, *vs = ks + B * WP, *ps = vs + B * WP;
    const Tile at = tiles[blockIdx.x];
    const int head = blockIdx.y, of_keys = head / (heads / kv_heads), r = threadIdx.y * 2;
    fetch(qs, q, at.row, at.count, head);
    float sum[2][NC] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const int low = causal && window ? max(0, at.position - window + 1) : 0;
    const int high = causal ? min(at.length, at.position + at.count) : at.length;
    for (int key = low; key < high; key += B) {
        const int count = min(B, high - key);
        __syncthreads();
        fetch(ks, k, at.other + key, count, of_keys);
        fetch(vs, v, at.other + key, count, of_keys);
        __syncthreads();
        float s[2][2];
        dots(qs, ks, s);
        for (int i = 0; i < 2; i++) {
            float next = largest[i];
            for (int j = 0; j < 2; j++) {
                const int c = threadIdx.x + 16 * j;
                const bool seen = c < count && sees(at.position + r + i, key + c, causal, window);
                s[i][j] = seen ? s[i][j] * factor : -INFINITY;
                next = fmaxf(next, s[i][j]);
            }
            next = half_warp_max(next);
            // Nothing was seen yet: every exponential is 0.
            const float base = next == -INFINITY ? 0.0f : next, shrink = expf(largest[i] - base);
            float of_tile = 0;
            for (int j = 0; j < 2; j++) {
                const float p = expf(s[i][j] - base);
                ps[(r + i) * (B + 1) + threadIdx.x + 16 * j] = p;
                of_tile += p;
            }
            total[i] = total[i] * shrink + half_warp_sum(of_tile);
            largest[i] = next;
            for (int c = 0; c < NC; c++) sum[i][c] *= shrink;
        }
        __syncthreads();
        mix(sum, ps, vs);
    }
    put(o, sum, at, head, 1.0f / total[0], 1.0f / total[1]);
    for (int i = 0; i < 2; i++)
        if (threadIdx.x == 0 && r + i < at.count)
            lse[(i64)(at.row + r + i) * heads + head] = largest[i] + logf(total[i]);
}

// What every product of a row with the gradient of a value is lowered by: `do · o - dlse`. One warp a row and head.
extern "C" __global__ void attention_level(Rows o, Rows d_o, const float *dlse, float *level, i64 rows, int heads) {
    const i64 at = (blockIdx.x * (i64)blockDim.x + threadIdx.x) / 32, t = at / heads, head = at % heads;
    if (t >= rows) return;
    float sum = 0;
    for (int w = threadIdx.x & 31; w < W; w += 32) sum += load(o, t, head * W + w) * load(d_o, t, head * W + w);
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if ((threadIdx.x & 31) == 0) level[at] = sum - (dlse ? dlse[at] : 0.0f);
}

extern "C" __global__ void attention_dq(Rows q, Rows k, Rows v, const float *lse, const float *level, Rows d_o, Rows dq,
                                        const Tile *tiles, int heads, int kv_heads, float factor, int causal,
                                        int window) {
    extern __shared__ float shared[];
    float *qs = shared, *gs = qs + B * WP, *ks = gs + B * WP, *vs = ks + B * WP, *ds = vs + B * WP;
    const Tile at = tiles[blockIdx.x];
    const int head = blockIdx.y, of_keys = head / (heads / kv_heads), r = threadIdx.y * 2;
    fetch(qs, q, at.row, at.count, head);
    fetch(gs, d_o, at.row, at.count, head);
    float sum[2][NC] = {}, row_lse[2] = {0, 0}, row_level[2] = {0, 0};
    for (int i = 0; i < 2; i++)
        if (r + i < at.count) {
            row_lse[i] = lse[(i64)(at.row + r + i) * heads + head];
            row_level[i] = level[(i64)(at.row + r + i) * heads + head];
        }
    const int low = causal && window ? max(0, at.position - window + 1) : 0;
    const int high = causal ? min(at.length, at.position + at.count) : at.length;
    for (int key = low; key < high; key += B) {
        const int count = min(B, high - key);
        __syncthreads();
        fetch(ks, k, at.other + key, count, of_keys);
        fetch(vs, v, at.other + key, count, of_keys);
        __syncthreads();
        float s[2][2], dp[2][2];
        dots(qs, ks, s);
        dots(gs, vs, dp);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
                const int c = threadIdx.x + 16 * j;
                const bool seen = r + i < at.count && c < count && sees(at.position + r + i, key + c, causal, window);
                const float p = seen ? expf(s[i][j] * factor - row_lse[i]) : 0.0f;
                ds[(r + i) * (B + 1) + c] = p * (dp[i][j] - row_level[i]);
            }
        __syncthreads();
        mix(sum, ds, ks);
    }
    put(dq, sum, at, head, factor, factor);
}

// A block takes 32 keys of one key head, and goes through the queries of all its query heads.
extern "C" __global__ void attention_dkv(Rows q, Rows k, Rows v, const float *lse, const float *level, Rows d_o, Rows dk,
                                         Rows dv, const Tile *tiles, int heads, int kv_heads, float factor, int causal,
                                         int window) {
    extern __shared__ float shared[];
    float *qs = shared, *gs = qs + B * WP, *ks = gs + B * WP, *vs = ks + B * WP, *ps = vs + B * WP;
    float *ds = ps + B * (B + 1);
    const Tile at = tiles[blockIdx.x];
    const int of_keys = blockIdx.y, group = heads / kv_heads, r = threadIdx.y * 2;
    fetch(ks, k, at.row, at.count, of_keys);
    fetch(vs, v, at.row, at.count, of_keys);
    float by_k[2][NC] = {}, by_v[2][NC] = {};
    const int low = causal ? at.position : 0;
    const int high = causal && window ? min(at.length, at.position + at.count - 1 + window) : at.length;
    for (int head = of_keys * group; head < (of_keys + 1) * group; head++)
        for (int query = low; query < high; query += B) {
            const int count = min(B, high - query);
            __syncthreads();
            fetch(qs, q, at.other + query, count, head);
            fetch(gs, d_o, at.other + query, count, head);
            __syncthreads();
            float s[2][2], dp[2][2];
            dots(ks, qs, s);
            dots(vs, gs, dp);
            for (int j = 0; j < 2; j++) {
                const int c = threadIdx.x + 16 * j;
                const i64 row = (i64)(at.other + query + c) * heads + head;
                const float row_lse = c < count ? lse[row] : 0.0f, row_level = c < count ? level[row] : 0.0f;
                for (int i = 0; i < 2; i++) {
                    const bool seen =
                        r + i < at.count && c < count && sees(query + c, at.position + r + i, causal, window);
                    const float p = seen ? expf(s[i][j] * factor - row_lse) : 0.0f;
                    ps[(r + i) * (B + 1) + c] = p;
                    ds[(r + i) * (B + 1) + c] = p * (dp[i][j] - row_level);
                }
            }
            __syncthreads();
            mix(by_v, ps, gs);
            mix(by_k, ds, qs);
        }
    put(dk, by_k, at, of_keys, factor, factor);
    put(dv, by_v, at, of_keys, 1.0f, 1.0f);
}
