// One view of an image, given its 14 drawn numbers: the arithmetic of a pixel, for CPU and CUDA, and the CPU kernel.
// reference.py has the same in plain torch and names the 14 numbers.
#pragma once

#include "fused.h"

#include <cmath>

namespace fedu {

// Columns of a row.
constexpr int kTop = 0, kLeft = 1, kHeight = 2, kWidth = 3, kFlip = 4, kAmounts = 5, kOrder = 9, kGrey = 13, kColumns = 14;
enum Operation { kBrightness, kContrast, kSaturation, kHue };  // the places of their amounts, and what the order's columns hold

struct Pixel {
  float r, g, b;
};

// Where an output row or column reads: two neighbours and the second one's share.
struct Tap {
  int first, second;
  float share;
};

// NaN becomes `low`, so no row of numbers, however wrong, makes a kernel read outside an image.
FEDU_HOST_DEVICE inline float clamp(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

// Bilinear, pixel centres at halves, never looking beyond [begin, begin + length) nor the image.
FEDU_HOST_DEVICE inline Tap tap(int out, int size, float begin, float length) {
  const float last = static_cast<float>(size - 1), end = clamp(begin + length - 1, 0, last);
  const float inside = clamp((static_cast<float>(out) + 0.5f) * (length / static_cast<float>(size)) - 0.5f, 0, last);
  const float source = clamp(begin + inside, 0, end);
  const int first = static_cast<int>(source);
  return {first, first < static_cast<int>(end) ? first + 1 : first, source - static_cast<float>(first)};
}

FEDU_HOST_DEVICE inline Operation operation_at(const float* row, int slot) {
  return static_cast<Operation>(static_cast<int>(clamp(row[kOrder + slot], kBrightness, kHue)));
}

FEDU_HOST_DEVICE inline float mix(float a, float b, float share) { return (1 - share) * a + share * b; }

// Luma by ITU-R 601-2.
FEDU_HOST_DEVICE inline float luma(Pixel p) { return 0.2989f * p.r + 0.587f * p.g + 0.114f * p.b; }

// factor p + (1 - factor) base, clamped: brightness, contrast and saturation differ only in the base.
FEDU_HOST_DEVICE inline Pixel blend(Pixel p, float base, float factor) {
  const float rest = (1 - factor) * base;
  return {clamp(factor * p.r + rest, 0, 1), clamp(factor * p.g + rest, 0, 1), clamp(factor * p.b + rest, 0, 1)};
}

// Turns the hue by `shift` turns in HSV space; value and chroma stay.
FEDU_HOST_DEVICE inline Pixel turn_hue(Pixel p, float shift) {
  const float value = p.r > p.g ? (p.r > p.b ? p.r : p.b) : (p.g > p.b ? p.g : p.b);
  const float low = p.r < p.g ? (p.r < p.b ? p.r : p.b) : (p.g < p.b ? p.g : p.b);
  const float chroma = value - low, inverse = 1 / (chroma == 0 ? 1 : chroma);
  const float from_red = (p.g - p.b) * inverse, from_green = 2 + (p.b - p.r) * inverse, from_blue = 4 + (p.r - p.g) * inverse;
  const float turned = 6 * shift + (value == p.r ? from_red : value == p.g ? from_green : from_blue);
  const auto channel = [&](float offset) {
    const float x = turned + offset, k = x - 6 * floorf(x / 6), other = 4 - k;  // x modulo 6
    return value - chroma * clamp(k < other ? k : other, 0, 1);
  };
  return {channel(5), channel(3), channel(1)};
}

FEDU_HOST_DEVICE inline Pixel apply(Operation operation, Pixel p, float amount, float mean_luma) {
  if (operation == kHue) return turn_hue(p, amount);
  return blend(p, operation == kBrightness ? 0 : operation == kContrast ? mean_luma : luma(p), amount);
}

// Whether an operation of this amount changes anything: a factor of 1 and a shift of 0 do not.
FEDU_HOST_DEVICE inline bool acts(Operation operation, float amount) { return amount != (operation == kHue ? 0.0f : 1.0f); }

// ---- The CPU kernel

// One operation on all pixels of a view's three planes, which lie in the L1 cache: a loop that the compiler turns into vectors.
template <Operation kOperation>
void apply_all(float* r, float* g, float* b, int64_t size, float amount, float mean_luma) {
  for (int64_t i = 0; i < size; ++i) {
    const Pixel p = apply(kOperation, {r[i], g[i], b[i]}, amount, mean_luma);
    r[i] = p.r, g[i] = p.g, b[i] = p.b;
  }
}

inline float mean_luma(const float* r, const float* g, const float* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += luma({r[i], g[i], b[i]});
  return static_cast<float>(sum / static_cast<double>(size));
}

// image: uint8 [3, height, width]; row: kColumns floats; view: float [3, height, width]; line, taps: scratch of `width`.
inline void augment_view(const uint8_t* image, const float* row, float* view, int height, int width, float* line, Tap* taps) {
  const int64_t size = static_cast<int64_t>(height) * width;
  const bool flip = row[kFlip] != 0;
  for (int x = 0; x < width; ++x) taps[x] = tap(flip ? width - 1 - x : x, width, row[kLeft], row[kWidth]);
  const int left = std::min(taps[0].first, taps[width - 1].first), right = std::max(taps[0].second, taps[width - 1].second);
  for (int plane = 0; plane < 3; ++plane) {
    for (int y = 0; y < height; ++y) {
      const Tap rows = tap(y, height, row[kTop], row[kHeight]);
      const uint8_t *above = image + (plane * size + rows.first * width), *below = image + (plane * size + rows.second * width);
      for (int x = left; x <= right; ++x) line[x] = mix(above[x], below[x], rows.share) * (1.0f / 255);
      float* out = view + plane * size + y * width;
      for (int x = 0; x < width; ++x) out[x] = mix(line[taps[x].first], line[taps[x].second], taps[x].share);
    }
  }
  float *r = view, *g = r + size, *b = g + size;
  for (int slot = 0; slot < 4; ++slot) {
    const Operation operation = operation_at(row, slot);
    const float amount = row[kAmounts + operation];
    if (!acts(operation, amount)) continue;
    if (operation == kBrightness) apply_all<kBrightness>(r, g, b, size, amount, 0);
    if (operation == kContrast) apply_all<kContrast>(r, g, b, size, amount, mean_luma(r, g, b, size));
    if (operation == kSaturation) apply_all<kSaturation>(r, g, b, size, amount, 0);
    if (operation == kHue) apply_all<kHue>(r, g, b, size, amount, 0);
  }
  if (row[kGrey] != 0) apply_all<kSaturation>(r, g, b, size, 0, 0);
}

}  // namespace fedu
