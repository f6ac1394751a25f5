// Runs every kernel of fused_cuda.cu, compiled by g++ as C++ and linked to this, and holds the results against plain loops in double.
// Exits with 1 and one line at the first difference; with AddressSanitizer and UBSan in both, it also stops at a read or write outside
// a buffer or at a misaligned pack.
//
//   check [quick | far]    quick: fewer combinations, enough to catch the faults that test_cuda.py plants; far: layers beyond 2^31 only

#include "augment.h"
#include "cuda_runtime.h"
#include "fused.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <limits>

namespace {

using fedu::Piece;
using Segments = std::vector<int64_t>;  // begin and end of each, one after the other

std::string where;  // the case at work, for the message
long comparisons = 0;

[[noreturn]] void differ(const char* what, int64_t index, double got, double want) {
  std::printf("%s: %s[%lld] is %.17g, not %.17g\n", where.c_str(), what, static_cast<long long>(index), got, want);
  std::exit(1);
}

void expect_success(int error) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", where.c_str(), cuda_on_cpu::last_fault.c_str());
  std::exit(1);
}

void expect_launches(long before, long want) {
  if (cuda_on_cpu::launches - before != want) differ("launches", 0, cuda_on_cpu::launches - before, want);
}

// A buffer of exactly n values, `offset` values past an address aligned to 16 bytes: nothing behind it that may be read or written.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t n, int offset, T value = T())
      : memory_(static_cast<T*>(std::malloc((n + offset) * sizeof(T)))), offset_(offset), size_(n) {
    std::fill_n(data(), n, value);
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  T* data() { return memory_ + offset_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }
  void randomize(std::mt19937& random) {
    for (int64_t i = 0; i < size_; ++i) data()[i] = static_cast<T>(static_cast<int>(random() % 2000001) - 1000000) / T(1000003);
  }

 private:
  T* memory_;
  int offset_;
  int64_t size_;
};

template <typename T>
void expect_bits(const char* what, Buffer<T>& got, const std::vector<T>& want) {
  for (int64_t i = 0; i < got.size(); ++i, ++comparisons) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) differ(what, i, got[i], want[i]);
  }
}

void expect_close(const char* what, Buffer<double>& got, const std::vector<double>& want) {
  for (int64_t i = 0; i < got.size(); ++i, ++comparisons) {
    if (!(std::abs(got[i] - want[i]) <= 1e-12 * want[i])) differ(what, i, got[i], want[i]);
  }
}

// Remembers the first result of a case, and wants the same bits from each later grid, order and alignment.
template <typename T>
void expect_same(const char* what, Buffer<T>& got, std::vector<T>& first) {
  if (first.empty()) first.assign(got.data(), got.data() + got.size());
  expect_bits(what, got, first);
}

double norm(const double* differences, int64_t begin, int64_t end) {
  long double sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += static_cast<long double>(differences[i]) * differences[i];
  return std::sqrt(static_cast<double>(sum));
}

// Segments of a vector: all of it; none; with gaps, an empty one, one of a single float, unaligned; more than fit one launch.
std::vector<Segments> layouts(int64_t size, int64_t num_clients) {
  std::vector<Segments> all = {{0, size}, {}};
  if (size >= 31) all.push_back({1, size / 3, size / 3, size / 3, size / 3 + 1, size / 3 + 2, size / 2 + 1, size - 3});
  if (size == 4099 && num_clients <= 2) {
    Segments many;
    for (int64_t l = 0; l < 70; ++l) many.insert(many.end(), {l * size / 70 + 1, l * size / 70 + 1 + l % 9});
    many.insert(many.end(), {size - 2, size});
    all.push_back(many);
  }
  return all;
}

struct Run {
  int blocks;
  cuda_on_cpu::Order order;
  int offset;  // of each buffer from an aligned address, in values
};

void name_case(const char* op, int64_t P, int64_t L, const Run& run, const std::string& more = "") {
  where = std::string(op) + " P=" + std::to_string(P) + " L=" + std::to_string(L) + " blocks=" + std::to_string(run.blocks) +
          " order=" + std::to_string(run.order) + " offset=" + std::to_string(run.offset) + " " + more;
}

template <typename T>
void check_aggregate(int64_t K, int64_t P, bool per_client, const std::vector<Run>& runs, std::mt19937& random) {
  for (const Segments& segments : layouts(P, K)) {
    const int64_t L = segments.size() / 2;
    const std::vector<Piece> pieces = fedu::partition(segments.data(), L, P);
    const int64_t chunks = fedu::total_chunks(pieces);
    std::vector<T> first_mean, want_mean(P);
    std::vector<double> first_drift, first_spread, want_drift(K * L), want_spread(K * L);
    const unsigned data_seed = random();
    for (const Run& run : runs) {
      name_case("aggregate", P, L, run, "K=" + std::to_string(K) + (per_client ? " received per client" : ""));
      std::mt19937 data(data_seed);
      const double nan = std::numeric_limits<double>::quiet_NaN();
      Buffer<T> clients(K * P, run.offset), weights(K, 0), received(per_client ? K * P : P, run.offset), mean(P, run.offset, T(nan));
      Buffer<double> partials(chunks * 2 * K, 0, nan), drift(K * L, 0, nan), spread(K * L, 0, nan);
      clients.randomize(data), weights.randomize(data), received.randomize(data);
      if (first_mean.empty() && first_drift.empty()) {
        for (int64_t i = 0; i < P; ++i) {
          for (int64_t k = 0; k < K; ++k) {
            want_mean[i] = k == 0 ? weights[0] * clients[i] : want_mean[i] + weights[k] * clients[k * P + i];
          }
        }
        std::vector<double> from_received(P), from_mean(P);
        for (int64_t k = 0; k < K; ++k) {
          for (int64_t i = 0; i < P; ++i) {
            from_received[i] = static_cast<double>(clients[k * P + i]) - received[per_client ? k * P + i : i];
            from_mean[i] = static_cast<double>(clients[k * P + i]) - want_mean[i];
          }
          for (int64_t l = 0; l < L; ++l) {
            want_drift[k * L + l] = norm(from_received.data(), segments[2 * l], segments[2 * l + 1]);
            want_spread[k * L + l] = norm(from_mean.data(), segments[2 * l], segments[2 * l + 1]);
          }
        }
      }
      cuda_on_cpu::order = run.order;
      const long before = cuda_on_cpu::launches;
      expect_success(fedu::cuda::aggregate(clients.data(), weights.data(), received.data(), per_client ? P : 0, pieces, mean.data(),
                                           partials.data(), drift.data(), spread.data(), K, P, L, run.blocks, nullptr));
      if (P > 0) expect_launches(before, pieces.size() <= 120 ? 2 : 4);  // one launch for all clients and layers, and one to finish
      expect_bits("mean", mean, want_mean);
      expect_close("drift", drift, want_drift), expect_close("spread", spread, want_spread);
      expect_same("first mean", mean, first_mean);
      expect_same("first drift", drift, first_drift), expect_same("first spread", spread, first_spread);
      if (segments.empty()) {
        Buffer<T> alone(P, run.offset, T(nan));
        where.replace(0, 9, "weighted_mean");
        expect_success(fedu::cuda::weighted_mean(clients.data(), weights.data(), alone.data(), K, P, run.blocks, nullptr));
        expect_bits("mean", alone, want_mean);
      }
    }
  }
}

template <typename T>
void check_layer_norms(int64_t P, const std::vector<Run>& runs, std::mt19937& random) {
  for (const Segments& segments : layouts(P, 1)) {
    const int64_t L = segments.size() / 2;
    const std::vector<Piece> pieces = fedu::partition(segments.data(), L, P);
    const unsigned data_seed = random();
    std::vector<double> first;
    for (const Run& run : runs) {
      name_case("layer_norms", P, L, run);
      std::mt19937 data(data_seed);
      const double nan = std::numeric_limits<double>::quiet_NaN();
      Buffer<T> a(P, run.offset), b(P, run.offset);
      Buffer<double> partials(fedu::total_chunks(pieces), 0, nan), norms(L, 0, nan);
      a.randomize(data), b.randomize(data);
      std::vector<double> differences(P), want(L);
      for (int64_t i = 0; i < P; ++i) differences[i] = static_cast<double>(a[i]) - b[i];
      for (int64_t l = 0; l < L; ++l) want[l] = norm(differences.data(), segments[2 * l], segments[2 * l + 1]);
      cuda_on_cpu::order = run.order;
      expect_success(fedu::cuda::layer_norms(a.data(), b.data(), pieces, partials.data(), norms.data(), run.blocks, nullptr));
      expect_close("norms", norms, want);
      expect_same("first norms", norms, first);
    }
  }
}

template <typename T>
void check_ema(int64_t P, const std::vector<Run>& runs, std::mt19937& random) {
  for (const Run& run : runs) {
    for (int shift : {0, 1}) {  // of online against target: where it is not 0, no pack of both is aligned
      name_case("ema", P, 0, run, "shift=" + std::to_string(shift));
      Buffer<T> target(P, run.offset), online(P, run.offset + shift);
      target.randomize(random), online.randomize(random);
      std::vector<T> want(P);
      for (int64_t i = 0; i < P; ++i) want[i] = T(0.99) * target[i] + T(1 - 0.99) * online[i];
      cuda_on_cpu::order = run.order;
      expect_success(fedu::cuda::ema(target.data(), online.data(), 0.99, P, run.blocks, nullptr));
      expect_bits("target", target, want);
    }
  }
}

template <typename T>
void check_sgd_ema(int64_t P, const std::vector<Run>& runs, std::mt19937& random) {
  const double lr = 0.032, ema_decay = 0.99;
  const T momentum = T(0.9), decay = T(5e-4);
  for (const Run& run : runs) {
    for (int64_t covered : {int64_t(0), P / 3, P}) {
      for (int shift : {0, 1}) {  // of the gradient against the others
        name_case("sgd_ema", P, 0, run, "covered=" + std::to_string(covered) + " shift=" + std::to_string(shift));
        Buffer<T> weight(P, run.offset), gradient(P, run.offset + shift), target(covered, run.offset);
        weight.randomize(random), gradient.randomize(random), target.randomize(random);
        std::vector<T> want_weight(P), want_gradient(P), want_target(covered);
        for (int64_t i = 0; i < P; ++i) {
          want_weight[i] = std::fma(-T(lr), gradient[i], weight[i]);
          want_gradient[i] = std::fma(want_weight[i], decay, momentum * gradient[i]);
          if (i < covered) want_target[i] = T(ema_decay) * target[i] + T(1 - ema_decay) * want_weight[i];
        }
        cuda_on_cpu::order = run.order;
        expect_success(fedu::cuda::sgd_ema(weight.data(), gradient.data(), target.data(), &lr, {0.9, 5e-4, ema_decay}, P, covered,
                                           run.blocks, nullptr));
        expect_bits("weight", weight, want_weight), expect_bits("gradient", gradient, want_gradient);
        expect_bits("target", target, want_target);
      }
    }
  }
}

// Two layers on both sides of float 2^31 of vectors whose pages are the system's zeros: 17 GB of addresses, a few KB of memory.
void check_far_layers() {
  constexpr int64_t kFar = int64_t(1) << 31, kSize = kFar + 9000;
  where = "layer_norms beyond 2^31";
  const auto map = [] {
    void* p = mmap(nullptr, kSize * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::printf("no address space for 2^31 floats\n"), std::exit(1);
    return static_cast<float*>(p);
  };
  float *a = map(), *b = map();
  a[5] = 3, b[kFar + 100] = 4, b[kFar + 8999] = 12;
  const Segments segments = {4, 7, kFar + 3, kFar + 101, kFar + 101, kSize};
  const std::vector<Piece> pieces = fedu::partition(segments.data(), 3, kSize);
  Buffer<double> partials(fedu::total_chunks(pieces), 0), norms(3, 0);
  cuda_on_cpu::order = cuda_on_cpu::kForward;
  expect_success(fedu::cuda::layer_norms<float>(a, b, pieces, partials.data(), norms.data(), 3, nullptr));
  expect_close("norms", norms, {3, 4, 12});
  munmap(a, kSize * sizeof(float)), munmap(b, kSize * sizeof(float));
}

// The kernel against the CPU's, which test_ops.py holds against torchvision. Rows of draws without sense must stay inside the image too.
void check_augment(int64_t num_images, int64_t num_views, int height, int width, const Run& run, std::mt19937& random) {
  name_case("augment", num_views, height * width, run);
  const auto uniform = [&](double low, double high) { return static_cast<float>(low + (high - low) * (random() % 100001) / 100000); };
  const int64_t size = 3 * int64_t(height) * width;
  Buffer<uint8_t> images(num_images * size, 0);
  Buffer<float> draws(num_views * fedu::kColumns, 0), views(num_views * size, 0, std::numeric_limits<float>::quiet_NaN());
  for (int64_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(random());
  for (int64_t n = 0; n < num_views; ++n) {
    float* row = &draws[n * fedu::kColumns];
    const int h = 1 + random() % height, w = 1 + random() % width;
    const float values[] = {float(random() % (height - h + 1)), float(random() % (width - w + 1)), float(h), float(w), float(random() % 2),
                            uniform(.2, 1.8), uniform(.2, 1.8), uniform(.2, 1.8), uniform(-.2, .2), 0, 1, 2, 3, float(random() % 2)};
    std::copy_n(values, fedu::kColumns, row);
    std::shuffle(row + fedu::kOrder, row + fedu::kOrder + 4, random);
    if (n % 7 == 6) row[random() % fedu::kColumns] = n % 2 ? 1e30f : -std::numeric_limits<float>::quiet_NaN();
  }
  cuda_on_cpu::order = run.order;
  expect_success(fedu::cuda::augment(images.data(), draws.data(), views.data(), num_images, num_views, height, width, run.blocks, nullptr));
  std::vector<float> want(size), line(width);
  std::vector<fedu::Tap> taps(width);
  for (int64_t n = 0; n < num_views; ++n) {
    fedu::augment_view(&images[n % num_images * size], &draws[n * fedu::kColumns], want.data(), height, width, line.data(), taps.data());
    for (int64_t i = 0; i < size; ++i, ++comparisons) {
      if (!(std::abs(views[n * size + i] - want[i]) <= 1e-5)) differ("views", n * size + i, views[n * size + i], want[i]);
    }
  }
}

// The chunks of any partition tile the vector, once and in order, also far beyond 2^31 floats.
void check_partition() {
  constexpr int64_t kFar = int64_t(1) << 40;
  where = "partition";
  for (int64_t begin : {int64_t(0), int64_t(4095), int64_t(4096), kFar - 1, kFar, kFar + 5}) {
    for (int64_t length : {0, 1, 4095, 4096, 4097, 10000}) {
      const int64_t segments[2] = {begin, begin + length}, size = begin + length + 7;
      int64_t first = 0, at = 0;
      for (const Piece& piece : fedu::partition(segments, 1, size)) {
        if (piece.first != first || piece.begin != at) differ("first", piece.begin, piece.first, first);
        const int64_t chunks = fedu::num_chunks(piece);
        for (int64_t c : {int64_t(0), int64_t(1), chunks - 1}) {
          if (c < 0 || c >= chunks) continue;
          const fedu::Range range = fedu::chunk_range(piece, first + c);
          const int64_t want = c == 0 ? piece.begin : (piece.begin / 4096 + c) * 4096;
          if (range.begin != want || range.end <= range.begin || range.end - range.begin > 4096) differ("begin", c, range.begin, want);
          if (c == chunks - 1 && range.end != piece.end) differ("end", c, range.end, piece.end);
        }
        first += chunks, at = piece.end;
      }
      if (at != size) differ("size", 0, at, size);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  using namespace cuda_on_cpu;
  const std::string what = argc > 1 ? argv[1] : "";
  const bool quick = what == "quick";
  if (!quick) check_far_layers();
  if (what == "far") return 0;
  std::mt19937 random(1);
  const std::vector<Run> every = {{1, kForward, 0}, {2, kReverse, 0}, {5, kRandom, 0}, {3, kForward, 1}, {4, kReverse, 2}, {2, kRandom, 3}};
  const std::vector<Run> few = {{2, kForward, 0}, {3, kReverse, 1}};
  check_partition();
  int turn = 0;
  for (int64_t P : {0, 1, 3, 31, 32, 33, 1023, 1024, 4099, (1 << 17) + 3}) {
    const bool large = P > 100000;
    if (quick && (large || P == 31 || P == 1023)) continue;
    for (int64_t K : {1, 2, 5, 17, 100}) {
      if (K > (quick ? 5 : large ? 17 : 100)) continue;
      const std::vector<Run> one = {every[turn++ % every.size()]};  // many clients take long: each case in one of the ways
      check_aggregate<float>(K, P, K == 2 || K == 17, large || K > 5 ? one : quick ? few : every, random);
      if (K == 5 || (K == 17 && P == 33)) check_aggregate<double>(K, P, true, quick || large ? one : few, random);
    }
    check_layer_norms<float>(P, every, random), check_layer_norms<double>(P, few, random);
    check_ema<float>(P, every, random), check_ema<double>(P, few, random);
    check_sgd_ema<float>(P, every, random), check_sgd_ema<double>(P, few, random);
  }
  // Whole packs in every row, as P of a real network; and more chunks in a layer than the finishing block has threads.
  for (int64_t K : {1, 5, 8, 9, 17}) check_aggregate<float>(K, 4096 + 1024 + 8, K == 9, quick || K > 5 ? few : every, random);
  check_layer_norms<float>(4096 * 300 + 5, {{7, kForward, 0}}, random);
  for (const Run& run : every) {
    check_augment(4, 12, 32, 32, run, random);
    check_augment(1, 1, 1, 1, run, random), check_augment(3, 3, 17, 40, run, random), check_augment(14, 28, 8, 9, run, random);
  }
  std::printf("%ld values compared, %ld launches\n", comparisons, launches);
}
