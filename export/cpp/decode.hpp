// An image file, as upright RGB: binary PPM always, and JPEG, PNG, BMP, GIF where stb_image.h was
// found (CNNEDGE_STB; Debian: libstb-dev). Include it in one .cpp file only.
#pragma once

#include <cctype>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

#include "image.hpp"

#ifdef CNNEDGE_STB
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#include <stb_image.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif

namespace cnnedge {

constexpr long long kMostPixels = 89478485;  // cnnedge's own limit, refused before allocating

inline std::vector<std::uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

namespace detail {

inline void check_size(long long width, long long height, const std::string& path) {
  if (width < 1 || height < 1 || width > kMostPixels || height > kMostPixels ||
      width * height > kMostPixels) {
    throw std::runtime_error(path + " declares " + std::to_string(width) + "x" +
                             std::to_string(height) + " pixels");
  }
}

inline Image read_ppm(const std::vector<std::uint8_t>& bytes, const std::string& path) {
  std::size_t at = 2;
  const auto number = [&]() -> long long {
    while (at < bytes.size() && (std::isspace(bytes[at]) || bytes[at] == '#')) {
      if (bytes[at] == '#') {
        while (at < bytes.size() && bytes[at] != '\n') ++at;
      } else {
        ++at;
      }
    }
    long long value = -1;
    while (at < bytes.size() && std::isdigit(bytes[at]) && value < 1000000000) {
      value = (value < 0 ? 0 : value * 10) + (bytes[at++] - '0');
    }
    return value;
  };
  const long long width = number(), height = number(), most = number();
  if (most != 255) throw std::runtime_error(path + " is no PPM of 8 bits");
  check_size(width, height, path);
  ++at;  // the one blank before the pixels
  Image image(static_cast<int>(width), static_cast<int>(height), 3);
  if (at > bytes.size() || bytes.size() - at < image.pixels.size()) {
    throw std::runtime_error(path + " is cut short");
  }
  std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), image.pixels.size(),
              image.pixels.begin());
  return image;
}

// How a JPEG's camera was held: EXIF's orientation, 1 to 8. Phones store photos sideways.
inline int orientation(const std::vector<std::uint8_t>& b) {
  const auto u16 = [&](std::size_t at, bool little) -> unsigned {
    if (at + 2 > b.size()) return 0;
    return little ? b[at] | b[at + 1] << 8 : b[at] << 8 | b[at + 1];
  };
  const auto u32 = [&](std::size_t at, bool little) -> std::size_t {
    const std::size_t low = u16(little ? at : at + 2, little);
    const std::size_t high = u16(little ? at + 2 : at, little);
    return high << 16 | low;
  };
  if (u16(0, false) != 0xFFD8) return 1;
  for (std::size_t at = 2; at + 4 <= b.size() && b[at] == 0xFF;) {
    const std::size_t length = u16(at + 2, false);
    if (b[at + 1] == 0xDA || length < 2) break;  // the pixels begin
    const std::size_t tiff = at + 10;
    if (b[at + 1] == 0xE1 && tiff + 8 <= b.size() && !std::memcmp(&b[at + 4], "Exif\0\0", 6)) {
      const bool little = b[tiff] == 'I';
      const std::size_t table = tiff + u32(tiff + 4, little);
      const unsigned entries = u16(table, little);
      for (unsigned i = 0; i < entries; ++i) {
        const std::size_t entry = table + 2 + 12 * static_cast<std::size_t>(i);
        if (u16(entry, little) != 0x0112) continue;
        const unsigned value = u16(entry + 8, little);
        return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
      }
      return 1;
    }
    at += 2 + length;
  }
  return 1;
}

inline Image upright(Image image, int orientation) {
  if (orientation == 1) return image;
  const int w = image.width, h = image.height;
  const bool sideways = orientation >= 5;
  Image out(sideways ? h : w, sideways ? w : h, image.channels);
  for (int y = 0; y < out.height; ++y) {
    for (int x = 0; x < out.width; ++x) {
      int from_x = sideways ? y : x, from_y = sideways ? x : y;
      if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {
        from_x = w - 1 - from_x;
      }
      if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) {
        from_y = h - 1 - from_y;
      }
      std::copy_n(image.at(from_x, from_y), image.channels, out.at(x, y));
    }
  }
  return out;
}

#ifdef CNNEDGE_STB
// Lays RGBA on white, rounded as Pillow's alpha_composite does.
inline Image on_white(const std::uint8_t* rgba, int width, int height) {
  Image out(width, height, 3);
  for (std::size_t i = 0; i < out.pixels.size() / 3; ++i) {
    const int weight = rgba[4 * i + 3] * 128;
    for (std::size_t c = 0; c < 3; ++c) {
      const int sum = rgba[4 * i + c] * weight + 255 * (255 * 128 - weight) + 128 * 128;
      out.pixels[3 * i + c] = static_cast<std::uint8_t>((((sum >> 8) + sum) >> 8) >> 7);
    }
  }
  return out;
}

inline Image read_stb(const std::vector<std::uint8_t>& bytes, const std::string& path) {
  const int size = static_cast<int>(bytes.size());
  int width = 0, height = 0, channels = 0;
  if (!stbi_info_from_memory(bytes.data(), size, &width, &height, &channels)) {
    throw std::runtime_error(path + " is no image that this app reads");
  }
  check_size(width, height, path);
  const int wanted = channels % 2 ? 3 : 4;  // 2 and 4 have transparency
  const std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
      stbi_load_from_memory(bytes.data(), size, &width, &height, &channels, wanted),
      stbi_image_free);
  if (!pixels) {
    throw std::runtime_error(path + " cannot be decoded (" + stbi_failure_reason() + ")");
  }
  if (wanted == 4) return on_white(pixels.get(), width, height);
  Image image(width, height, 3);
  std::copy_n(pixels.get(), image.pixels.size(), image.pixels.begin());
  return upright(std::move(image), orientation(bytes));
}
#endif

}  // namespace detail

// Throws std::runtime_error, with a message that names the file.
inline Image read_image(const std::string& path) {
  const std::vector<std::uint8_t> bytes = read_file(path);
  if (bytes.size() > 2 && bytes[0] == 'P' && bytes[1] == '6') {
    return detail::read_ppm(bytes, path);
  }
#ifdef CNNEDGE_STB
  return detail::read_stb(bytes, path);
#else
  throw std::runtime_error(path + " is no binary PPM, and this app was built without stb_image.h");
#endif
}

}  // namespace cnnedge
