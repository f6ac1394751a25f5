// BatchNorm in training mode and the ReLU behind it, on the CPU, of several views that lie one behind the other.
//
// x is `views` times `rows` rows of `channels` floats: images channels-last, or the output of a linear layer. Each view is normalised by
// its own mean and variance. The work is cut into units of 64 lines of at most 64 floats, which stay in the L1 cache and whose sums stay
// in registers; narrow rows share a line. A unit's sums are floats, and all units' are added as double in one order: the number of
// threads changes no bit. Backwards, what the ReLU cut off is computed again from x.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace fedu::norm {

constexpr int64_t kLine = 64, kLines = 64;

struct Views {
  int64_t views, rows, channels;
  int64_t fold() const { return std::max<int64_t>(1, kLine / channels); }  // rows that share a line
  int64_t blocks() const { return (rows + kLines * fold() - 1) / (kLines * fold()); }
  int64_t tiles() const { return (channels + kLine - 1) / kLine; }
  int64_t units() const { return views * blocks() * tiles(); }
};

// Rows [0, rows) and `width` columns from `begin` on; `view` and the first column are where its statistics lie.
struct Unit {
  int64_t view, column, begin, rows, width;
};

// Calls f(unit, its number) on any number of threads.
template <typename F>
void for_each_unit(const Views& v, const F& f) {
  const int64_t blocks = v.blocks(), tiles = v.tiles(), height = kLines * v.fold();
  at::parallel_for(0, v.units(), 8, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t view = k / (blocks * tiles), row = k / tiles % blocks * height, column = k % tiles * kLine;
      f(Unit{view, column, (view * v.rows + row) * v.channels + column, std::min(height, v.rows - row), std::min(kLine, v.channels - column)},
        k);
    }
  });
}

// Calls f(where, n) for each line of a unit, n floats; a full line's n is a constant, so that the compiler keeps its sums in registers.
template <typename F>
void for_each_line(const Views& v, const Unit& unit, const F& f) {
  const int64_t fold = v.fold(), whole = unit.rows / fold, step = fold * v.channels;
  if (unit.width * fold == kLine) {
    for (int64_t r = 0; r < whole; ++r) f(unit.begin + r * step, std::integral_constant<int64_t, kLine>());
  } else {
    for (int64_t r = 0; r < whole; ++r) f(unit.begin + r * step, unit.width * fold);
  }
  for (int64_t r = whole * fold; r < unit.rows; ++r) f(unit.begin + r * v.channels, unit.width);
}

// A line's values for each column, from one value for each of the unit's channels.
template <typename T, typename F>
void fill_line(const Views& v, const Unit& unit, T* line, const F& value) {
  for (int64_t c = 0; c < unit.width; ++c) line[c] = value(unit.column + c);
  for (int64_t i = unit.width; i < unit.width * v.fold(); ++i) line[i] = line[i - unit.width];
}

// Adds the rows that share a line: afterwards the line's first `width` values are sums of the unit's channels.
template <typename T>
void fold_line(const Views& v, const Unit& unit, T* line) {
  for (int64_t row = 1; row < v.fold(); ++row) {
    for (int64_t c = 0; c < unit.width; ++c) line[c] += line[row * unit.width + c];
  }
}

// y = x scale + shift, the same bits forwards and backwards.
template <typename T>
struct Affine {
  const T *weight, *bias, *mean, *inverse;  // weight and bias may be null
  int64_t channels;

  T scale(int64_t view, int64_t c) const { return inverse[view * channels + c] * (weight ? weight[c] : T(1)); }
  T shift(int64_t view, int64_t c) const { return (bias ? bias[c] : T(0)) - mean[view * channels + c] * scale(view, c); }
};

template <typename F>
void with_relu(bool relu, const F& f) {
  relu ? f(std::true_type()) : f(std::false_type());
}

// Writes y, and each view's mean and 1 / sqrt(variance + eps), [views, channels]; the running statistics, if any, follow view by view.
template <typename T>
void forward(const T* x, const T* weight, const T* bias, T* running_mean, T* running_var, T* y, T* mean, T* inverse, const Views& v,
                double momentum, double eps, bool relu) {
  const int64_t C = v.channels, in_view = v.blocks() * v.tiles();
  std::vector<T> means(v.units() * kLine), squares(v.units() * kLine);  // each unit's mean, and its sum of squares around it
  for_each_unit(v, [&](const Unit& unit, int64_t k) {
    T sum[kLine] = {}, centre[kLine], square[kLine] = {};
    for_each_line(v, unit, [&](int64_t at, auto n) {
      for (int64_t i = 0; i < n; ++i) sum[i] += x[at + i];
    });
    fold_line(v, unit, sum);
    for (int64_t c = 0; c < unit.width; ++c) sum[c] /= unit.rows;
    fill_line(v, unit, centre, [&](int64_t c) { return sum[c - unit.column]; });
    for_each_line(v, unit, [&](int64_t at, auto n) {
      for (int64_t i = 0; i < n; ++i) square[i] += (x[at + i] - centre[i]) * (x[at + i] - centre[i]);
    });
    fold_line(v, unit, square);
    std::copy(sum, sum + unit.width, &means[k * kLine]);
    std::copy(square, square + unit.width, &squares[k * kLine]);
  });
  const int64_t height = kLines * v.fold();
  for (int64_t view = 0; view < v.views; ++view) {
    for (int64_t c = 0; c < C; ++c) {
      double centre = 0, square = 0;
      for (int64_t row = 0, k = view * in_view + c / kLine; row < v.rows; row += height, k += v.tiles()) {  // Chan et al. 1983
        const double n = std::min(height, v.rows - row), d = means[k * kLine + c % kLine] - centre;
        centre += d * n / (row + n);
        square += squares[k * kLine + c % kLine] + d * d * n * row / (row + n);
      }
      mean[view * C + c] = T(centre);
      inverse[view * C + c] = T(1 / std::sqrt(square / v.rows + eps));
      if (running_mean) {
        running_mean[c] = T(momentum * centre + (1 - momentum) * running_mean[c]);
        running_var[c] = T(momentum * square / (v.rows - 1) + (1 - momentum) * running_var[c]);
      }
    }
  }
  const Affine<T> affine = {weight, bias, mean, inverse, C};
  with_relu(relu, [&](auto cut) {
    for_each_unit(v, [&](const Unit& unit, int64_t) {
      T scale[kLine], shift[kLine];
      fill_line(v, unit, scale, [&](int64_t c) { return affine.scale(unit.view, c); });
      fill_line(v, unit, shift, [&](int64_t c) { return affine.shift(unit.view, c); });
      for_each_line(v, unit, [&](int64_t at, auto n) {
        for (int64_t i = 0; i < n; ++i) {
          const T value = x[at + i] * scale[i] + shift[i];
          y[at + i] = cut && value <= 0 ? T(0) : value;  // NaN stays
        }
      });
    });
  });
}

// From the gradient of y: that of x, and those of weight and bias, [channels], over all views.
template <typename T>
void backward(const T* gradient, const T* x, const T* weight, const T* bias, const T* mean, const T* inverse, T* of_x, T* of_weight,
              T* of_bias, const Views& v, bool relu) {
  const int64_t C = v.channels, in_view = v.blocks() * v.tiles();
  const Affine<T> affine = {weight, bias, mean, inverse, C};
  std::vector<T> sums(v.units() * kLine), products(v.units() * kLine);  // each unit's sum of d, and of d (x - mean)
  std::vector<T> constant(v.views * C), factor(v.views * C);            // of_x = scale d + factor (x - mean) + constant
  with_relu(relu, [&](auto cut) {
    for_each_unit(v, [&](const Unit& unit, int64_t k) {
      T scale[kLine], shift[kLine], centre[kLine], sum[kLine] = {}, product[kLine] = {};
      fill_line(v, unit, scale, [&](int64_t c) { return affine.scale(unit.view, c); });
      fill_line(v, unit, shift, [&](int64_t c) { return affine.shift(unit.view, c); });
      fill_line(v, unit, centre, [&](int64_t c) { return mean[unit.view * C + c]; });
      for_each_line(v, unit, [&](int64_t at, auto n) {
        for (int64_t i = 0; i < n; ++i) {
          const T value = x[at + i] * scale[i] + shift[i], above = gradient[at + i];
          const T d = cut && value <= 0 ? T(0) : above;
          sum[i] += d;
          product[i] += d * (x[at + i] - centre[i]);
        }
      });
      fold_line(v, unit, sum);
      fold_line(v, unit, product);
      std::copy(sum, sum + unit.width, &sums[k * kLine]);
      std::copy(product, product + unit.width, &products[k * kLine]);
    });
    for (int64_t c = 0; c < C; ++c) {
      double total_weight = 0, total_bias = 0;
      for (int64_t view = 0; view < v.views; ++view) {
        double sum = 0, product = 0, scale = affine.scale(view, c), inv = inverse[view * C + c];
        for (int64_t b = 0, k = view * in_view + c / kLine; b < v.blocks(); ++b, k += v.tiles()) {
          sum += sums[k * kLine + c % kLine];
          product += products[k * kLine + c % kLine];
        }
        constant[view * C + c] = T(-scale * sum / v.rows);
        factor[view * C + c] = T(-scale * inv * inv * product / v.rows);
        total_weight += product * inv;
        total_bias += sum;
      }
      of_weight[c] = T(total_weight);
      of_bias[c] = T(total_bias);
    }
    for_each_unit(v, [&](const Unit& unit, int64_t) {
      T scale[kLine], shift[kLine], centre[kLine], add[kLine], slope[kLine];
      fill_line(v, unit, scale, [&](int64_t c) { return affine.scale(unit.view, c); });
      fill_line(v, unit, shift, [&](int64_t c) { return affine.shift(unit.view, c); });
      fill_line(v, unit, centre, [&](int64_t c) { return mean[unit.view * C + c]; });
      fill_line(v, unit, add, [&](int64_t c) { return constant[unit.view * C + c]; });
      fill_line(v, unit, slope, [&](int64_t c) { return factor[unit.view * C + c]; });
      for_each_line(v, unit, [&](int64_t at, auto n) {
        for (int64_t i = 0; i < n; ++i) {
          const T value = x[at + i] * scale[i] + shift[i], above = gradient[at + i];
          const T d = cut && value <= 0 ? T(0) : above;
          of_x[at + i] = scale[i] * d + slope[i] * (x[at + i] - centre[i]) + add[i];
        }
      });
    });
  });
}

}  // namespace fedu::norm
