// An image file, as upright RGB: binary PPM always, and JPEG and PNG where stb_image.h was found
// (CNNEDGE_STB; Debian: libstb-dev). Include it in one .cpp file only.
#pragma once

#include <cctype>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <system_error>

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
#define STBI_ONLY_JPEG  // of its other formats stb_image reads a file that was cut short as if whole
#define STBI_ONLY_PNG
#include <stb_image.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif

namespace cnnedge {

constexpr long long kMostPixels = 89478485;      // cnnedge's own limit, refused before allocating
constexpr std::uintmax_t kMostBytes = 1u << 30;  // of an image's file; stb_image counts in ints

inline std::vector<std::uint8_t> read_file(const std::string& path,
                                           std::uintmax_t most = PTRDIFF_MAX) {
  std::error_code error;  // also for a folder, which ifstream opens
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) throw std::runtime_error("cannot read " + path + " (" + error.message() + ")");
  if (size > most) throw std::runtime_error(path + " has " + std::to_string(size) + " bytes");
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(size));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size))) {
    throw std::runtime_error("cannot read " + path);
  }
  return bytes;
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

// A number of so many bytes; those beyond the end are 0.
inline std::size_t number(const std::vector<std::uint8_t>& b, std::size_t at, std::size_t size,
                          bool little = false) {
  std::size_t value = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const std::size_t from = at + (little ? size - 1 - i : i);
    value = value << 8 | (from < b.size() ? b[from] : 0u);
  }
  return value;
}

// Where the EXIF of a JPEG or PNG begins, which is a TIFF file in itself; 0: there is none.
inline std::size_t find_exif(const std::vector<std::uint8_t>& b) {
  const auto is = [&](std::size_t at, const char* text, std::size_t size) {
    return at + size <= b.size() && !std::memcmp(&b[at], text, size);
  };
  if (number(b, 0, 2) == 0xFFD8) {
    for (std::size_t at = 2; at + 4 <= b.size() && b[at] == 0xFF;) {
      const std::size_t length = number(b, at + 2, 2);
      if (b[at + 1] == 0xDA || length < 2) break;  // the pixels begin
      if (b[at + 1] == 0xE1 && is(at + 4, "Exif\0\0", 6)) return at + 10;
      at += 2 + length;
    }
  } else {
    for (std::size_t at = 8; at + 8 <= b.size();) {
      const std::size_t length = number(b, at, 4);
      if (is(at + 4, "eXIf", 4)) return at + 8;
      if (length > b.size()) break;
      at += 12 + length;
    }
  }
  return 0;
}

// How the camera was held: EXIF's orientation, 1 to 8. Phones store photos sideways.
inline int orientation(const std::vector<std::uint8_t>& b) {
  const std::size_t tiff = find_exif(b);
  if (tiff == 0 || tiff >= b.size()) return 1;
  const bool little = b[tiff] == 'I';
  const std::size_t table = tiff + number(b, tiff + 4, 4, little);
  const std::size_t entries = number(b, table, 2, little);
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t entry = table + 2 + 12 * i;
    if (number(b, entry, 2, little) != 0x0112) continue;
    const std::size_t value = number(b, entry + 8, 2, little);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
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
// stb_image before 2.28, which Debian 12 and Ubuntu 22.04 have, writes out of bounds where a JPEG's
// Huffman table has more than 256 symbols. This walk meets every table that stb_image would read.
inline void check_huffman(const std::vector<std::uint8_t>& b, const std::string& path) {
  if (number(b, 0, 2) != 0xFFD8) return;
  for (std::size_t at = 2; at + 4 <= b.size();) {
    const unsigned marker = b[at + 1];
    if (b[at] == 0xFF && marker == 0xD9) return;  // the end
    if (b[at] != 0xFF || marker < 0xC0 || marker == 0xFF || (marker >= 0xD0 && marker < 0xD9)) {
      ++at;  // pixels, or a marker that nothing belongs to
      continue;
    }
    const std::size_t end = at + 2 + std::max<std::size_t>(2, number(b, at + 2, 2));
    for (std::size_t table = at + 4; marker == 0xC4 && table < end;) {
      std::size_t symbols = 0;
      for (std::size_t bits = 1; bits <= 16; ++bits) symbols += number(b, table + bits, 1);
      if (symbols > 256) throw std::runtime_error(path + " has an impossible Huffman table");
      table += 17 + symbols;
    }
    at = end;
  }
}

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
  check_huffman(bytes, path);
  const int size = static_cast<int>(bytes.size());
  int width = 0, height = 0, channels = 0;
  if (!stbi_info_from_memory(bytes.data(), size, &width, &height, &channels)) {
    throw std::runtime_error(path + " is no image that this app reads");
  }
  check_size(width, height, path);
  // With four channels always: an image without alpha may have a transparent colour.
  const std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
      stbi_load_from_memory(bytes.data(), size, &width, &height, &channels, 4), stbi_image_free);
  if (!pixels) {
    throw std::runtime_error(path + " cannot be decoded (" + stbi_failure_reason() + ")");
  }
  return upright(on_white(pixels.get(), width, height), orientation(bytes));
}
#endif

}  // namespace detail

// Throws std::runtime_error, with a message that names the file.
inline Image read_image(const std::string& path) {
  const std::vector<std::uint8_t> bytes = read_file(path, kMostBytes);
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
