// What fused.cpp and fused_cuda.cu share: how a vector is cut into chunks, and the launchers' plain interface.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define FEDU_HOST_DEVICE __host__ __device__
#else
#define FEDU_HOST_DEVICE
#endif

namespace fedu {

// Floats of a vector whose squares are summed into one partial sum. The same for any number of clients and on every device: so a
// client's norms are the same bits whichever other clients are aggregated with it.
constexpr int64_t kChunk = 4096;

// A stretch [begin, end) of the vector that lies in one segment, or in none (segment -1). It is worked off in chunks, cut where
// the index into the vector is a multiple of kChunk; `first` counts the chunks of the pieces before it.
struct Piece {
  int64_t begin, end, first, segment;
};

struct Range {
  int64_t begin, end;
};

FEDU_HOST_DEVICE inline int64_t num_chunks(const Piece& piece) {
  return piece.begin == piece.end ? 0 : (piece.end - 1) / kChunk - piece.begin / kChunk + 1;
}

// The floats of one chunk, which is counted from the first piece's first.
FEDU_HOST_DEVICE inline Range chunk_range(const Piece& piece, int64_t chunk) {
  const int64_t begin = (piece.begin / kChunk + chunk - piece.first) * kChunk, end = begin + kChunk;
  return {begin < piece.begin ? piece.begin : begin, end < piece.end ? end : piece.end};
}

// The partition of [0, size) by L segments. It knows nothing of threads, blocks or devices, and each chunk is summed in one
// order: so the results are the same bits on any number of them.
inline std::vector<Piece> partition(const int64_t* segments, int64_t num_segments, int64_t size) {
  std::vector<Piece> pieces;
  int64_t at = 0, first = 0;
  const auto append = [&](int64_t end, int64_t segment) {
    pieces.push_back({at, end, first, segment});
    first += num_chunks(pieces.back());
    at = end;
  };
  for (int64_t l = 0; l < num_segments; ++l) {
    if (at < segments[2 * l]) append(segments[2 * l], -1);
    append(segments[2 * l + 1], l);
  }
  if (at < size) append(size, -1);
  return pieces;
}

inline int64_t total_chunks(const std::vector<Piece>& pieces) {
  return pieces.empty() ? 0 : pieces.back().first + num_chunks(pieces.back());
}

struct StepOptions {
  double momentum, weight_decay, ema_decay;
};

// A training step's arithmetic of one float, rounded as torch's SGD, mul_ and add_ round it: a sum and its product at once.
template <typename T>
struct Step {
  T descent, momentum, weight_decay, keep, take;

  FEDU_HOST_DEVICE Step(double lr, const StepOptions& options)
      : descent(-static_cast<T>(lr)), momentum(static_cast<T>(options.momentum)), weight_decay(static_cast<T>(options.weight_decay)),
        keep(static_cast<T>(options.ema_decay)), take(static_cast<T>(1 - options.ema_decay)) {}

  FEDU_HOST_DEVICE void descend(T& weight, T& gradient) const {
    weight = std::fma(descent, gradient, weight);
    gradient = std::fma(weight_decay, weight, momentum * gradient);
  }

  FEDU_HOST_DEVICE void follow(T& target, T weight) const { target = keep == 0 ? weight : keep * target + take * weight; }
};

// The launchers of fused_cuda.cu. Pointers are to the device's memory, except `pieces`; T is float or double. Each queues its
// kernels on `stream` (a cudaStream_t) in at most `blocks` blocks, never waits for them, and returns a cudaError_t.
namespace cuda {

template <typename T>
int weighted_mean(const T* clients, const T* weights, T* mean, int64_t num_clients, int64_t size, int blocks, void* stream);

// received: one vector, or with received_stride = size one for each client. partials: chunks x 2K doubles of scratch memory.
template <typename T>
int aggregate(const T* clients, const T* weights, const T* received, int64_t received_stride, const std::vector<Piece>& pieces,
              T* mean, double* partials, double* drift, double* spread, int64_t num_clients, int64_t size, int64_t num_segments,
              int blocks, void* stream);

// partials: one double of scratch memory a chunk.
template <typename T>
int layer_norms(const T* a, const T* b, const std::vector<Piece>& pieces, double* partials, double* norms, int blocks, void* stream);

template <typename T>
int ema(T* target, const T* online, double decay, int64_t size, int blocks, void* stream);

// target: the average of the first `covered` weights. lr: on the device, so that a CUDA graph reads what it holds when replayed.
template <typename T>
int sgd_ema(T* weight, T* gradient, T* target, const double* lr, const StepOptions& options, int64_t size, int64_t covered, int blocks,
            void* stream);

int augment(const uint8_t* images, const float* draws, float* views, int64_t num_images, int64_t num_views, int height, int width,
            int blocks, void* stream);

}  // namespace cuda
}  // namespace fedu
