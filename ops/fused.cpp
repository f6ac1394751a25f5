// The fused ops as PyTorch operators: schemas, argument checks and CPU kernels; the CUDA kernels are in fused_cuda.cu.
//
// Every kernel is bound by memory: it reads each float once from DRAM, and what it needs again it finds in the cache. Sums of squares are
// kept in double, except runs of 16 terms, which are summed in float first. The work is cut into chunks by the vector's length only
// (fused.h), and a thread takes whole chunks, so the number of threads changes no bit of a result. Under -ffp-contract=off a product and a
// sum are each rounded, as in the reference and on the GPU.

#include "augment.h"
#include "batch_norm.h"
#include "fused.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <charconv>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef FEDU_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fedu {
namespace {

using at::Tensor;

// ---- Checks: each refusal is one sentence with the value. reference.py has the same ones -------------------------------------

std::string dtype_name(const Tensor& t) { return std::string(c10::getDtypeNames(t.scalar_type()).first); }

// The shortest decimal that reads back as the same number, as Python prints it.
std::string number(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

void check_plain(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides(), " for shape ", t.sizes());
  TORCH_CHECK_VALUE(!t.requires_grad() || !at::GradMode::is_enabled(), name, " must not require grad, pass ", name, ".detach()");
}

void check_type(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name, " must be float32 or float64, got ",
                    dtype_name(t));
}

// Rows of channels: a linear layer's output, or images channels-last.
void check_rows(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE((t.dim() == 2 && t.is_contiguous()) || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)), name,
                    " must be [N, C] and contiguous, or [N, C, H, W] and channels-last, got strides ", t.strides(), " for shape ", t.sizes());
}

// The first vector argument; the others are held against it.
void check_leader(const char* name, const Tensor& t) {
  check_type(name, t);
  check_plain(name, t);
}

void check_like(const char* name, const Tensor& t, const char* leader_name, const Tensor& leader) {
  TORCH_CHECK_VALUE(t.scalar_type() == leader.scalar_type() && t.device() == leader.device(), name, " must be ", dtype_name(leader),
                    " on ", leader.device(), " like ", leader_name, ", got ", dtype_name(t), " on ", t.device());
  check_plain(name, t);
}

void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

// How many bytes after other's begin t begins, where they share memory.
std::optional<int64_t> begins_after(const Tensor& t, const Tensor& other) {
  const int64_t offset = static_cast<const char*>(t.const_data_ptr()) - static_cast<const char*>(other.const_data_ptr());
  const int64_t bytes = t.nbytes(), other_bytes = other.nbytes();
  return bytes && -bytes < offset && offset < other_bytes ? std::optional(offset) : std::nullopt;
}

void check_apart(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const auto offset = begins_after(t, other);
  TORCH_CHECK_VALUE(!offset, name, " must share no memory with ", other_name, ", got one that begins ", *offset, " bytes after it");
}

void check_decay(const char* name, double decay) {
  TORCH_CHECK_VALUE(decay >= 0 && decay <= 1, name, " must lie in [0, 1], got ", number(decay));
}

void check_clients(const Tensor& clients, const Tensor& weights) {
  check_leader("clients", clients);
  TORCH_CHECK_VALUE(clients.dim() == 2 && clients.size(0) > 0, "clients must have shape [K, P] with K >= 1, got ", clients.sizes());
  check_like("weights", weights, "clients", clients);
  check_shape("weights", weights, {clients.size(0)});
}

void check_out(const Tensor& out, const Tensor& clients, const Tensor& weights) {
  check_like("out", out, "clients", clients);
  check_shape("out", out, {clients.size(1)});
  check_apart("out", out, "clients", clients);
  check_apart("out", out, "weights", weights);
}

// Returns the partition of the vector by the checked segments.
std::vector<Piece> check_segments(const Tensor& segments, int64_t size) {
  TORCH_CHECK_VALUE(segments.scalar_type() == at::kLong && segments.dim() == 2 && segments.size(1) == 2,
                    "segments must be int64 of shape [L, 2], got ", dtype_name(segments), " of shape ", segments.sizes());
  const Tensor host = segments.cpu().contiguous();  // free for a CPU tensor; one on a GPU makes the CPU wait for it here
  const int64_t* bounds = host.const_data_ptr<int64_t>();
  int64_t at = 0;
  for (int64_t l = 0; l < host.size(0); ++l) {
    const int64_t begin = bounds[2 * l], end = bounds[2 * l + 1];
    TORCH_CHECK_VALUE(at <= begin && begin <= end && end <= size, "segment ", l, " must lie in [", at, ", ", size,
                      "], after the one before and inside the vector, got [", begin, ", ", end, "]");
    at = end;
  }
  return partition(bounds, host.size(0), size);
}

// ---- CPU kernels ------------------------------------------------------------------------------------------------------------

namespace cpu {

constexpr int64_t kLanes = 16;        // sums kept side by side, one cache line of floats: the compiler maps them to its registers
constexpr int64_t kBlock = 256;       // floats whose squares are added up as floats, 16 a lane
constexpr int64_t kTile = 1024;       // the most floats of each client to work off at once, and to fetch ahead
constexpr int64_t kCached = 1 << 16;  // the most floats of all clients in a tile: the L2 cache holds them, and the next tile beside them
constexpr int64_t kGrain = 1 << 15;   // floats below which a second thread costs more than it saves

struct alignas(64) Lanes {
  double sums[kLanes] = {};
};

// out <- values past the cache where the CPU can: a plain store would first read the line that it overwrites.
template <typename T>
void stream_out(const T* values, T* out, int64_t n) {
#ifdef __AVX__
  if (n % 32 == 0 && reinterpret_cast<uintptr_t>(out) % 32 == 0) {
    for (int64_t i = 0; i < n; i += 32 / sizeof(T)) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)));
    }
    return;
  }
#endif
  std::memcpy(out, values, n * sizeof(T));
}

// Fetches the cache line of floats at `from` into the L2 cache. That is what keeps the memory busy: the CPU itself looks ahead in a few
// streams at once, and not over the end of a page. The L1 cache has no room.
template <typename T>
void fetch_line(const T* from) {
  for (int64_t j = 0; j < kLanes; j += 64 / sizeof(T)) __builtin_prefetch(from + j, 0, 2);
}

// mean <- sum_k w_k x_k of n floats in the order of k, for kCount clients; added to what mean is, unless kFirst. Fetches what lies
// `ahead` floats further, unless that is 0.
template <int kCount, bool kFirst, typename T>
void mean_of(const T* clients, const T* weights, T* mean, int64_t stride, int64_t n, int64_t ahead) {
  const auto add = [&](int64_t i) {
    T sum = kFirst ? weights[0] * clients[i] : mean[i] + weights[0] * clients[i];
    for (int k = 1; k < kCount; ++k) sum += weights[k] * clients[k * stride + i];
    mean[i] = sum;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kCount && ahead; ++k) fetch_line(clients + k * stride + i + ahead);
    for (int64_t j = i; j < i + kLanes; ++j) add(j);
  }
  for (; i < n; ++i) add(i);
}

// The same for all clients, eight at a time while there are as many: to read eight streams at once.
template <typename T>
void mean_tile(const T* clients, const T* weights, T* mean, int64_t num_clients, int64_t stride, int64_t n, int64_t ahead) {
  mean_of<1, true>(clients, weights, mean, stride, n, ahead);
  int64_t k = 1;
  for (; k + 8 <= num_clients; k += 8) mean_of<8, false>(clients + k * stride, weights + k, mean, stride, n, ahead);
  for (; k + 4 <= num_clients; k += 4) mean_of<4, false>(clients + k * stride, weights + k, mean, stride, n, ahead);
  for (; k < num_clients; ++k) mean_of<1, false>(clients + k * stride, weights + k, mean, stride, n, ahead);
}

// Adds the squares of x - a, and of x - b if kTwo, of kLanes * steps floats to the lanes of from_a and from_b. They are added up as
// Sum, and only the result as double: conversions to double would bound the loop. Fetches what lies `ahead` floats further. Not inlined:
// g++ would pick the lanes apart into scalars.
template <typename Sum, bool kTwo, typename T>
[[gnu::noinline]] void add_steps(const T* x, const T* a, const T* b, int64_t steps, int64_t ahead, Lanes& from_a, Lanes& from_b) {
  Sum sum_a[kLanes] = {}, sum_b[kLanes] = {};
  for (int64_t step = 0; step < steps; ++step, x += kLanes, a += kLanes, b += kLanes) {
    fetch_line(x + ahead);
    fetch_line(a + ahead);
    for (int64_t j = 0; j < kLanes; ++j) {
      const Sum d = Sum(x[j]) - Sum(a[j]);
      sum_a[j] = std::fma(d, d, sum_a[j]);
      if constexpr (kTwo) {
        const Sum s = Sum(x[j]) - Sum(b[j]);
        sum_b[j] = std::fma(s, s, sum_b[j]);
      }
    }
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    from_a.sums[j] += sum_a[j];
    if constexpr (kTwo) from_b.sums[j] += sum_b[j];
  }
}

// The same of n <= kBlock floats.
template <typename Sum, bool kTwo, typename T>
void add_block(const T* x, const T* a, const T* b, int64_t n, int64_t ahead, Lanes& from_a, Lanes& from_b) {
  const int64_t whole = n / kLanes * kLanes;
  add_steps<Sum, kTwo>(x, a, b, n / kLanes, ahead, from_a, from_b);
  if (whole == n) return;
  T rest[3][kLanes] = {};  // the last few, with zeros behind them
  std::copy(x + whole, x + n, rest[0]);
  std::copy(a + whole, a + n, rest[1]);
  if (kTwo) std::copy(b + whole, b + n, rest[2]);
  add_steps<Sum, kTwo>(rest[0], rest[1], rest[2], 1, 0, from_a, from_b);
}

// The same of any number of floats. Blocks begin at multiples of kBlock from the chunk's begin, so tiles of them change no bit.
template <typename Sum, bool kTwo, typename T>
void add_squares(const T* x, const T* a, const T* b, int64_t n, int64_t ahead, Lanes& from_a, Lanes& from_b) {
  for (int64_t i = 0; i < n; i += kBlock) {
    add_block<Sum, kTwo>(x + i, a + i, b + i, std::min(kBlock, n - i), ahead, from_a, from_b);
  }
}

// The squared distance of x from a over a chunk.
template <typename Sum, typename T>
Lanes squares(const T* x, const T* a, int64_t n) {
  Lanes lanes, unused;
  add_squares<Sum, false>(x, a, a, n, kTile, lanes, unused);
  return lanes;
}

// The sum of the lanes. Differences, squares and sums of 16 of them were rounded to T: at most 6e-7 of a norm, and in practice 1e-8.
// Where a square may have left the range of a float, the chunk x, a is done again in double.
template <typename T>
double total(const Lanes& lanes, const T* x, const T* a, int64_t n) {
  const auto sum = [](const Lanes& l) { return std::accumulate(l.sums, l.sums + kLanes, 0.0); };
  const double fast = sum(lanes);
  return fast > 1e-26 && fast < 1e38 ? fast : sum(squares<double>(x, a, n));
}

// Calls work(piece, chunk, range) for each chunk. A thread takes neighbouring chunks, of as much cost as any other's: a chunk that is
// measured costs 2, one outside every layer gap_cost.
template <typename Work>
void for_each_chunk(const std::vector<Piece>& pieces, int64_t num_clients, int64_t gap_cost, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, 2 * kGrain / (kChunk * num_clients));
  const auto cost_of = [&](const Piece& piece) { return piece.segment < 0 ? gap_cost : 2; };
  int64_t total = 0;
  for (const Piece& piece : pieces) total += num_chunks(piece) * cost_of(piece);
  at::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    int64_t before = 0;  // cost of the pieces before
    for (const Piece& piece : pieces) {
      const int64_t each = cost_of(piece), chunks = num_chunks(piece);
      if (each == 0) continue;
      const auto chunk_at = [&](int64_t cost) { return std::clamp<int64_t>((cost - before + each - 1) / each, 0, chunks); };
      for (int64_t c = chunk_at(begin); c < chunk_at(end); ++c) work(piece, piece.first + c, chunk_range(piece, piece.first + c));
      before += chunks * each;
    }
  });
}

// norms[c, l] = the root of the sum over the layer's chunks of partials[chunk, c], where `norms` names each c's row [L].
void finish(const std::vector<Piece>& pieces, const double* partials, int64_t width, const std::vector<double*>& norms) {
  std::vector<double> sums(width);
  for (const Piece& piece : pieces) {
    if (piece.segment < 0) continue;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t chunk = piece.first; chunk < piece.first + num_chunks(piece); ++chunk) {
      for (int64_t c = 0; c < width; ++c) sums[c] += partials[chunk * width + c];
    }
    for (int64_t c = 0; c < width; ++c) norms[c][piece.segment] = std::sqrt(sums[c]);
  }
}

template <typename T>
void aggregate(const T* clients, const T* weights, const T* received, int64_t received_stride, const std::vector<Piece>& pieces,
               T* mean, double* partials, double* drift, double* spread, int64_t num_clients, int64_t size, int64_t num_segments) {
  // Few clients' tiles lie in the L1 cache, and short ones are best. Many clients' tiles need the L2 cache, and the longer the better.
  const int64_t ahead = std::clamp(kCached / num_clients / kBlock * kBlock, kBlock, kTile), tile = num_clients > 16 ? ahead : kBlock;
  for_each_chunk(pieces, num_clients, 1, [&](const Piece& piece, int64_t chunk, Range range) {
    const int64_t measured = piece.segment < 0 ? 0 : num_clients;
    std::vector<Lanes> drifts(measured), spreads(measured);
    for (int64_t i = range.begin; i < range.end; i += tile) {
      T values[kTile];
      const int64_t n = std::min(tile, range.end - i);
      mean_tile(clients + i, weights, values, num_clients, size, n, measured ? 0 : tile);
      stream_out(values, mean + i, n);
      for (int64_t k = 0; k < measured; ++k) {
        add_squares<T, true>(clients + k * size + i, received + k * received_stride + i, values, n, ahead, drifts[k], spreads[k]);
      }
    }
    if (measured == 0) return;
    double* out = partials + chunk * 2 * num_clients;
    const int64_t n = range.end - range.begin;
    for (int64_t k = 0; k < num_clients; ++k) {
      const T* x = clients + k * size + range.begin;
      out[k] = total(drifts[k], x, received + k * received_stride + range.begin, n);
      out[num_clients + k] = total(spreads[k], x, mean + range.begin, n);
    }
  });
  std::vector<double*> rows;
  for (double* norms : {drift, spread}) {
    for (int64_t k = 0; k < num_clients; ++k) rows.push_back(norms + k * num_segments);
  }
  finish(pieces, partials, 2 * num_clients, rows);
}

template <typename T>
void weighted_mean(const T* clients, const T* weights, T* mean, int64_t num_clients, int64_t size) {
  aggregate(clients, weights, clients, 0, partition(nullptr, 0, size), mean, nullptr, nullptr, nullptr, num_clients, size, 0);
}

template <typename T>
void layer_norms(const T* a, const T* b, const std::vector<Piece>& pieces, double* partials, double* norms) {
  for_each_chunk(pieces, 1, 0, [&](const Piece&, int64_t chunk, Range range) {
    const T *x = a + range.begin, *y = b + range.begin;
    const int64_t n = range.end - range.begin;
    partials[chunk] = total(squares<T>(x, y, n), x, y, n);
  });
  finish(pieces, partials, 1, {norms});
}

template <typename T>
void ema(T* target, const T* online, double decay, int64_t size) {
  const T keep = T(decay), take = T(1 - decay);
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = keep * target[i] + take * online[i];
  });
}

template <typename T>
void sgd_ema(T* weight, T* gradient, T* target, const double* lr, const StepOptions& options, int64_t size, int64_t covered) {
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    const Step<T> step(*lr, options);  // each thread's own, which no store to a vector can be thought to change
    const int64_t both = std::clamp(covered, begin, end);
    for (int64_t i = begin; i < both; ++i) {
      step.descend(weight[i], gradient[i]);
      step.follow(target[i], weight[i]);
    }
    for (int64_t i = both; i < end; ++i) step.descend(weight[i], gradient[i]);
  });
}

// One view for each row of draws.
void augment(const uint8_t* images, const float* draws, float* views, int64_t num_images, int64_t num_views, int height, int width) {
  const int64_t size = 3 * static_cast<int64_t>(height) * width;
  if (size == 0) return;
  at::parallel_for(0, num_views, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    std::vector<float> line(width);
    std::vector<Tap> taps(width);
    for (int64_t n = begin; n < end; ++n) {
      augment_view(images + n % num_images * size, draws + n * kColumns, views + n * size, height, width, line.data(), taps.data());
    }
  });
}

}  // namespace cpu

// ---- Operators: check, allocate, and hand plain pointers to the kernels of the device -----------------------------------------

#ifdef FEDU_CUDA
// Enough blocks to fill the GPU; the kernels stride over what is left, and no result depends on the number.
struct Launch {
  c10::cuda::CUDAGuard guard;
  void* stream;
  int blocks = 0;
  explicit Launch(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, t.get_device()));
    blocks *= 8;
  }
};
#define FEDU_ON_CUDA(t, call)                                             \
  if ((t).is_cuda()) {                                                    \
    const Launch on(t);                                                   \
    C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::call));                 \
  } else
#else
#define FEDU_ON_CUDA(t, call)
#endif

// Calls f with a T of the tensor's type, float or double.
template <typename F>
void for_type(const Tensor& t, const F& f) {
  if (t.scalar_type() == at::kFloat) {
    f(float());
  } else {
    f(double());
  }
}

// Where the mean's memory is fresh from the system, its page faults would cost more than the kernel that fills it, so huge pages are
// asked for, of which there are 512 times fewer (a hint: where the system has none to give, nothing else changes).
void want_huge_pages([[maybe_unused]] const Tensor& out) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.const_data_ptr()), end = begin + out.nbytes();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (out.is_cpu() && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void weighted_mean(const Tensor& clients, const Tensor& weights, Tensor out) {
  check_clients(clients, weights);
  check_out(out, clients, weights);
  const int64_t K = clients.size(0), P = clients.size(1);
  want_huge_pages(out);
  for_type(clients, [&]<typename T>(T) {
    const T *x = clients.const_data_ptr<T>(), *w = weights.const_data_ptr<T>();
    T* mean = out.mutable_data_ptr<T>();
    FEDU_ON_CUDA(clients, weighted_mean(x, w, mean, K, P, on.blocks, on.stream))
    cpu::weighted_mean(x, w, mean, K, P);
  });
}

// Writes the mean to out; returns drift and spread.
std::tuple<Tensor, Tensor> aggregate(const Tensor& clients, const Tensor& weights, const Tensor& received, const Tensor& segments,
                                     Tensor out) {
  check_clients(clients, weights);
  const int64_t K = clients.size(0), P = clients.size(1);
  check_like("received", received, "clients", clients);
  TORCH_CHECK_VALUE(received.sizes() == clients.sizes() || received.sizes() == at::IntArrayRef{P}, "received must have shape [", P,
                    "] or ", clients.sizes(), ", got ", received.sizes());
  const std::vector<Piece> pieces = check_segments(segments, P);
  check_out(out, clients, weights);
  check_apart("out", out, "received", received);
  const auto doubles = clients.options().dtype(at::kDouble);
  const int64_t L = segments.size(0), received_stride = received.dim() == 2 ? P : 0;
  Tensor drift = clients.new_empty({K, L}, doubles), spread = clients.new_empty({K, L}, doubles);
  Tensor partials = clients.new_empty({total_chunks(pieces) * 2 * K}, doubles);
  double *sums = partials.mutable_data_ptr<double>(), *d = drift.mutable_data_ptr<double>(), *s = spread.mutable_data_ptr<double>();
  want_huge_pages(out);
  for_type(clients, [&]<typename T>(T) {
    const T *x = clients.const_data_ptr<T>(), *w = weights.const_data_ptr<T>(), *r = received.const_data_ptr<T>();
    T* mean = out.mutable_data_ptr<T>();
    FEDU_ON_CUDA(clients, aggregate(x, w, r, received_stride, pieces, mean, sums, d, s, K, P, L, on.blocks, on.stream))
    cpu::aggregate(x, w, r, received_stride, pieces, mean, sums, d, s, K, P, L);
  });
  return {drift, spread};
}

Tensor layer_norms(const Tensor& a, const Tensor& b, const Tensor& segments) {
  check_leader("a", a);
  TORCH_CHECK_VALUE(a.dim() == 1, "a must have shape [P], got ", a.sizes());
  check_like("b", b, "a", a);
  check_shape("b", b, a.sizes());
  const std::vector<Piece> pieces = check_segments(segments, a.size(0));
  const auto doubles = a.options().dtype(at::kDouble);
  Tensor norms = a.new_empty({segments.size(0)}, doubles), partials = a.new_empty({total_chunks(pieces)}, doubles);
  double *sums = partials.mutable_data_ptr<double>(), *out = norms.mutable_data_ptr<double>();
  for_type(a, [&]<typename T>(T) {
    const T *x = a.const_data_ptr<T>(), *y = b.const_data_ptr<T>();
    FEDU_ON_CUDA(a, layer_norms(x, y, pieces, sums, out, on.blocks, on.stream))
    cpu::layer_norms(x, y, pieces, sums, out);
  });
  return norms;
}

void ema_(Tensor target, const Tensor& online, double decay) {
  check_leader("target", target);
  TORCH_CHECK_VALUE(target.dim() == 1 || target.dim() == 2, "target must have shape [P] or [K, P], got ", target.sizes());
  check_like("online", online, "target", target);
  check_shape("online", online, target.sizes());
  check_decay("decay", decay);
  const int64_t offset = begins_after(online, target).value_or(0);
  TORCH_CHECK_VALUE(offset == 0, "online must be target's own memory or share none with it, got one that begins ", offset,
                    " bytes after it");
  if (decay == 1) return;  // exact even where a NaN or an Inf times 0 would be NaN
  if (decay == 0) {
    target.copy_(online);
    return;
  }
  for_type(target, [&]<typename T>(T) {
    T* t = target.mutable_data_ptr<T>();
    const T* o = online.const_data_ptr<T>();
    FEDU_ON_CUDA(target, ema(t, o, decay, target.numel(), on.blocks, on.stream))
    cpu::ema(t, o, decay, target.numel());
  });
}

void sgd_ema_(Tensor weight, Tensor gradient, std::optional<Tensor> target, const Tensor& lr, double momentum, double weight_decay,
              double ema_decay) {
  check_leader("weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 1, "weight must have shape [P], got ", weight.sizes());
  check_like("gradient", gradient, "weight", weight);
  check_shape("gradient", gradient, weight.sizes());
  check_apart("gradient", gradient, "weight", weight);
  const int64_t P = weight.size(0);
  if (target) {
    check_like("target", *target, "weight", weight);
    TORCH_CHECK_VALUE(target->dim() == 1 && target->size(0) <= P, "target must have shape [T] with T <= ", P, ", got ", target->sizes());
    check_apart("target", *target, "weight", weight);
    check_apart("target", *target, "gradient", gradient);
  }
  TORCH_CHECK_VALUE(lr.scalar_type() == at::kDouble && lr.dim() == 0 && lr.device() == weight.device(), "lr must be a float64 scalar on ",
                    weight.device(), " like weight, got ", dtype_name(lr), " of shape ", lr.sizes(), " on ", lr.device());
  check_decay("ema_decay", ema_decay);
  const int64_t covered = target && ema_decay < 1 ? target->size(0) : 0;  // a decay of 1 is exact even where an Inf times 0 would be NaN
  const StepOptions options = {momentum, weight_decay, ema_decay};
  const double* rate = lr.const_data_ptr<double>();
  for_type(weight, [&]<typename T>(T) {
    T *w = weight.mutable_data_ptr<T>(), *g = gradient.mutable_data_ptr<T>(), *t = covered ? target->mutable_data_ptr<T>() : nullptr;
    FEDU_ON_CUDA(weight, sgd_ema(w, g, t, rate, options, P, covered, on.blocks, on.stream))
    cpu::sgd_ema(w, g, t, rate, options, P, covered);
  });
}

Tensor augment(const Tensor& images, const Tensor& draws) {
  TORCH_CHECK_VALUE(images.scalar_type() == at::kByte && images.dim() == 4 && images.size(1) == 3,
                    "images must be uint8 of shape [B, 3, H, W], got ", dtype_name(images), " of shape ", images.sizes());
  check_plain("images", images);
  TORCH_CHECK_VALUE(draws.scalar_type() == at::kFloat && draws.device() == images.device(), "draws must be float32 on ",
                    images.device(), " like images, got ", dtype_name(draws), " on ", draws.device());
  check_plain("draws", draws);
  const int64_t B = images.size(0), H = images.size(2), W = images.size(3);
  TORCH_CHECK_VALUE(draws.dim() == 2 && draws.size(1) == kColumns && (B ? draws.size(0) % B : draws.size(0)) == 0,
                    "draws must have shape [N, 14] with N a multiple of ", B, " images, got ", draws.sizes());
  TORCH_CHECK_VALUE(H * W <= 1 << 28, "images must have at most 2^28 pixels, got ", H, " x ", W);
  const int64_t N = draws.size(0);
  Tensor views = draws.new_empty({N, 3, H, W});
  const uint8_t* x = images.const_data_ptr<uint8_t>();
  const float* rows = draws.const_data_ptr<float>();
  float* out = views.mutable_data_ptr<float>();
  const int height = static_cast<int>(H), width = static_cast<int>(W);
  FEDU_ON_CUDA(images, augment(x, rows, out, B, N, height, width, on.blocks, on.stream))
  cpu::augment(x, rows, out, B, N, height, width);
  return views;
}

// What an optional vector holds, or null.
template <typename T>
T* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// The shape of views in x; checks what the kernels rely on.
norm::Views views_of(const Tensor& x, int64_t views, std::initializer_list<const std::optional<Tensor>*> vectors) {
  check_type("x", x);
  check_rows("x", x);
  const int64_t channels = x.size(1), rows = x.numel() / std::max<int64_t>(1, channels);
  TORCH_CHECK_VALUE(views > 0 && x.size(0) % views == 0 && rows > views, "x must hold ", views,
                    " views of one size, with more than one value for each channel, got shape ", x.sizes());
  for (const std::optional<Tensor>* t : vectors) {
    if (!*t) continue;
    check_like("weight, bias and running statistics", **t, "x", x);
    check_shape("weight, bias and running statistics", **t, {channels});
  }
  return {views, rows / views, channels};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                              std::optional<Tensor> running_mean, std::optional<Tensor> running_var, int64_t views,
                                              double momentum, double eps, bool relu) {
  const norm::Views v = views_of(x, views, {&weight, &bias, &running_mean, &running_var});
  Tensor y = at::empty_like(x), mean = x.new_empty({views, v.channels}), inverse = x.new_empty({views, v.channels});
  for_type(x, [&]<typename T>(T) {
    norm::forward(x.const_data_ptr<T>(), data_of<T>(weight), data_of<T>(bias), data_of<T>(running_mean), data_of<T>(running_var),
                    y.mutable_data_ptr<T>(), mean.mutable_data_ptr<T>(), inverse.mutable_data_ptr<T>(), v, momentum, eps, relu);
  });
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& gradient, const Tensor& x, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& inverse,
                                                       int64_t views, bool relu) {
  const norm::Views v = views_of(x, views, {&weight, &bias});
  check_rows("gradient", gradient);
  check_shape("gradient", gradient, x.sizes());
  check_shape("mean", mean, {views, v.channels});
  check_shape("inverse", inverse, {views, v.channels});
  Tensor of_x = at::empty_like(x), of_weight = x.new_empty({v.channels}), of_bias = x.new_empty({v.channels});
  for_type(x, [&]<typename T>(T) {
    norm::backward(gradient.const_data_ptr<T>(), x.const_data_ptr<T>(), data_of<T>(weight), data_of<T>(bias),
                             mean.const_data_ptr<T>(), inverse.const_data_ptr<T>(), of_x.mutable_data_ptr<T>(),
                             of_weight.mutable_data_ptr<T>(), of_bias.mutable_data_ptr<T>(), v, relu);
  });
  return {of_x, of_weight, of_bias};
}

TORCH_LIBRARY(fedu, m) {
  m.def("weighted_mean(Tensor clients, Tensor weights, Tensor(a!) out) -> ()");
  m.def("aggregate(Tensor clients, Tensor weights, Tensor received, Tensor segments, Tensor(a!) out) -> (Tensor, Tensor)");
  m.def("layer_norms(Tensor a, Tensor b, Tensor segments) -> Tensor");
  m.def("ema_(Tensor(a!) target, Tensor online, float decay) -> ()");
  m.def("sgd_ema_(Tensor(a!) weight, Tensor(b!) gradient, Tensor(c!)? target, Tensor lr, float momentum, float weight_decay, "
        "float ema_decay) -> ()");
  m.def("augment(Tensor images, Tensor draws) -> Tensor");
  m.def("batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, int views, float momentum, "
        "float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor inverse, int views, bool relu) "
        "-> (Tensor, Tensor, Tensor)");
}

void implement(torch::Library& m) {
  m.impl("weighted_mean", weighted_mean);
  m.impl("aggregate", aggregate);
  m.impl("layer_norms", layer_norms);
  m.impl("ema_", ema_);
  m.impl("sgd_ema_", sgd_ema_);
  m.impl("augment", augment);
}
TORCH_LIBRARY_IMPL(fedu, CPU, m) {
  implement(m);
  m.impl("batch_norm", batch_norm);
  m.impl("batch_norm_backward", batch_norm_backward);
}
#ifdef FEDU_CUDA
TORCH_LIBRARY_IMPL(fedu, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace fedu
