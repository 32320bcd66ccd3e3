// Stands in for the CUDA runtime: a device whose memory is the host's, whose stream works only
// when it is waited for, and which tells at the end what was not given back.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
typedef struct CUstream_st* cudaStream_t;

namespace stand_in {

struct Device {
  std::vector<std::function<void()>> pending;
  int held = 0;
  ~Device() {
    if (held || !pending.empty()) std::fprintf(stderr, "the device was left with %d\n", held);
  }
};
inline Device& device() {
  static Device one;
  return one;
}
inline bool fails(const char* what) {
  const char* chosen = std::getenv("STAND_IN_FAILS");
  return chosen && !std::strcmp(chosen, what);
}

}  // namespace stand_in

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "out of memory";
}
inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  if (stand_in::fails("cudaMalloc")) return cudaErrorMemoryAllocation;
  *data = std::malloc(bytes);
  ++stand_in::device().held;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  for (const auto& work : stand_in::device().pending) work();
  stand_in::device().pending.clear();
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {  // waits for what was begun, as CUDA's does
  cudaStreamSynchronize(nullptr);
  if (data) --stand_in::device().held;
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(&stand_in::device());
  ++stand_in::device().held;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) {
  --stand_in::device().held;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t) {
  const auto* first = static_cast<const char*>(from);
  if (kind == cudaMemcpyHostToDevice) {  // CUDA too takes pageable memory before it returns
    stand_in::device().pending.push_back(
        [to, taken = std::vector<char>(first, first + bytes)] {
          std::memcpy(to, taken.data(), taken.size());
        });
  } else {
    stand_in::device().pending.push_back([=] { std::memcpy(to, from, bytes); });
  }
  return cudaSuccess;
}
