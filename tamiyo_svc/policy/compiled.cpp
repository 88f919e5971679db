// The folded network as one call. `folding.py` says what is computed; this says it in loops that
// read every weight once, in order, and keep everything else in the innermost caches.
//
// Not compiled with -ffast-math: a NaN in a weight or an input must come out as a NaN.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

extern "C" {

// (k, n) weights in panels of `tamiyo_panel()` columns, each contiguous; the last one padded, as is
// the bias. `is_fp16` says what the weights are; k is 0 for a matrix that is not there.
struct Matrix {
  const void *panels;
  const float *bias;
  int32_t k;
  int32_t n;
  int32_t is_fp16;
};

struct AttentionLayer {
  Matrix scores;
  const float *edges;         // (relations, heads, 3)
  const Matrix *projections;  // (types)
};

struct Network {
  int32_t types;
  int32_t relations;
  int32_t features;
  int32_t sage_width;
  int32_t gat_width;
  int32_t heads;
  int32_t hidden_column;
  const int32_t *fan_in;       // (types)
  const int32_t *relation_of;  // (types, relations): the relations into a type, in order
  Matrix encoder;
  const float *scale;  // (types, sage_width)
  const float *shift;
  const Matrix *sage;         // (2, types)
  const AttentionLayer *gat;  // (2)
  Matrix node_heads;
  Matrix hidden_heads;
};

struct Plan {
  const int32_t *counts;   // (types): nodes, which stand in order of type
  const int32_t *order;    // (nodes): row of the features for every node
  const int32_t *starts;   // (slots + 1): edges of every slot; a node has one slot per relation
  const int32_t *sources;  // (edges)
  const int32_t *edges;    // (edges): row of the attributes
  int32_t nodes;
  int32_t graphs;
};

}  // extern "C"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 4;
#endif
constexpr int kPanel = kLanes * kVectors;
// kRows x kVectors sums and the weights they take stay in registers.
constexpr int kRows = 4;
// Rows whose neighbourhoods are gathered before they are projected together.
constexpr int kChunk = 64;
constexpr float kNegativeSlope = 0.2f;
constexpr float kLayerNormEpsilon = 1e-5f;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Vector load(const float *from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Finite float16 values.
inline Vector load(const uint16_t *from) {
#if defined(__AVX512F__)
  // Masked, for GCC 12 warns of its own header otherwise.
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
  return (Vector)_mm512_maskz_cvtph_ps(0xffff, halves);
#elif defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
  // Exponent and fraction at their places in a float32, whose exponent counts from 112 lower.
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words);
  const Words magnitude = (words & 0x7fffu) << 13, sign = (words & 0x8000u) << 16;
  Vector value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  Words bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// After Cephes' expf, relative error below 2e-7 for arguments from -87 to 88, which bound it.
inline float exponential(float x) {
  // Both comparisons are false for a NaN, which so passes through.
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The cast of a NaN gives some integer; p is a NaN then and stays one.
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// x * Phi(x), with erf from Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline float gelu(float x) {
  float z = __builtin_fabsf(x) * 0.70710678118654752f;
  float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  float erf = __builtin_copysignf(1.0f - p * t * exponential(-z * z), x);
  return 0.5f * x * (1.0f + erf);
}

template <int R, typename Weight>
void multiply(const float *x, size_t stride, int k, const Weight *panel, const float *bias,
              float *y, size_t y_stride, int columns) {
  Vector sums[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(bias + v * kLanes);
  for (int i = 0; i < k; ++i, panel += kPanel) {
    Vector weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load(panel + v * kLanes);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[v] * x[r * stride + i];
  }
  for (int r = 0; r < R; ++r) std::memcpy(y + r * y_stride, sums[r], columns * sizeof(float));
}

template <typename Weight>
void apply(const Matrix &matrix, const float *x, int rows, size_t stride, float *y,
           size_t y_stride) {
  const Weight *panel = static_cast<const Weight *>(matrix.panels);
  for (int column = 0; column < matrix.n; column += kPanel) {
    int columns = std::min(kPanel, matrix.n - column);
    const float *bias = matrix.bias + column;
    int row = 0;
    for (; row + kRows <= rows; row += kRows)
      multiply<kRows>(x + row * stride, stride, matrix.k, panel, bias, y + row * y_stride + column,
                      y_stride, columns);
    const float *rest = x + row * stride;
    float *into = y + row * y_stride + column;
    if (rows - row == 3)
      multiply<3>(rest, stride, matrix.k, panel, bias, into, y_stride, columns);
    else if (rows - row == 2)
      multiply<2>(rest, stride, matrix.k, panel, bias, into, y_stride, columns);
    else if (rows - row == 1)
      multiply<1>(rest, stride, matrix.k, panel, bias, into, y_stride, columns);
    panel += static_cast<size_t>(matrix.k) * kPanel;
  }
}

// y = x W + b for (rows, k) x with `stride` floats between rows.
void project(const Matrix &matrix, const float *x, int rows, size_t stride, float *y,
             size_t y_stride) {
  if (matrix.is_fp16)
    apply<uint16_t>(matrix, x, rows, stride, y, y_stride);
  else
    apply<float>(matrix, x, rows, stride, y, y_stride);
}

inline void accumulate(float *sum, const float *row, float share, int width) {
  for (int i = 0; i < width; ++i) sum[i] += share * row[i];
}

struct Scratch {
  std::vector<float> hidden, next, block, table, shares;
};

void encode(const Network &net, const Plan &plan, const float *features, Scratch &scratch) {
  const size_t width = net.sage_width, inputs = net.features;
  float *hidden = scratch.hidden.data();
  scratch.block.resize(plan.nodes * inputs);
  float *rows = scratch.block.data();
  for (int node = 0; node < plan.nodes; ++node)
    std::memcpy(rows + node * inputs, features + plan.order[node] * inputs, inputs * sizeof(float));
  project(net.encoder, rows, plan.nodes, inputs, hidden, width);
  int node = 0;
  for (int type = 0; type < net.types; ++type) {
    const float *scale = net.scale + type * width, *shift = net.shift + type * width;
    for (int end = node + plan.counts[type]; node < end; ++node) {
      float *row = hidden + node * width;
      float mean = 0.0f, variance = 0.0f;
      for (size_t i = 0; i < width; ++i) row[i] = gelu(row[i]);
      for (size_t i = 0; i < width; ++i) mean += row[i];
      mean /= width;
      for (size_t i = 0; i < width; ++i) variance += (row[i] - mean) * (row[i] - mean);
      float inverse = 1.0f / std::sqrt(variance / width + kLayerNormEpsilon);
      for (size_t i = 0; i < width; ++i) row[i] = (row[i] - mean) * inverse * scale[i] + shift[i];
    }
  }
}

// One GraphSAGE layer: the mean of every neighbourhood and the node itself, projected.
void average(const Network &net, const Plan &plan, const Matrix *projections, Scratch &scratch) {
  const size_t width = net.sage_width;
  const float *hidden = scratch.hidden.data();
  int node = 0, slot = 0;
  for (int type = 0; type < net.types; ++type) {
    const Matrix &matrix = projections[type];
    for (int left = plan.counts[type]; left > 0;) {
      const int rows = std::min(left, kChunk);
      scratch.block.assign(static_cast<size_t>(rows) * matrix.k, 0.0f);
      float *into = scratch.block.data();
      for (int row = 0; row < rows; ++row, into += width) {
        for (int place = 0; place < net.fan_in[type]; ++place, ++slot, into += width) {
          const int first = plan.starts[slot], last = plan.starts[slot + 1];
          for (int edge = first; edge < last; ++edge)
            accumulate(into, hidden + plan.sources[edge] * width, 1.0f / (last - first), width);
        }
        std::memcpy(into, hidden + (node + row) * width, width * sizeof(float));
      }
      float *results = scratch.next.data() + node * width;
      const float *before = hidden + node * width;
      project(matrix, scratch.block.data(), rows, matrix.k, results, width);
      for (size_t i = 0; i < rows * width; ++i) results[i] = gelu(results[i]) + before[i];
      node += rows;
      left -= rows;
    }
  }
}

// One slot of a GAT layer: every head's mean of the neighbours, weighted by attention.
void attend_slot(const Network &net, const Plan &plan, const AttentionLayer &layer, size_t width,
                 const float *attributes, int slot, int relation, const float *target, float *into,
                 Scratch &scratch) {
  const int heads = net.heads, first = plan.starts[slot];
  const int degree = plan.starts[slot + 1] - first;
  const size_t stride = layer.scores.n;
  scratch.shares.resize(static_cast<size_t>(degree) * heads);
  float *shares = scratch.shares.data();
  for (int edge = 0; edge < degree; ++edge) {
    const float *source = &scratch.table[plan.sources[first + edge] * stride + relation * heads];
    const float *seen = attributes + static_cast<size_t>(plan.edges[first + edge]) * 3;
    for (int head = 0; head < heads; ++head) {
      const float *vector = layer.edges + (relation * heads + head) * 3;
      const float score = source[head] + target[head] + vector[0] * seen[0] + vector[1] * seen[1] +
                          vector[2] * seen[2];
      shares[edge * heads + head] = score > 0.0f ? score : kNegativeSlope * score;
    }
  }
  for (int head = 0; head < heads; ++head, into += width) {
    float top = shares[head], sum = 0.0f;
    for (int edge = 1; edge < degree; ++edge) top = std::max(top, shares[edge * heads + head]);
    for (int edge = 0; edge < degree; ++edge) {
      float &share = shares[edge * heads + head];
      share = exponential(share - top);
      sum += share;
    }
    for (int edge = 0; edge < degree; ++edge)
      accumulate(into, scratch.hidden.data() + plan.sources[first + edge] * width,
                 shares[edge * heads + head] / sum, width);
  }
}

void attend(const Network &net, const Plan &plan, const AttentionLayer &layer, size_t width,
            const float *attributes, Scratch &scratch) {
  const size_t stride = layer.scores.n, slot_width = net.heads * width;
  const float *hidden = scratch.hidden.data();
  scratch.table.resize(plan.nodes * stride);
  project(layer.scores, hidden, plan.nodes, width, scratch.table.data(), stride);
  int node = 0, slot = 0;
  for (int type = 0; type < net.types; ++type) {
    const Matrix &matrix = layer.projections[type];
    if (matrix.k == 0) {
      node += plan.counts[type];
      slot += plan.counts[type] * net.fan_in[type];
      continue;
    }
    for (int left = plan.counts[type]; left > 0;) {
      const int rows = std::min(left, kChunk);
      scratch.block.assign(static_cast<size_t>(rows) * matrix.k, 0.0f);
      float *into = scratch.block.data();
      for (int row = 0; row < rows; ++row) {
        const float *own = &scratch.table[(node + row) * stride];
        for (int place = 0; place < net.fan_in[type]; ++place, ++slot, into += slot_width) {
          const int relation = net.relation_of[type * net.relations + place];
          if (plan.starts[slot] < plan.starts[slot + 1])
            attend_slot(net, plan, layer, width, attributes, slot, relation,
                        own + (net.relations + relation) * net.heads, into, scratch);
        }
      }
      const size_t out = matrix.n;
      float *results = scratch.next.data() + node * out;
      project(matrix, scratch.block.data(), rows, matrix.k, results, out);
      for (size_t i = 0; i < rows * out; ++i) results[i] = gelu(results[i]);
      if (width == out)
        for (size_t i = 0; i < rows * out; ++i) results[i] += hidden[node * out + i];
      node += rows;
      left -= rows;
    }
  }
}

}  // namespace

extern "C" {

int32_t tamiyo_panel() { return kPanel; }

// Reads one byte of every cache line of a part of the weights, so that they are near when work
// comes.
uint32_t tamiyo_touch(const uint8_t *bytes, uint64_t size) {
  uint32_t sum = 0;
  for (uint64_t place = 0; place < size; place += 64) sum += bytes[place];
  return sum;
}

// Ends this process after it has given `count` spans of memory back, `step` bytes at a time: pairs of
// beginning and end, whole pages. Nothing that lies in them may be needed by this function.
[[noreturn]] void tamiyo_end(const uint64_t *spans, int32_t count, uint64_t step, int32_t code) {
  constexpr int32_t kMost = 1024;
  uint64_t kept[2 * kMost];
  const int32_t most = std::min(count, kMost);
  for (int32_t place = 0; place < 2 * most; ++place) kept[place] = spans[place];
  for (int32_t span = 0; span < most; ++span) {
    const uint64_t end = kept[2 * span + 1];
    for (uint64_t start = kept[2 * span]; start < end; start += step)
      madvise(reinterpret_cast<void *>(start), std::min(step, end - start), MADV_DONTNEED);
  }
  _exit(code);
}

// values: (nodes of the first three types, node_heads.n); deep: (graphs, hidden_heads.n)
void tamiyo_evaluate(const Network *network, const Plan *planned, const float *features,
                     const float *attributes, float *values, float *deep) {
  static thread_local Scratch scratch;
  const Network &net = *network;
  const Plan &plan = *planned;
  const size_t widest = std::max(net.sage_width, net.gat_width);
  scratch.hidden.resize(plan.nodes * widest);
  scratch.next.resize(plan.nodes * widest);
  encode(net, plan, features, scratch);
  for (int layer = 0; layer < 2; ++layer) {
    average(net, plan, net.sage + layer * net.types, scratch);
    scratch.hidden.swap(scratch.next);
  }
  size_t width = net.sage_width;
  for (int layer = 0; layer < 2; ++layer) {
    attend(net, plan, net.gat[layer], width, attributes, scratch);
    scratch.hidden.swap(scratch.next);
    width = net.gat_width;
  }
  const int scored = plan.counts[0] + plan.counts[1] + plan.counts[2];
  const size_t columns = net.node_heads.n, out = net.hidden_heads.n;
  project(net.node_heads, scratch.hidden.data(), scored, width, values, columns);
  scratch.block.resize(net.hidden_heads.k);
  for (int graph = 0; graph < plan.graphs; ++graph) {
    const float *first = values + graph * columns + net.hidden_column;
    for (int i = 0; i < net.hidden_heads.k; ++i) scratch.block[i] = gelu(first[i]);
    float *into = deep + graph * out;
    project(net.hidden_heads, scratch.block.data(), 1, net.hidden_heads.k, into, out);
    for (size_t i = 0; i < out; ++i) into[i] = std::tanh(into[i]);
  }
}

}  // extern "C"
