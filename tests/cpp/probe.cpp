// Lets a test call the headers of export/cpp one by one; binary results go to a file.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "app.hpp"
#include "decode.hpp"
#include "sha256.hpp"

namespace {

void write(const char* path, const cnnedge::Image& image) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(image.pixels.data()),
             static_cast<std::streamsize>(image.pixels.size()));
  std::cout << image.height << ' ' << image.width << ' ' << image.channels << '\n';
}

void quote(const std::string& text) {
  std::cout << '"';
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, "\\u%04x", byte);
    if (byte < 32 || c == '"' || c == '\\') {
      std::cout << escaped;
    } else {
      std::cout << c;
    }
  }
  std::cout << '"';
}

void dump(const cnnedge::Json& value) {
  using Kind = cnnedge::Json::Kind;
  const char* comma = "";
  switch (value.kind) {
    case Kind::null: std::cout << "null"; break;
    case Kind::boolean: std::cout << (value.truth ? "true" : "false"); break;
    case Kind::number: std::printf("%.17g", value.number); break;
    case Kind::text: quote(value.text); break;
    case Kind::list:
    case Kind::object:
      std::cout << (value.kind == Kind::list ? '[' : '{');
      for (std::size_t i = 0; i < value.items.size(); ++i, comma = ",") {
        std::cout << comma;
        if (value.kind == Kind::object) {
          quote(value.names[i]);
          std::cout << ':';
        }
        dump(value.items[i]);
      }
      std::cout << (value.kind == Kind::list ? ']' : '}');
  }
  std::cout << std::flush;
}

// fit RAW W H HEIGHT WIDTH CHANNELS RESIZE OUT · read FILE OUT · json FILE · sha256 FILE
void probe(int argc, char** words) {
  const std::string what = words[0];
  if (what == "fit" && argc == 9) {
    cnnedge::Image image(std::atoi(words[2]), std::atoi(words[3]), 3);
    image.pixels = cnnedge::read_file(words[1]);
    const cnnedge::Contract contract{std::atoi(words[4]), std::atoi(words[5]), std::atoi(words[6]),
                                     words[7]};
    write(words[8], cnnedge::fit(std::move(image), contract));
  } else if (what == "read" && argc == 3) {
    write(words[2], cnnedge::read_image(words[1]));
  } else if (what == "json" && argc == 2) {
    const std::vector<std::uint8_t> bytes = cnnedge::read_file(words[1]);
    dump(cnnedge::JsonReader::read(std::string(bytes.begin(), bytes.end())));
  } else if (what == "sha256" && argc == 2) {
    std::cout << cnnedge::sha256(cnnedge::read_file(words[1]));
  } else {
    throw std::runtime_error("the probe knows no such thing");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return cnnedge::run(1, argv, 0, "probe", [&](char** words) { probe(argc - 1, words); });
}
