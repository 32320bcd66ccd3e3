// An ONNX file of a bundle on ONNX Runtime: classify_ort MODEL.onnx IMAGE
//
// The file is all it needs: the labels and what the image must become are in its metadata.
#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <filesystem>

#include "app.hpp"
#include "decode.hpp"

namespace {

cnnedge::Json metadata(const Ort::Session& session, const char* key) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto found = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
  if (!found) {
    throw std::runtime_error(std::string("the model's metadata has no ") + key +
                             ": give a model that cnnedge exported");
  }
  return cnnedge::JsonReader::read(found.get());
}

void classify(char** arguments) {
  const std::filesystem::path model(arguments[0]);
  if (!std::filesystem::is_regular_file(model)) {
    throw std::runtime_error("there is no model " + model.string());
  }
  if (!OrtGetApiBase()->GetApi(ORT_API_VERSION)) {  // every call would go through a null pointer
    throw std::runtime_error(std::string("this app was built for a later ONNX Runtime than the ") +
                             OrtGetApiBase()->GetVersionString() + " that is installed");
  }
  // Once, at the app's start. ONNX Runtime sends telemetry unless this is set before:
#ifdef _WIN32
  if (!std::getenv("ORT_DISABLE_TELEMETRY")) _putenv_s("ORT_DISABLE_TELEMETRY", "1");
#else
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // who has set it keeps his choice
#endif
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "classify");  // errors come as exceptions
  Ort::Session session(env, model.c_str(), Ort::SessionOptions());
  const cnnedge::Contract contract =
      cnnedge::read_contract(metadata(session, "cnnedge.image"));
  const std::vector<std::string> labels =
      cnnedge::read_labels(metadata(session, "cnnedge.labels"));
  const auto input = session.GetInputTypeInfo(0);
  if (input.GetONNXType() != ONNX_TYPE_TENSOR ||
      input.GetTensorTypeAndShapeInfo().GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
    throw std::runtime_error(model.string() +
                             " takes no uint8 image: export it without --input float32");
  }

  // For each image:
  cnnedge::Image image = cnnedge::fit(cnnedge::read_image(arguments[1]), contract);
  const std::int64_t shape[] = {1, image.height, image.width, image.channels};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value tensor = Ort::Value::CreateTensor<std::uint8_t>(
      memory, image.pixels.data(), image.pixels.size(), shape, 4);
  const char* inputs[] = {"image"};
  const char* outputs[] = {"probabilities"};
  const std::vector<Ort::Value> answers =
      session.Run(Ort::RunOptions(), inputs, &tensor, 1, outputs, 1);
  const auto given = answers[0].GetTensorTypeAndShapeInfo();
  if (given.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ||
      given.GetElementCount() != labels.size()) {
    throw std::runtime_error(model.string() + " has not one float for each label");
  }
  cnnedge::print_top(answers[0].GetTensorData<float>(), labels);
}

}  // namespace

int main(int argc, char** argv) {
  return cnnedge::run(argc, argv, 2, "classify_ort MODEL.onnx IMAGE", classify);
}
