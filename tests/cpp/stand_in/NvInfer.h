// Stands in for TensorRT's runtime: the names, types and qualifiers of NvInferRuntime.h (10.3 to
// 11) that the app uses. A plan is a line of text, "HEIGHT WIDTH CHANNELS CLASSES TYPE"; running it
// writes the image that lies in the device's memory to $STAND_IN_SEEN and answers i / 100 for the
// class i, the last one taking the rest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

struct Dims {
  static constexpr std::int32_t MAX_DIMS{8};
  std::int32_t nbDims;
  std::int64_t d[MAX_DIMS];
};
enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kUINT8 = 5 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, char const* msg) noexcept = 0;
  virtual ~ILogger() = default;
};

struct StandInPlan {
  std::int64_t height = 0, width = 0, channels = 0, classes = 0;
  std::string type;
};

class IExecutionContext {
 public:
  explicit IExecutionContext(StandInPlan plan) : plan_(plan) { ++stand_in::device().held; }
  virtual ~IExecutionContext() noexcept { --stand_in::device().held; }
  bool setInputShape(char const* name, Dims const& dims) noexcept {
    batch_ = dims.d[0];
    return std::string(name) == "image" && dims.nbDims == 4 && batch_ == 1;
  }
  bool setTensorAddress(char const* name, void* data) noexcept {
    addresses_[name] = data;
    return true;
  }
  bool enqueueV3(cudaStream_t) noexcept {
    if (stand_in::fails("enqueueV3") || batch_ != 1 || addresses_.size() != 2) return false;
    stand_in::device().pending.push_back([plan = plan_, addresses = addresses_] {
      const auto bytes = plan.height * plan.width * plan.channels;
      std::ofstream(std::getenv("STAND_IN_SEEN"), std::ios::binary)
          .write(static_cast<const char*>(addresses.at("image")), bytes);
      float* answers = static_cast<float*>(addresses.at("probabilities"));
      float rest = 1.0f;
      for (std::int64_t i = 0; i + 1 < plan.classes; ++i) {
        answers[i] = static_cast<float>(i) / 100.0f;
        rest -= answers[i];
      }
      answers[plan.classes - 1] = stand_in::fails("NaN") ? std::nanf("") : rest;
    });
    return true;
  }

 private:
  StandInPlan plan_;
  std::int64_t batch_ = 0;
  std::map<std::string, void*> addresses_;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(StandInPlan plan) : plan_(plan) { ++stand_in::device().held; }
  virtual ~ICudaEngine() noexcept { --stand_in::device().held; }
  Dims getTensorShape(char const* name) const noexcept {
    if (std::string(name) == "image") {
      return Dims{4, {-1, plan_.height, plan_.width, plan_.channels}};
    }
    return Dims{2, {-1, plan_.classes}};
  }
  DataType getTensorDataType(char const* name) const noexcept {
    const bool image = std::string(name) == "image";
    return image && plan_.type == "uint8" ? DataType::kUINT8 : DataType::kFLOAT;
  }
  TensorIOMode getTensorIOMode(char const* name) const noexcept {
    return std::string(name) == "image" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext(plan_); }

 private:
  StandInPlan plan_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& logger) : logger_(logger) { ++stand_in::device().held; }
  virtual ~IRuntime() noexcept { --stand_in::device().held; }
  void setEngineHostCodeAllowed(bool allowed) noexcept { trusts_ = allowed; }
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
    std::istringstream text(std::string(static_cast<const char*>(blob), size));
    StandInPlan plan;
    std::string lean;
    text >> plan.height >> plan.width >> plan.channels >> plan.classes >> plan.type >> lean;
    if (plan.type.empty() || (lean == "lean" && !trusts_)) {
      logger_.log(ILogger::Severity::kERROR, "Serialization assertion failed");
      return nullptr;
    }
    return new ICudaEngine(plan);
  }

 private:
  ILogger& logger_;
  bool trusts_ = false;
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1
