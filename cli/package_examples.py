"""Programs that load a packaged model: written beside it, to be compiled or copied from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

if TYPE_CHECKING:
    from collections.abc import Iterable

    from octavo.ir.package_io import Package, PackedTensor

PYTHON_FILE, CPP_FILE = "load.py", "load.cpp"

PYTHON = '''\
"""Loads the model, runs the stored probe and compares: needs numpy and onnxruntime."""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime

folder = Path(__file__).resolve().parent
package = json.loads((folder / "package.json").read_text(encoding="utf-8"))


def array(tensor):
    return np.fromfile(folder / tensor["file"], tensor["dtype"]).reshape(tensor["shape"])


options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for key, value in package["session_options"].items():
    options.add_session_config_entry(key, value)
begin = time.perf_counter()
session = onnxruntime.InferenceSession(
    folder / package["model"], options, providers=["CPUExecutionProvider"]
)
loaded = time.perf_counter()
names = [tensor["name"] for tensor in package["outputs"]]
results = session.run(names, {t["name"]: array(t) for t in package["inputs"]})
ran = time.perf_counter()
print(f"loaded in {(loaded - begin) * 1e3:.2f} ms, first run {(ran - loaded) * 1e3:.2f} ms")
for tensor, actual in zip(package["outputs"], results):
    expected = array(tensor).astype(np.float64)
    difference = np.abs(actual - expected).max(initial=0.0)
    print(f"{tensor['name']}: largest difference {difference:g}")
    if not difference <= 0.01 * np.abs(expected).max(initial=0.0):
        raise SystemExit("the outputs are not those that were proved")
'''

_CPP = r"""// Loads the model, runs the stored probe and compares. From this folder:
//   g++ -std=c++17 -O2 load.cpp -I INCLUDE -L LIB -lonnxruntime -o load && ./load .
// INCLUDE and LIB are those of an ONNX Runtime release, or of the reduced build of package.json.
#include <onnxruntime_cxx_api.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Tensor {
  const char* name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
  size_t bytes;
  const char* file;
};

static const std::vector<Tensor> inputs = {@INPUTS@};
static const std::vector<Tensor> outputs = {@OUTPUTS@};
static const std::vector<std::pair<const char*, const char*>> session_options = {@OPTIONS@};

static std::vector<char> read(const std::string& path, size_t bytes) {
  std::vector<char> data(bytes + 1);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(data.data(), static_cast<std::streamsize>(bytes)))
    throw std::runtime_error("cannot read " + path);
  return data;
}

static bool same(const Tensor& tensor, const void* actual, const void* expected) {
  if (tensor.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
    return std::memcmp(actual, expected, tensor.bytes) == 0;
  const float* a = static_cast<const float*>(actual);
  const float* b = static_cast<const float*>(expected);
  float difference = 0, largest = 0;
  for (size_t k = 0; k < tensor.bytes / sizeof(float); ++k) {
    difference = std::fmax(difference, std::fabs(a[k] - b[k]));
    largest = std::fmax(largest, std::fabs(b[k]));
  }
  std::printf("%s: largest difference %g\n", tensor.name, difference);
  return difference <= 0.01f * largest;
}

static double milliseconds(std::chrono::steady_clock::time_point begin) {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double, std::milli>(clock::now() - begin).count();
}

int main(int count, char** arguments) try {
  const std::string folder = std::string(count > 1 ? arguments[1] : ".") + "/";
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "load");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  for (const auto& option : session_options) options.AddConfigEntry(option.first, option.second);
  auto begin = std::chrono::steady_clock::now();
  Ort::Session session(env, (folder + "@MODEL@").c_str(), options);
  std::printf("loaded in %.2f ms\n", milliseconds(begin));

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::vector<char>> data;
  std::vector<Ort::Value> values;
  std::vector<const char*> input_names, output_names;
  for (const Tensor& tensor : inputs) {
    data.push_back(read(folder + tensor.file, tensor.bytes));
    values.push_back(Ort::Value::CreateTensor(memory, data.back().data(), tensor.bytes,
                                              tensor.shape.data(), tensor.shape.size(),
                                              tensor.type));
    input_names.push_back(tensor.name);
  }
  for (const Tensor& tensor : outputs) output_names.push_back(tensor.name);

  begin = std::chrono::steady_clock::now();
  auto results = session.Run(Ort::RunOptions{nullptr}, input_names.data(), values.data(),
                             values.size(), output_names.data(), output_names.size());
  std::printf("first run %.2f ms\n", milliseconds(begin));
  for (size_t k = 0; k < outputs.size(); ++k) {
    const auto expected = read(folder + outputs[k].file, outputs[k].bytes);
    if (!same(outputs[k], results[k].GetTensorMutableData<char>(), expected.data())) {
      std::fprintf(stderr, "%s is not what was proved\n", outputs[k].name);
      return 1;
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
"""


def cpp(package: Package) -> str:
    """A C++17 program for ONNX Runtime's C++ API that runs the probe of a package."""
    options = [f"{{{_quoted(k)}, {_quoted(v)}}}" for k, v in package.session_options.items()]
    return (
        _CPP.replace("@INPUTS@", _listed(map(_tensor, package.inputs)))
        .replace("@OUTPUTS@", _listed(map(_tensor, package.outputs)))
        .replace("@OPTIONS@", _listed(options))
        .replace("@MODEL@", package.model)
    )


def _tensor(tensor: PackedTensor) -> str:
    dtype = np.dtype(tensor.dtype)
    element = f"ONNX_TENSOR_ELEMENT_DATA_TYPE_{onnx_ir.DataType.from_numpy(dtype).name}"
    shape = ", ".join(map(str, tensor.shape))
    size = int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
    return f"{{{_quoted(tensor.name)}, {element}, {{{shape}}}, {size}, {_quoted(tensor.file)}}}"


def _listed(items: Iterable[str]) -> str:
    lines = [f"\n    {item}," for item in items]
    return "".join([*lines, "\n"]) if lines else ""


def _quoted(text: str) -> str:
    """A C string literal; octal escapes, which end after three digits whatever follows."""
    safe = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
        for byte in text.encode()
    )
    return f'"{"".join(safe)}"'
