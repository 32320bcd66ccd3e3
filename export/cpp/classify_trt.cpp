// A plan of a bundle on TensorRT or TensorRT-RTX: classify_trt BUNDLE PLAN IMAGE
//
// PLAN is one of BUNDLE/engines, or what build_plans.py made on a Jetson; its note, the .json beside
// it, must be there. Written for the API of TensorRT 10, of which 11 and TensorRT-RTX kept these calls.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "app.hpp"
#include "decode.hpp"
#include "sha256.hpp"

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Memory on the GPU; freed when it goes out of scope.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreate(&stream_), "cudaStreamCreate"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Keeps TensorRT's last error for our one line. It may log from several threads.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = message;
  }
  std::string reason() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_.empty() ? "" : " (" + last_ + ")";
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

cnnedge::Json read_json(const std::string& path) {
  const std::vector<std::uint8_t> bytes = cnnedge::read_file(path);
  try {
    return cnnedge::JsonReader::read(std::string(bytes.begin(), bytes.end()));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}

std::string note_of(const std::string& plan) {
  const std::size_t dot = plan.rfind(".plan");
  if (dot == std::string::npos || dot + 5 != plan.size()) {
    throw std::runtime_error(plan + " does not end in .plan");
  }
  return plan.substr(0, dot) + ".json";
}

void classify(char** arguments) {
  // Once, at the app's start:
  const std::string bundle = arguments[0], path = arguments[1];
  const cnnedge::Json manifest = read_json(bundle + "/manifest.json");
  const cnnedge::Contract contract = cnnedge::read_contract(manifest["image"]);
  const std::vector<std::string> labels = cnnedge::read_labels(manifest["labels"]);
  const cnnedge::Json note = read_json(note_of(path));
  const std::vector<std::uint8_t> plan = cnnedge::read_file(path);
  // A plan is machine code: nothing is loaded but what was built.
  if (cnnedge::sha256(plan) != note["sha256"].text) {
    throw std::runtime_error(path + " was altered or cut short: build it again");
  }
  const cnnedge::Json& options = note["options"];
  if (const cnnedge::Json* strip = options.find("strip_weights"); strip && strip->truth) {
    throw std::runtime_error(path + " holds no weights, which this app cannot put back: build it "
                                    "without --strip-weights");
  }
  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) throw std::runtime_error("TensorRT cannot start" + logger.reason());
  if (const cnnedge::Json* lean = options.find("version_compatible"); lean && lean->truth) {
    runtime->setEngineHostCodeAllowed(true);  // such a plan brings its own runtime along
  }
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) {
    throw std::runtime_error(path + " does not fit this GPU or this TensorRT: build it here" +
                             logger.reason());
  }
  if (engine->getTensorIOMode("image") != nvinfer1::TensorIOMode::kINPUT ||
      engine->getTensorDataType("image") != nvinfer1::DataType::kUINT8 ||
      engine->getTensorDataType("probabilities") != nvinfer1::DataType::kFLOAT) {
    throw std::runtime_error(path + " takes no uint8 image: export without --input float32");
  }
  const nvinfer1::Dims takes = engine->getTensorShape("image");
  const nvinfer1::Dims gives = engine->getTensorShape("probabilities");
  if (takes.nbDims != 4 || takes.d[1] != contract.height || takes.d[2] != contract.width ||
      takes.d[3] != contract.channels || gives.nbDims != 2 ||
      gives.d[1] != static_cast<std::int64_t>(labels.size())) {
    throw std::runtime_error(path + " was not built from " + bundle);
  }
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  if (!context) throw std::runtime_error("no memory to run " + path + logger.reason());
  const Stream stream;
  std::vector<float> answers(labels.size());
  const std::size_t bytes = answers.size() * sizeof(float);
  const DeviceBuffer output(bytes);
  const DeviceBuffer input(static_cast<std::size_t>(contract.height) *
                           static_cast<std::size_t>(contract.width) *
                           static_cast<std::size_t>(contract.channels));
  nvinfer1::Dims one = takes;
  one.d[0] = 1;
  if (!context->setInputShape("image", one) || !context->setTensorAddress("image", input.get()) ||
      !context->setTensorAddress("probabilities", output.get())) {
    throw std::runtime_error(path + " takes no single image" + logger.reason());
  }

  // For each image:
  const cnnedge::Image image = cnnedge::fit(cnnedge::read_image(arguments[2]), contract);
  check(cudaMemcpyAsync(input.get(), image.pixels.data(), image.pixels.size(),
                        cudaMemcpyHostToDevice, stream.get()),
        "copying the image to the GPU");
  if (!context->enqueueV3(stream.get())) {
    throw std::runtime_error("TensorRT cannot run " + path + logger.reason());
  }
  check(cudaMemcpyAsync(answers.data(), output.get(), bytes, cudaMemcpyDeviceToHost, stream.get()),
        "copying the answers from the GPU");
  check(cudaStreamSynchronize(stream.get()), "running the plan");
  cnnedge::print_top(answers.data(), labels);
}

}  // namespace

int main(int argc, char** argv) {
  return cnnedge::run(argc, argv, 3, "classify_trt BUNDLE PLAN IMAGE", classify);
}
