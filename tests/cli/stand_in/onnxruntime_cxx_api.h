// The part of ONNX Runtime's C++ API that a packaged example uses, for machines that have the
// library (it is in the Python wheel) and no headers. The C functions are called by their places
// in the table of the stable C ABI, so what runs is the real library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
};
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

struct OrtApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

namespace Ort {

using Handle = void*;

template <class Result, class... Arguments>
Result slot(size_t place, Arguments... arguments) {
  static const void* const* const api =
      static_cast<const void* const*>(OrtGetApiBase()->GetApi(21));
  return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[place]))(arguments...);
}

enum Slot : size_t {
  GetErrorMessage = 2,
  CreateEnv = 3,
  CreateSession = 7,
  Run = 9,
  CreateSessionOptions = 10,
  SetIntraOpNumThreads = 24,
  CreateTensorWithDataAsOrtValue = 49,
  GetTensorMutableData = 51,
  CreateCpuMemoryInfo = 69,
  ReleaseEnv = 92,
  ReleaseMemoryInfo = 94,
  ReleaseSession = 95,
  ReleaseValue = 96,
  ReleaseSessionOptions = 100,
  AddSessionConfigEntry = 130,
};

template <class... Arguments>
void call(Slot place, Arguments... arguments) {
  if (Handle status = slot<Handle>(place, arguments...))
    throw std::runtime_error(slot<const char*>(GetErrorMessage, status));
}

template <Slot release>
struct Owned {
  Handle handle = nullptr;
  Owned() = default;
  Owned(Owned&& other) noexcept : handle(std::exchange(other.handle, nullptr)) {}
  Owned(const Owned&) = delete;
  ~Owned() {
    if (handle) slot<void>(release, handle);
  }
};

struct Env : Owned<ReleaseEnv> {
  Env(OrtLoggingLevel level, const char* name) { call(CreateEnv, int(level), name, &handle); }
};

struct SessionOptions : Owned<ReleaseSessionOptions> {
  SessionOptions() { call(CreateSessionOptions, &handle); }
  SessionOptions& SetIntraOpNumThreads(int count) {
    call(Slot::SetIntraOpNumThreads, handle, count);
    return *this;
  }
  SessionOptions& AddConfigEntry(const char* key, const char* value) {
    call(AddSessionConfigEntry, handle, key, value);
    return *this;
  }
};

struct MemoryInfo : Owned<ReleaseMemoryInfo> {
  static MemoryInfo CreateCpu(OrtAllocatorType allocator, OrtMemType type) {
    MemoryInfo made;
    call(CreateCpuMemoryInfo, int(allocator), int(type), &made.handle);
    return made;
  }
};

struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};

struct Value : Owned<ReleaseValue> {
  static Value CreateTensor(const MemoryInfo& memory, void* data, size_t bytes,
                            const int64_t* shape, size_t rank, ONNXTensorElementDataType type) {
    Value made;
    call(CreateTensorWithDataAsOrtValue, memory.handle, data, bytes, shape, rank, int(type),
         &made.handle);
    return made;
  }
  template <class T>
  T* GetTensorMutableData() {
    void* data = nullptr;
    call(Slot::GetTensorMutableData, handle, &data);
    return static_cast<T*>(data);
  }
};

struct Session : Owned<ReleaseSession> {
  Session(const Env& env, const char* path, const SessionOptions& options) {
    call(CreateSession, env.handle, path, options.handle, &handle);
  }
  std::vector<Value> Run(const RunOptions&, const char* const* names, const Value* values,
                         size_t count, const char* const* outputs, size_t output_count) {
    std::vector<Handle> given, made(output_count);
    for (size_t k = 0; k < count; ++k) given.push_back(values[k].handle);
    call(Slot::Run, handle, Handle(nullptr), names, given.data(), count, outputs, output_count,
         made.data());
    std::vector<Value> results(output_count);
    for (size_t k = 0; k < output_count; ++k) results[k].handle = made[k];
    return results;
  }
};

}  // namespace Ort
