// An image, made what the network takes: bit for bit what cnnedge's own image.py makes of it.
//
// cnnedge resizes with Pillow's bilinear filter, which is antialiased: a triangle as wide as the
// reduction, in two passes, weights in fixed point of 22 bits, each pass rounded to 8. Other
// libraries call something else bilinear, and it flips answers. Compile with -ffp-contract=off:
// a fused multiply-add may round a weight the other way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cnnedge {

// What an image must become; the manifest's and the ONNX metadata's "image".
struct Contract {
  int height = 0;
  int width = 0;
  int channels = 3;               // 3: RGB, 1: grey
  std::string resize = "stretch";  // or "crop", "letterbox"
};

// 8-bit pixels, row by row from the top left, channels side by side.
struct Image {
  int width = 0;
  int height = 0;
  int channels = 0;
  std::vector<std::uint8_t> pixels;

  Image() = default;
  Image(int w, int h, int c) : width(w), height(h), channels(c) {
    pixels.resize(static_cast<std::size_t>(w) * static_cast<std::size_t>(h) *
                  static_cast<std::size_t>(c));
  }

  std::size_t stride() const {
    return static_cast<std::size_t>(width) * static_cast<std::size_t>(channels);
  }
  std::uint8_t* at(int x, int y) {
    return pixels.data() + static_cast<std::size_t>(y) * stride() +
           static_cast<std::size_t>(x) * static_cast<std::size_t>(channels);
  }
  const std::uint8_t* at(int x, int y) const {
    return pixels.data() + static_cast<std::size_t>(y) * stride() +
           static_cast<std::size_t>(x) * static_cast<std::size_t>(channels);
  }
};

namespace detail {

constexpr int kBits = 22;  // of a weight's fraction

// The source pixels that one destination pixel is made of, and their weights.
struct Taps {
  int first = 0;
  std::vector<std::int32_t> weights;
};

inline std::vector<Taps> triangle(int from, int to) {
  const double scale = static_cast<double>(from) / to;
  const double reach = std::max(scale, 1.0);  // half of the triangle's base, in source pixels
  const double slope = 1.0 / reach;
  std::vector<Taps> all(static_cast<std::size_t>(to));
  std::vector<double> weights;
  for (int i = 0; i < to; ++i) {
    Taps& taps = all[static_cast<std::size_t>(i)];
    const double centre = (i + 0.5) * scale;
    taps.first = std::max(static_cast<int>(centre - reach + 0.5), 0);
    const int last = std::min(static_cast<int>(centre + reach + 0.5), from);
    weights.clear();
    double sum = 0.0;
    for (int x = taps.first; x < last; ++x) {
      const double distance = std::fabs((x - centre + 0.5) * slope);
      weights.push_back(distance < 1.0 ? 1.0 - distance : 0.0);
      sum += weights.back();
    }
    for (const double weight : weights) {
      const double share = sum != 0.0 ? weight / sum : weight;
      taps.weights.push_back(static_cast<std::int32_t>(0.5 + share * (1 << kBits)));
    }
  }
  return all;
}

inline std::uint8_t rounded(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255));
}

inline Image resize_width(const Image& image, int width) {
  const std::vector<Taps> all = triangle(image.width, width);
  Image out(width, image.height, image.channels);
  for (int y = 0; y < image.height; ++y) {
    std::uint8_t* to = out.at(0, y);
    for (const Taps& taps : all) {
      for (int c = 0; c < image.channels; ++c) {
        const std::uint8_t* from = image.at(taps.first, y) + c;
        std::int32_t sum = 1 << (kBits - 1);
        for (const std::int32_t weight : taps.weights) {
          sum += weight * *from;
          from += image.channels;
        }
        *to++ = rounded(sum);
      }
    }
  }
  return out;
}

inline Image resize_height(const Image& image, int height) {
  const std::vector<Taps> all = triangle(image.height, height);
  Image out(image.width, height, image.channels);
  std::vector<std::int32_t> sums(image.stride());
  for (int y = 0; y < height; ++y) {  // whole rows at a time: their pixels lie side by side
    const Taps& taps = all[static_cast<std::size_t>(y)];
    std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
    int row = taps.first;
    for (const std::int32_t weight : taps.weights) {
      const std::uint8_t* from = image.at(0, row++);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += weight * from[i];
    }
    std::transform(sums.begin(), sums.end(), out.at(0, y), rounded);
  }
  return out;
}

// Python's round(): halves go to the even neighbour, as nearbyint's do unless told otherwise.
inline int round_even(double value) { return static_cast<int>(std::nearbyint(value)); }

}  // namespace detail

// Pillow's Image.resize(size, BILINEAR) of an 8-bit image, the width first: each pass rounds, so
// their order shows, and Pillow 13 itself begins with the height where that is less work.
inline Image resize_bilinear(Image image, int width, int height) {
  if (static_cast<long long>(width) * image.height > 89478485) {  // as many as decode.hpp takes
    throw std::invalid_argument("an image of " + std::to_string(image.height) +
                                " rows is too tall to be stretched");
  }
  if (width != image.width) image = detail::resize_width(image, width);
  if (height != image.height) image = detail::resize_height(image, height);
  return image;
}

inline Image crop(const Image& image, int left, int top, int width, int height) {
  Image out(width, height, image.channels);
  for (int y = 0; y < height; ++y) {
    std::copy_n(image.at(left, top + y), out.stride(), out.at(0, y));
  }
  return out;
}

inline Image to_grey(const Image& image) {
  Image out(image.width, image.height, 1);
  const std::uint8_t* from = image.pixels.data();
  for (std::uint8_t& grey : out.pixels) {  // ITU-R 601-2 luma in fixed point of 16 bits
    grey = static_cast<std::uint8_t>(
        (from[0] * 19595 + from[1] * 38470 + from[2] * 7471 + 0x8000) >> 16);
    from += 3;
  }
  return out;
}

// An upright RGB image of any size, as the network takes it.
inline Image fit(Image image, const Contract& contract) {
  if (image.channels != 3 || image.width < 1 || image.height < 1) {
    throw std::invalid_argument("fit takes an RGB image");
  }
  if (contract.channels == 1) image = to_grey(image);
  const int width = contract.width, height = contract.height;
  if (contract.resize == "letterbox") {  // the whole image, centred on black
    const double scale = std::min(static_cast<double>(width) / image.width,
                                  static_cast<double>(height) / image.height);
    const int inner_width = std::max(1, detail::round_even(image.width * scale));
    const int inner_height = std::max(1, detail::round_even(image.height * scale));
    const Image inner = resize_bilinear(std::move(image), inner_width, inner_height);
    Image out(width, height, inner.channels);
    const int left = (width - inner_width) / 2, top = (height - inner_height) / 2;
    for (int y = 0; y < inner_height; ++y) {
      std::copy_n(inner.at(0, y), inner.stride(), out.at(left, top + y));
    }
    return out;
  }
  if (contract.resize == "crop") {  // the largest centred part of the right shape
    const double aspect = static_cast<double>(width) / height;
    const double w = image.width, h = image.height;
    const int part_width = std::max(1, detail::round_even(std::min(w, h * aspect)));
    const int part_height = std::max(1, detail::round_even(std::min(h, w / aspect)));
    image = crop(image, (image.width - part_width) / 2, (image.height - part_height) / 2,
                 part_width, part_height);
  } else if (contract.resize != "stretch") {
    throw std::invalid_argument("the bundle asks for the resize \"" + contract.resize +
                                "\", which this app does not know");
  }
  return resize_bilinear(std::move(image), width, height);
}

}  // namespace cnnedge
