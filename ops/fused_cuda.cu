// The CUDA kernels of the fused ops and their launchers, behind the plain interface of fused.h: no tensor header, so nvcc takes seconds.
//
// Every kernel is bound by memory. Beside each stand the bytes it moves and the least time that takes for the paper's ResNet-18 encoder
// (P = 21,668,928 floats, K = 5) at the bandwidth of an A100 (2.0 TB/s) and an H100 (3.35 TB/s): arithmetic, not a measurement.
//
// Results are the same bits for any number of blocks: a chunk is summed by one block, in one order, into its own place in `partials`,
// and a second small launch adds the chunks up in order. There are no atomics. Under --fmad=false a product and a sum are
// rounded each, as on the CPU: mean and average are the same bits there.
// Norms are summed in double, as 4 double operations a float; that hides behind the memory on data-centre GPUs, while those with few
// double units (GeForce) are bound by it.

#include "augment.h"
#include "fused.h"

#include <cuda_runtime.h>

namespace fedu {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 8;      // clients whose floats and sums a thread holds in registers
constexpr int kPieces = 120;  // of the partition, passed by value: nothing to copy or keep alive, so a CUDA graph can record it

struct Table {
  int count;
  Piece pieces[kPieces];
};
static_assert(sizeof(Table) < 4000, "kernel parameters must stay below 4 KB");

// kWidth floats that are loaded and stored at once, 16 bytes of them where kWidth says so.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];
};

template <typename T>
constexpr int kFull = 16 / sizeof(T);

template <int kWidth, typename T>
__device__ __forceinline__ Pack<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// Adds (x - y)^2 to the sum.
template <typename T, int kWidth>
__device__ __forceinline__ void add_squares(const Pack<T, kWidth>& x, const Pack<T, kWidth>& y, double& sum) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const double d = static_cast<double>(x.v[j]) - static_cast<double>(y.v[j]);
    sum = fma(d, d, sum);
  }
}

// Calls f(Pack width, index) over [begin, end): as packs at multiples of the width where kVector says that they are aligned, and
// one float at a time at both ends. Either way a thread gets the same floats in the same order, so alignment changes no bit.
template <typename T, bool kVector, typename F>
__device__ __forceinline__ void for_packs(Range range, const F& f) {
  constexpr int kWidth = kFull<T>;
  for (int64_t i = range.begin / kWidth * kWidth + threadIdx.x * kWidth; i < range.end; i += kThreads * kWidth) {
    if (kVector && i >= range.begin && i + kWidth <= range.end) {
      f.template operator()<kWidth>(i);
    } else {
      for (int64_t j = i < range.begin ? range.begin : i; j < i + kWidth && j < range.end; ++j) f.template operator()<1>(j);
    }
  }
}

// The block's chunks, one after the other, as f(piece, chunk, range).
template <typename F>
__device__ __forceinline__ void for_chunks(const Table& table, const F& f) {
  const Piece& last = table.pieces[table.count - 1];
  const int64_t end = last.first + num_chunks(last);
  int piece = 0;
  for (int64_t chunk = table.pieces[0].first + blockIdx.x; chunk < end; chunk += gridDim.x) {
    while (piece + 1 < table.count && table.pieces[piece + 1].first <= chunk) ++piece;
    f(table.pieces[piece], chunk, chunk_range(table.pieces[piece], chunk));
  }
}

// The block's sums of kCount values a thread, of which the first `count` are written to out: by warps, then in the order of the warps.
template <int kCount>
__device__ __forceinline__ void reduce_block(double (&values)[kCount], int count, double* out) {
  __shared__ double warp_sums[kWarps][kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (c >= count) break;
    for (int offset = 16; offset > 0; offset /= 2) values[c] += __shfl_down_sync(0xffffffffu, values[c], offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][c] = values[c];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][threadIdx.x];
    out[threadIdx.x] = sum;
  }
  __syncthreads();  // before the next call writes warp_sums
}

// sum_k w_k x_k at one index, in the order of k.
template <int kWidth, typename T>
__device__ __forceinline__ Pack<T, kWidth> mean_of(const T* clients, const T* weights, int64_t num_clients, int64_t size, int64_t i) {
  Pack<T, kWidth> mean;
#pragma unroll 4
  for (int64_t k = 0; k < num_clients; ++k) {
    const Pack<T, kWidth> x = load<kWidth>(clients + k * size + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) mean.v[j] = k == 0 ? weights[0] * x.v[j] : mean.v[j] + weights[k] * x.v[j];
  }
  return mean;
}

// Reads K P, writes P: 520 MB, 0.26 ms on an A100, 0.16 ms on an H100.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    weighted_mean_kernel(const T* __restrict__ clients, const T* __restrict__ weights, T* __restrict__ mean, int64_t num_clients,
                         int64_t size) {
  constexpr int kWidth = kVector ? kFull<T> : 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread * kWidth; i + kWidth <= size; i += step * kWidth) {
    store<kWidth>(mean + i, mean_of<kWidth>(clients, weights, num_clients, size, i));
  }
  for (int64_t i = size / kWidth * kWidth + thread; i < size; i += step) {
    store<1>(mean + i, mean_of<1>(clients, weights, num_clients, size, i));
  }
}

// partials[chunk, k] and [chunk, K + k] = squared drift and spread of client k; the mean on the way.
// K <= 8: reads (K + 1) P, or 2 K P where received is per client, writes P: 607 MB, 0.30 ms on an A100, 0.18 ms on an H100.
// More clients do not fit the registers: their chunk is read again after its mean, from the L2 cache while it holds 16 KB x K a block.
template <typename T, bool kVector, bool kOneTile>
__global__ void __launch_bounds__(kThreads, 1)
    aggregate_kernel(const __grid_constant__ Table table, const T* __restrict__ clients, const T* __restrict__ weights,
                     const T* __restrict__ received, int64_t received_stride, T* mean, double* __restrict__ partials, int num_clients,
                     int64_t size) {
  for_chunks(table, [&](const Piece& piece, int64_t chunk, Range range) {
    const bool measured = piece.segment >= 0;
    if (!kOneTile) {
      for_packs<T, kVector>(range, [&]<int kWidth>(int64_t i) {
        store<kWidth>(mean + i, mean_of<kWidth>(clients, weights, num_clients, size, i));
      });
      if (!measured) return;
    }
    for (int tile = 0; tile < num_clients; tile += kTile) {
      const int count = num_clients - tile < kTile ? num_clients - tile : kTile;
      double drift[kTile] = {}, spread[kTile] = {};
      for_packs<T, kVector>(range, [&]<int kWidth>(int64_t i) {
        Pack<T, kWidth> x[kTile], m, r;
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
          if (k < count) x[k] = load<kWidth>(clients + (tile + k) * size + i);
        }
        if (kOneTile) {
#pragma unroll
          for (int k = 0; k < kTile; ++k) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              if (k < count) m.v[j] = k == 0 ? weights[0] * x[0].v[j] : m.v[j] + weights[k] * x[k].v[j];
            }
          }
          store<kWidth>(mean + i, m);
          if (!measured) return;
        } else {
          m = load<kWidth>(mean + i);  // the same thread stored it
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
          if (k >= count) break;
          if (k == 0 || received_stride) r = load<kWidth>(received + (tile + k) * received_stride + i);
          add_squares(x[k], r, drift[k]);
          add_squares(x[k], m, spread[k]);
        }
      });
      if (!measured) return;
      double* out = partials + chunk * 2 * num_clients + tile;
      reduce_block(drift, count, out);
      reduce_block(spread, count, out + num_clients);
    }
  });
}

// partials[chunk] = squared distance. Reads 2 P: 173 MB, 0.09 ms on an A100, 0.05 ms on an H100.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    layer_norms_kernel(const __grid_constant__ Table table, const T* __restrict__ a, const T* __restrict__ b,
                       double* __restrict__ partials) {
  for_chunks(table, [&](const Piece& piece, int64_t chunk, Range range) {
    if (piece.segment < 0) return;
    double sum[1] = {};
    for_packs<T, kVector>(range, [&]<int kWidth>(int64_t i) { add_squares(load<kWidth>(a + i), load<kWidth>(b + i), sum[0]); });
    reduce_block(sum, 1, partials + chunk);
  });
}

// One block for each column c of the partials and each layer: the root of its chunks' sum. The first half of the columns goes to
// `first`, the second to `second`. Reads one double for 4096 floats and column: microseconds.
__global__ void __launch_bounds__(kThreads, 1)
    finish_kernel(const __grid_constant__ Table table, const double* __restrict__ partials, double* __restrict__ first,
                  double* __restrict__ second, int64_t width, int64_t half, int64_t num_segments) {
  const Piece& piece = table.pieces[blockIdx.y];
  if (piece.segment < 0) return;
  const int64_t column = blockIdx.x, end = piece.first + num_chunks(piece);
  double sum[1] = {};
  for (int64_t chunk = piece.first + threadIdx.x; chunk < end; chunk += kThreads) sum[0] += partials[chunk * width + column];
  __shared__ double total;
  reduce_block(sum, 1, &total);
  if (threadIdx.x == 0) {
    (column < half ? first + column * num_segments : second + (column - half) * num_segments)[piece.segment] = sqrt(total);
  }
}

// The part [head, body) of vectors of `size` values that is aligned to 16 bytes in all of them; empty where none is.
struct Middle {
  int64_t head, body, size;
};

// Calls f(Pack width, index) over the vectors: as packs in their middle, and one value at a time at both ends.
template <typename T, typename F>
__device__ __forceinline__ void for_middle(Middle at, const F& f) {
  constexpr int kWidth = kFull<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = at.head + thread * kWidth; i < at.body; i += step * kWidth) f.template operator()<kWidth>(i);
  for (int64_t s = thread; s < at.head + at.size - at.body; s += step) f.template operator()<1>(s < at.head ? s : at.body + s - at.head);
}

// target <- decay target + (1 - decay) online. Reads 2 P, writes P: 260 MB, 0.13 ms on an A100, 0.08 ms on an H100.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) ema_kernel(T* target, const T* online, T keep, T take, Middle at) {
  for_middle<T>(at, [&]<int kWidth>(int64_t i) {
    Pack<T, kWidth> t = load<kWidth>(target + i);
    const Pack<T, kWidth> o = load<kWidth>(online + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) t.v[j] = keep * t.v[j] + take * o.v[j];
    store<kWidth>(target + i, t);
  });
}

// A step of SGD, the average of the first `covered` weights, and the gradient for the next step to add to.
// Reads 3 P, writes 3 P: 520 MB, 0.26 ms on an A100, 0.16 ms on an H100.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    sgd_ema_kernel(T* weight, T* gradient, T* target, const double* lr, StepOptions options, int64_t covered, Middle at) {
  const Step<T> step(*lr, options);
  for_middle<T>(at, [&]<int kWidth>(int64_t i) {
    Pack<T, kWidth> w = load<kWidth>(weight + i), g = load<kWidth>(gradient + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) step.descend(w.v[j], g.v[j]);
    store<kWidth>(weight + i, w);
    store<kWidth>(gradient + i, g);
    if (i + kWidth <= covered) {
      Pack<T, kWidth> t = load<kWidth>(target + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) step.follow(t.v[j], w.v[j]);
      store<kWidth>(target + i, t);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (i + j < covered) step.follow(target[i + j], w.v[j]);
      }
    }
  });
}

// A block makes one view after the other: a thread its pixels, in two goes, since contrast needs the mean of the operations before it.
// Reads 3 bytes and writes 12 a pixel, and again from the cache in the second go: 14 MB for B = 128 pairs of 32x32, microseconds.
__global__ void __launch_bounds__(kThreads, 1)
    augment_kernel(const uint8_t* __restrict__ images, const float* __restrict__ draws, float* __restrict__ views, int64_t num_images,
                   int64_t num_views, int height, int width) {
  __shared__ double total;
  const int size = height * width;
  for (int64_t n = blockIdx.x; n < num_views; n += gridDim.x) {
    const float* row = draws + n * kColumns;
    const uint8_t* image = images + n % num_images * 3 * size;
    float *r = views + n * 3 * size, *g = r + size, *b = g + size;
    int contrast = 0;
    while (contrast < 3 && operation_at(row, contrast) != kContrast) ++contrast;
    const auto jitter = [&](Pixel p, int begin, int end, float mean) {
      for (int slot = begin; slot < end; ++slot) {
        const Operation operation = operation_at(row, slot);
        const float amount = row[kAmounts + operation];
        if (acts(operation, amount)) p = apply(operation, p, amount, mean);
      }
      return p;
    };
    double sum[1] = {};
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const int x = i % width;
      const Tap rows = tap(i / width, height, row[kTop], row[kHeight]);
      const Tap columns = tap(row[kFlip] != 0 ? width - 1 - x : x, width, row[kLeft], row[kWidth]);
      const auto sample = [&](const uint8_t* plane) {
        const uint8_t *above = plane + rows.first * width, *below = plane + rows.second * width;
        return mix(mix(above[columns.first], below[columns.first], rows.share) * (1.0f / 255),
                   mix(above[columns.second], below[columns.second], rows.share) * (1.0f / 255), columns.share);
      };
      const Pixel p = jitter({sample(image), sample(image + size), sample(image + 2 * size)}, 0, contrast, 0);
      sum[0] += luma(p);
      r[i] = p.r, g[i] = p.g, b[i] = p.b;
    }
    reduce_block(sum, 1, &total);
    for (int i = threadIdx.x; i < size; i += kThreads) {
      Pixel p = jitter({r[i], g[i], b[i]}, contrast, 4, static_cast<float>(total / size));
      if (row[kGrey] != 0) p = blend(p, luma(p), 0);
      r[i] = p.r, g[i] = p.g, b[i] = p.b;
    }
  }
}

// ---- Launchers --------------------------------------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Vectors whose addresses are never multiples of 16 bytes together have no middle.
template <typename T, typename... Others>
Middle middle(int64_t size, const T* first, const Others*... others) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(first) % 16;
  const bool together = ((reinterpret_cast<uintptr_t>(others) % 16 == past) && ...);
  const int64_t head = together ? std::min<int64_t>(size, (16 - past) % 16 / sizeof(T)) : size;
  return {head, head + (size - head) / kFull<T> * kFull<T>, size};
}

// Kernels have all their loads in packs only for float: double is there for checks, and need not be fast.
template <typename T>
constexpr bool kCanVector = sizeof(T) == 4;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Blocks for `work` units of which a block takes `each`: at least one, at most `blocks`.
dim3 grid_for(int64_t work, int64_t each, int blocks) {
  return dim3(static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>((work + each - 1) / each, blocks))));
}

// Calls run(table, chunks) for the partition, kPieces at a time: once for up to 59 layers with gaps between them, 120 without.
template <typename F>
cudaError_t for_tables(const std::vector<Piece>& pieces, const F& run) {
  for (size_t at = 0; at < pieces.size(); at += kPieces) {
    Table table = {};
    table.count = static_cast<int>(std::min<size_t>(kPieces, pieces.size() - at));
    std::copy_n(pieces.begin() + at, table.count, table.pieces);
    const Piece& last = table.pieces[table.count - 1];
    const int64_t chunks = last.first + num_chunks(last) - table.pieces[0].first;
    if (const cudaError_t error = run(table, chunks); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
int weighted_mean(const T* clients, const T* weights, T* mean, int64_t num_clients, int64_t size, int blocks, void* stream) {
  if (size == 0) return cudaSuccess;
  const bool vector = kCanVector<T> && aligned(clients) && aligned(mean) && (num_clients == 1 || size % kFull<T> == 0);
  const auto kernel = vector ? weighted_mean_kernel<T, kCanVector<T>> : weighted_mean_kernel<T, false>;
  return launch(kernel, grid_for(size, kThreads * (vector ? kFull<T> : 1), blocks), stream, clients, weights, mean, num_clients, size);
}

template <typename T>
int aggregate(const T* clients, const T* weights, const T* received, int64_t received_stride, const std::vector<Piece>& pieces,
              T* mean, double* partials, double* drift, double* spread, int64_t num_clients, int64_t size, int64_t num_segments,
              int blocks, void* stream) {
  const bool vector = kCanVector<T> && aligned(clients) && aligned(received) && aligned(mean) &&
                      (num_clients == 1 || size % kFull<T> == 0);
  const auto kernel = num_clients <= kTile ? (vector ? aggregate_kernel<T, kCanVector<T>, true> : aggregate_kernel<T, false, true>)
                                           : (vector ? aggregate_kernel<T, kCanVector<T>, false> : aggregate_kernel<T, false, false>);
  return for_tables(pieces, [&](const Table& table, int64_t chunks) {
    if (chunks > 0) {
      const cudaError_t error = launch(kernel, grid_for(chunks, 1, blocks), stream, table, clients, weights, received, received_stride,
                                       mean, partials, static_cast<int>(num_clients), size);
      if (error != cudaSuccess) return error;
    }
    return launch(finish_kernel, dim3(static_cast<unsigned>(2 * num_clients), table.count), stream, table, partials, drift, spread,
                  2 * num_clients, num_clients, num_segments);
  });
}

template <typename T>
int layer_norms(const T* a, const T* b, const std::vector<Piece>& pieces, double* partials, double* norms, int blocks, void* stream) {
  const auto kernel = kCanVector<T> && aligned(a) && aligned(b) ? layer_norms_kernel<T, kCanVector<T>> : layer_norms_kernel<T, false>;
  return for_tables(pieces, [&](const Table& table, int64_t chunks) {
    if (chunks > 0) {
      const cudaError_t error = launch(kernel, grid_for(chunks, 1, blocks), stream, table, a, b, partials);
      if (error != cudaSuccess) return error;
    }
    const int64_t one = 1, none = 0;
    return launch(finish_kernel, dim3(1, table.count), stream, table, partials, norms, norms, one, one, none);
  });
}

template <typename T>
int ema(T* target, const T* online, double decay, int64_t size, int blocks, void* stream) {
  if (size == 0) return cudaSuccess;
  return launch(ema_kernel<T>, grid_for(size, kThreads * kFull<T>, blocks), stream, target, online, static_cast<T>(decay),
                static_cast<T>(1 - decay), middle(size, target, online));
}

template <typename T>
int sgd_ema(T* weight, T* gradient, T* target, const double* lr, const StepOptions& options, int64_t size, int64_t covered, int blocks,
            void* stream) {
  if (size == 0) return cudaSuccess;
  return launch(sgd_ema_kernel<T>, grid_for(size, kThreads * kFull<T>, blocks), stream, weight, gradient, target, lr, options, covered,
                middle(size, weight, gradient, covered ? target : weight));
}

int augment(const uint8_t* images, const float* draws, float* views, int64_t num_images, int64_t num_views, int height, int width,
            int blocks, void* stream) {
  if (num_views == 0 || height * width == 0) return cudaSuccess;
  return launch(augment_kernel, grid_for(num_views, 1, blocks), stream, images, draws, views, num_images, num_views, height, width);
}

#define FEDU_INSTANTIATE(T)                                                                                                         \
  template int weighted_mean(const T*, const T*, T*, int64_t, int64_t, int, void*);                                                 \
  template int aggregate(const T*, const T*, const T*, int64_t, const std::vector<Piece>&, T*, double*, double*, double*, int64_t, \
                         int64_t, int64_t, int, void*);                                                                             \
  template int layer_norms(const T*, const T*, const std::vector<Piece>&, double*, double*, int, void*);                           \
  template int ema(T*, const T*, double, int64_t, int, void*);                                                                      \
  template int sgd_ema(T*, T*, T*, const double*, const StepOptions&, int64_t, int64_t, int, void*);
FEDU_INSTANTIATE(float)
FEDU_INSTANTIATE(double)

}  // namespace cuda
}  // namespace fedu
