// What both apps share: the contract and the labels, the top 5, errors as one line.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <numeric>

#include "image.hpp"
#include "json.hpp"

namespace cnnedge {

inline Contract read_contract(const Json& fields) {
  Contract contract;
  contract.height = fields["height"].whole();
  contract.width = fields["width"].whole();
  contract.channels = fields["channels"].whole();
  contract.resize = fields["resize"].as(Json::Kind::text, "a resize").text;
  const bool sane = contract.height > 0 && contract.width > 0 && contract.height <= 1 << 14 &&
                    contract.width <= 1 << 14 && (contract.channels == 1 || contract.channels == 3);
  if (!sane) throw std::runtime_error("the image contract names an impossible size");
  return contract;
}

inline std::vector<std::string> read_labels(const Json& fields) {
  std::vector<std::string> labels;
  for (const Json& label : fields.as(Json::Kind::list, "a list of labels").items) {
    labels.push_back(label.as(Json::Kind::text, "a label").text);
  }
  return labels;
}

// Prints the likeliest labels, the likeliest first: probability, label.
inline void print_top(const float* probabilities, const std::vector<std::string>& labels,
                      std::size_t count = 5) {
  if (std::any_of(probabilities, probabilities + labels.size(),
                  [](float p) { return !std::isfinite(p); })) {
    throw std::runtime_error("the model answers with NaN or infinity: take another variant of it");
  }
  std::vector<std::size_t> order(labels.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return probabilities[a] > probabilities[b];
  });
  order.resize(std::min(count, order.size()));
  for (const std::size_t i : order) {
    std::printf("%.6f  %s\n", static_cast<double>(probabilities[i]), labels[i].c_str());
  }
}

// Runs the app: 0 done, 1 failed with one line on stderr, 2 wrong usage.
template <typename Work>
int run(int argc, char** argv, int arguments, const char* usage, Work work) {
  if (argc != arguments + 1) {
    std::fprintf(stderr, "usage: %s\n", usage);
    return 2;
  }
  try {
    work(argv + 1);
    return 0;
  } catch (const std::exception& error) {
    std::string line = error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::fprintf(stderr, "error: %s\n", line.c_str());
    return 1;
  }
}

}  // namespace cnnedge
