// The images of Fashion-MNIST, all in memory, and a small convolutional network for them.
#pragma once

#include <torch/torch.h>
#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fashion_mnist {

/// One IDX file of bytes, plain or with .gz: two zero bytes, 8, the number of dimensions, each dimension, the values.
inline torch::Tensor read_idx(const std::string& name) {
  const std::string path = "/usr/share/datasets/fashion-mnist/" + name + ".gz";  // of the package dataset-fashion-mnist
  const gzFile file = gzopen(path.c_str(), "rb");
  if (file == nullptr) throw std::runtime_error("cannot read " + path + "; install dataset-fashion-mnist");
  const auto read = [&](void* place, std::int64_t bytes) {
    if (gzread(file, place, static_cast<unsigned>(bytes)) != bytes) throw std::runtime_error(path + " is too short");
  };
  std::uint8_t head[4];
  read(head, 4);
  std::vector<std::int64_t> shape(head[3]);
  for (std::int64_t& size : shape) {
    std::uint8_t bytes[4];
    read(bytes, 4);
    size = bytes[0] << 24 | bytes[1] << 16 | bytes[2] << 8 | bytes[3];
  }
  torch::Tensor values = torch::empty(shape, torch::kUInt8);
  read(values.data_ptr(), values.numel());
  gzclose(file);
  return values;
}

/// Part "train" or "t10k"; at most `limit` of its images.
class Images : public torch::data::datasets::BatchDataset<Images, torch::data::Example<>> {
 public:
  Images(const std::string& part, std::int64_t limit)
      : images_(read_idx(part + "-images-idx3-ubyte").unsqueeze(1).slice(0, 0, limit)),
        labels_(read_idx(part + "-labels-idx1-ubyte").to(torch::kInt64).slice(0, 0, limit)) {}

  torch::data::Example<> get_batch(c10::ArrayRef<std::size_t> indices) override {
    const torch::Tensor chosen = torch::tensor(std::vector<std::int64_t>(indices.begin(), indices.end()));
    // Mean and deviation of the pixels.
    return {(images_.index_select(0, chosen).to(torch::kFloat32) - 73.0) / 90.0, labels_.index_select(0, chosen)};
  }
  c10::optional<std::size_t> size() const override { return static_cast<std::size_t>(labels_.size(0)); }

 private:
  torch::Tensor images_, labels_;
};

inline torch::nn::Sequential make_network() {
  using namespace torch::nn;
  return Sequential(Conv2d(Conv2dOptions(1, 16, 3).padding(1)), ReLU(), MaxPool2d(2),
                    Conv2d(Conv2dOptions(16, 32, 3).padding(1)), ReLU(), MaxPool2d(2), Flatten(),
                    Linear(32 * 7 * 7, 128), ReLU(), Linear(128, 10));
}

/// The share of images whose label the network finds.
inline double accuracy(torch::nn::Sequential& network, const Images& images) {
  const torch::NoGradGuard no_grad;
  double right = 0;
  auto loader = torch::data::make_data_loader(images, torch::data::samplers::SequentialSampler(*images.size()), 500);
  for (const auto& batch : *loader) {
    right += network->forward(batch.data).argmax(1).eq(batch.target).sum().item<double>();
  }
  return right / static_cast<double>(*images.size());
}

}  // namespace fashion_mnist
