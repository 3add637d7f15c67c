#include "sampler.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <mutex>
#include <set>
#include <sstream>

#include "metadata.h"
#include "noise.h"
#include "refusal.h"

namespace gentron {
namespace {

using at::Tensor;
using TensorList = std::vector<Tensor>;

template <class T>
std::string text_of(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

// The instruction sets of this CPU, as Linux names them.
std::set<std::string> cpu_flags() {
  std::ifstream info("/proc/cpuinfo");
  std::string line;
  while (std::getline(info, line)) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;  // x86, Arm
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

// "9.0" by the driver, which any process with a CUDA device has.
std::string cuda_capability(int index) {
  using Init = int (*)(unsigned);
  using Attribute = int (*)(int*, int, int);
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return "";
  const auto init = reinterpret_cast<Init>(dlsym(driver, "cuInit"));
  const auto attribute = reinterpret_cast<Attribute>(dlsym(driver, "cuDeviceGetAttribute"));
  constexpr int kMajor = 75, kMinor = 76;
  int major = 0, minor = 0;
  if (init == nullptr || attribute == nullptr || init(0) != 0 ||
      attribute(&major, kMajor, index) != 0 || attribute(&minor, kMinor, index) != 0) {
    return "";
  }
  return std::to_string(major) + "." + std::to_string(minor);
}

at::Device choose_device(const std::string& made_for, const std::string& asked) {
  at::Device device(asked.empty() ? made_for : asked);
  if (device.str().rfind(made_for, 0) != 0) {
    refuse("the compiled sampler was made for " + made_for + ", not for " + asked);
  }
  if (device.is_cuda()) {
    if (!at::hasCUDA()) refuse("the compiled sampler was made for cuda, and there is none here");
    if (!device.has_index()) device.set_index(0);
    const auto devices = static_cast<int>(at::getNumGPUs());
    if (device.index() >= devices) {
      refuse("there is no " + device.str() + " here: it has " + std::to_string(devices));
    }
  }
  return device;
}

void check_machine(const Metadata& metadata, const at::Device& device) {
  // Of the libtorch that is loaded, not of the one this was built with: major and minor are the
  // two upper bytes.
  const uint64_t loaded = aoti_torch_abi_version();
  const std::string version =
      std::to_string(loaded >> 56) + "." + std::to_string(loaded >> 48 & 0xFF);
  if (metadata.torch != version) {
    refuse(
        "the compiled sampler was made with torch " + metadata.torch +
        ", this is torch " + version);
  }
  utsname machine{};
  uname(&machine);
  if (metadata.machine != machine.machine) {
    refuse(
        "the compiled sampler was made for " + metadata.machine + ", this is " +
        machine.machine);
  }
  const std::set<std::string> here = cpu_flags();
  for (const std::string& flag : metadata.cpu_flags) {
    if (here.count(flag) == 0) {
      refuse("the compiled sampler was made for a CPU with " + flag + ", this has none");
    }
  }
  if (device.is_cuda()) {
    const std::string capability = cuda_capability(device.index());
    if (metadata.capability != capability) {
      refuse(
          "the compiled sampler was made for compute capability " + metadata.capability +
          ", this is " + capability);
    }
  }
}

// A folder of our own in TMPDIR that is gone when this is. Code is loaded from it, and unpacked
// beside it by torch.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(int64_t bytes) {
    const char* set = std::getenv("TMPDIR");
    const std::string root = set != nullptr && *set != '\0' ? set : "/tmp";
    std::string name = root + "/gentron-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) {
      refuse("cannot write into TMPDIR, " + root + ": " + std::strerror(errno));
    }
    path_ = name;
    struct statvfs system {};
    if (statvfs(root.c_str(), &system) != 0) return;
    if (system.f_flag & ST_NOEXEC) {
      fail("TMPDIR, " + root + ", is mounted noexec, so that no code can be loaded from it");
    }
    const auto free = static_cast<int64_t>(system.f_bavail * system.f_frsize);
    if (free < bytes) {
      fail(
          "TMPDIR, " + root + ", has " + std::to_string(free >> 20) + " MiB free, loading takes " +
          std::to_string((bytes >> 20) + 1));
    }
  }
  ~TemporaryFolder() { remove(); }
  TemporaryFolder(const TemporaryFolder&) = delete;

  std::string write(const std::string& name, const Tensor& bytes) const {
    const std::filesystem::path path = path_ / name;
    std::ofstream out(path, std::ios::binary);
    out.write(static_cast<const char*>(bytes.const_data_ptr()), bytes.numel());
    out.close();
    if (!out) refuse("cannot write into TMPDIR: " + path.string());
    return path.string();
  }

 private:
  void remove() const {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[noreturn]] void fail(const std::string& message) const {
    remove();
    refuse(message);
  }

  std::filesystem::path path_;
};

using Loader = torch::inductor::AOTIModelPackageLoader;

// The code of a graph, loaded once in a process: its library stays mapped to the end, whatever is
// closed, since g++ makes static variables of inline functions unique symbols, which pin it. The
// weights are inputs, so that nothing else is kept. `digest` is of the file that `write` makes.
std::shared_ptr<Loader> load_code(
    const std::string& digest, const at::Device& device,
    const std::function<std::string()>& write) {
  static std::mutex loading;
  static std::map<std::string, std::shared_ptr<Loader>> loaded;
  const std::lock_guard<std::mutex> lock(loading);
  std::shared_ptr<Loader>& own = loaded[digest + device.str()];
  if (!own) {
    own = std::make_shared<Loader>(
        write(), "model", false, 1, device.is_cuda() ? device.index() : -1);
  }
  return own;
}

// A compiled graph. Its weights are inputs behind the others, so that graphs and blocks share one
// copy; `weights` holds one list, or one a block.
struct Graph {
  std::string name;
  std::vector<TensorKind> kinds;
  std::shared_ptr<Loader> loader;
  std::vector<TensorList> weights;

  TensorList operator()(TensorList inputs, int64_t block = 0) const {
    const TensorList& own = weights.at(block);
    // The code goes by the shapes and strides of the examples, all contiguous, and checks none.
    if (inputs.size() != kinds.size()) {
      refuse(
          "graph " + name + " takes " + std::to_string(kinds.size()) + " tensors, not " +
          std::to_string(inputs.size()));
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs[i] = inputs[i].contiguous();
      if (!kinds[i].fits(inputs[i])) {
        refuse(
            "graph " + name + " takes " + kinds[i].text() + ", not " +
            c10::toString(inputs[i].scalar_type()) + " " + text_of(inputs[i].sizes()));
      }
    }
    inputs.insert(inputs.end(), own.begin(), own.end());
    return loader->boxed_run(std::move(inputs));
  }
};

// The branches of a step: ε(∅,∅), ε(∅,c_M), ε(c_T,c_M), "1" where one runs.
int64_t count(const std::string& branches) {
  return std::count(branches.begin(), branches.end(), '1');
}

// (S, B) fp64 of a scale in any of its forms.
Tensor per_step(const Tensor& scale, double otherwise, int64_t steps, int64_t batch,
                const char* name) {
  if (!scale.defined()) return at::full({steps, batch}, otherwise, at::kDouble);
  const auto sizes = scale.sizes().vec();
  const bool fits = sizes.empty() || sizes == std::vector<int64_t>{1} ||
      sizes == std::vector<int64_t>{batch} || sizes == std::vector<int64_t>{steps, 1} ||
      sizes == std::vector<int64_t>{steps, batch};
  if (!fits) {
    refuse(
        std::string(name) + " must be a number, (" + std::to_string(batch) + ",) or (" +
        std::to_string(steps) + ", " + std::to_string(batch) + "), got " + text_of(scale.sizes()));
  }
  const Tensor wide = scale.to(at::kCPU, at::kDouble);
  if (!wide.isfinite().all().item<bool>()) refuse(std::string(name) + " must be a finite number");
  return wide.expand({steps, batch});
}

// Numbers that are none would become black frames.
[[noreturn]] void refuse_not_finite(const std::string& what) {
  refuse(
      what + " are not finite: the weights are damaged, or their numbers go beyond the dtype that "
      "the compiled sampler was made with");
}

// The rows of a table (S, ...), none of one that is not there.
TensorList by_step(const Tensor& table, const at::Device& device) {
  TensorList rows;
  if (!table.defined()) return rows;
  for (const Tensor& row : table.to(device).unbind()) {
    rows.push_back(row.clone(at::MemoryFormat::Contiguous));
  }
  return rows;
}

}  // namespace

struct Sampler::Parts : Metadata {
  Package package;
  at::Device device = at::kCPU;
  Tensors weights;
  std::map<std::string, Graph> compiled;
  mutable std::mutex busy;

  void load(const std::string& path, const std::string& pinned, const std::string& asked);
  void load_graphs();
  const Graph& graph(const std::string& name) const;

  TextCondition prepared(TextCondition text, int64_t batch, const char* name) const;
  TextCondition null_text() const;
  // Of every block: keys, biases and values where the text is folded, else keys, values and mask.
  std::vector<TensorList> contexts(const TextCondition& text, bool folds) const;
  bool folds(const TextCondition& text, const std::string& encoder) const;
  Tensor latents_of(const Request& request, uint32_t step) const;
  Tensor sample(const Request& request) const;
};

void Sampler::Parts::load(
    const std::string& path, const std::string& pinned, const std::string& asked) {
  package = Package::read(path, pinned);
  static_cast<Metadata&>(*this) = Metadata::read(package.metadata());
  device = choose_device(made_for, asked);
  check_machine(*this, device);
  timesteps = timesteps.to(device);

  weights = package.tensors("weights.safetensors");
  package.drop("weights.safetensors");
  for (auto& [key, tensor] : weights) tensor = tensor.to(device);
  load_graphs();
}

void Sampler::Parts::load_graphs() {
  int64_t bytes = 0;
  for (const auto& [name, kind] : graphs) bytes += package.section("graphs/" + name).numel();
  const TemporaryFolder folder(2 * bytes);  // packed and unpacked
  for (const auto& [name, kind] : graphs) {
    const std::string section = "graphs/" + name;
    Graph& graph = compiled[name];
    graph.name = name;
    graph.kinds = kind.inputs;
    graph.weights = weights_of(name, weights);
    try {
      graph.loader = load_code(package.digest(section), device, [&] {
        return folder.write(name + ".pt2", package.section(section));
      });
    } catch (const std::invalid_argument&) {
      throw;
    } catch (const std::exception& error) {  // torch's own, with a backtrace below it
      const std::string words = error.what();
      refuse(
          "graph " + name + " cannot be loaded by way of TMPDIR: " +
          words.substr(0, words.find('\n')));
    }
    package.drop(section);
  }
}

const Graph& Sampler::Parts::graph(const std::string& name) const {
  const auto found = compiled.find(name);
  if (found == compiled.end()) refuse("the compiled sampler holds no graph " + name);
  return found->second;
}

// On the device, cut to the longest text; at least two places, since softmax over one is no graph
// of its own.
TextCondition Sampler::Parts::prepared(
    TextCondition text, int64_t batch, const char* name) const {
  TextCondition result;
  for (const std::string& encoder : encoders) {
    const auto found = text.find(encoder);
    if (found == text.end()) refuse(std::string(name) + " lacks the encoder " + encoder);
    auto [tokens, mask, summary] = found->second;
    const int64_t wide = text_widths.at(encoder);
    if (!tokens.defined() || tokens.dim() != 3 || tokens.size(0) != batch ||
        tokens.size(2) != wide || tokens.size(1) == 0) {
      refuse(
          std::string(name) + "'s " + encoder + " tokens must be (" + std::to_string(batch) +
          ", S, " + std::to_string(wide) + "), got " +
          (tokens.defined() ? text_of(tokens.sizes()) : "none"));
    }
    if (!mask.defined()) mask = at::ones({batch, tokens.size(1)}, at::kBool);
    if (mask.sizes() != tokens.sizes().slice(0, 2) || mask.scalar_type() != at::kBool ||
        !mask.any(1).all().item<bool>()) {
      refuse(
          std::string(name) + "'s " + encoder + " mask must be bool (" + std::to_string(batch) +
          ", " + std::to_string(tokens.size(1)) + ") with a token in each row");
    }
    if (pooled &&
        (!summary.defined() || summary.sizes() != at::IntArrayRef({batch, wide}))) {
      refuse(
          std::string(name) + "'s pooled " + encoder + " text must be (" + std::to_string(batch) +
          ", " + std::to_string(wide) + ")");
    }
    const int64_t length =
        at::arange(1, tokens.size(1) + 1).mul(mask.cpu()).max().item<int64_t>();
    if (length > max_tokens.at(encoder)) {
      refuse(
          std::string(name) + " has " + std::to_string(length) + " " + encoder + " tokens, " +
          std::to_string(max_tokens.at(encoder)) + " are the most");
    }
    tokens = tokens.narrow(1, 0, length).to(device, dtype);
    mask = mask.narrow(1, 0, length).to(device);
    if (length == 1) {
      tokens = at::constant_pad_nd(tokens, {0, 0, 0, 1});
      mask = at::constant_pad_nd(mask, {0, 1});
    }
    if (summary.defined()) summary = summary.to(device, dtype).contiguous();
    tokens = tokens.contiguous();
    if (compiled.count("caption-" + encoder) > 0) tokens = graph("caption-" + encoder)({tokens})[0];
    result[encoder] = {tokens, mask.contiguous(), summary};
  }
  return result;
}

TextCondition Sampler::Parts::null_text() const {
  TextCondition text;
  for (const std::string& encoder : encoders) {
    const auto part = [&](const char* name) {
      const auto found = weights.find("null." + encoder + "." + name);
      return found == weights.end() ? Tensor() : found->second;
    };
    text[encoder] = {part("tokens"), part("mask"), part("pooled")};
  }
  return text;
}

bool Sampler::Parts::folds(const TextCondition& text, const std::string& encoder) const {
  return text.at(encoder).tokens.size(1) < head_size;
}

std::vector<TensorList> Sampler::Parts::contexts(const TextCondition& text, bool always) const {
  std::vector<TensorList> result(depth);
  if (!cross_attention) return result;
  for (int64_t block = 0; block < depth; ++block) {
    const std::string& encoder = block_encoder(block);
    const EncodedText& own = text.at(encoder);
    const bool is_folded = always || folds(text, encoder);
    const std::string form = is_folded ? "fold-" : "project-";
    const Graph& made = graph(form + std::to_string(own.tokens.size(2)));
    result[block] = made({own.tokens, own.mask}, block);
    if (!is_folded) result[block].push_back(own.mask);
  }
  return result;
}

Tensor Sampler::Parts::latents_of(const Request& request, uint32_t step) const {
  std::vector<int64_t> shape = latent_shape;
  shape.insert(shape.begin(), static_cast<int64_t>(request.seeds.size()));
  Tensor noise = at::empty(shape, at::kFloat);
  const int64_t size = noise[0].numel();
  for (size_t i = 0; i < request.seeds.size(); ++i) {
    portable_noise(request.seeds[i], step, 0, size, noise.mutable_data_ptr<float>() + i * size);
  }
  return noise.to(device);
}

SamplingPlan make_plan(
    const Metadata& made, const Tensor& lambda_t, const Tensor& lambda_m, const Tensor& rescale,
    int64_t batch, const at::Device& device) {
  made.check_batch(batch);
  const int64_t steps = made.steps;
  const Tensor scales = at::stack(
      {at::ones({steps, batch}, at::kDouble),
       per_step(lambda_t, made.lambda_t, steps, batch, "lambda_t"),
       per_step(lambda_m, made.lambda_m, steps, batch, "lambda_m")},
      -1);
  SamplingPlan plan;
  plan.weights = at::mul(scales.unsqueeze(2), made.coefficients).sum(-1);
  plan.rescale = per_step(rescale, made.rescale, steps, batch, "rescale");
  if (!((plan.rescale >= 0) & (plan.rescale <= 1)).all().item<bool>()) {
    refuse("the rescale must be 0 to 1");
  }
  if (made.distilled) {
    if ((plan.rescale != 0).any().item<bool>()) {
      refuse("a distilled model's one branch has nothing to rescale by: the rescale must be 0");
    }
    Tensor own = scales.narrow(2, 1, 2).to(at::kFloat);
    const bool has_motion = made.latent_shape[1] > 1;
    if (!has_motion) own = at::cat({own.narrow(2, 0, 1), at::ones_like(own.narrow(2, 1, 1))}, 2);
    plan.guidance = at::cat({own.narrow(1, 0, 1), own}, 1).to(device);
  }
  const Tensor active = (plan.weights != 0).any(1).contiguous();
  for (int64_t step = 0; step < steps; ++step) {
    const bool* needed = active[step].const_data_ptr<bool>();
    const auto runs = [&](const std::string& set) {
      for (int branch = 0; branch < 3; ++branch) {
        if (needed[branch] && set[branch] == '0') return false;
      }
      return true;
    };
    plan.branches.push_back(*std::find_if(made.branches.begin(), made.branches.end(), runs));
  }
  for (const std::string& set : made.branches) {
    const int64_t nulls = (count(set) - 1) * batch;
    const Tensor own = at::arange(1, 1 + batch, at::kLong);
    plan.conditions[set] = at::cat({at::zeros({nulls}, at::kLong), own});
  }
  plan.chunk = made.modulation_chunks[batch - 1];
  plan.step_weights = by_step(plan.weights, device);
  plan.step_rescale = by_step(plan.rescale, device);
  plan.step_coefficients = by_step(made.rows, device);
  plan.step_bounds = by_step(made.bounds, device);
  return plan;
}

Tensor Sampler::Parts::sample(const Request& request) const {
  const auto batch = static_cast<int64_t>(request.seeds.size());
  const SamplingPlan plan =
      make_plan(*this, request.lambda_t, request.lambda_m, request.rescale, batch, device);

  const TextCondition text = prepared(request.text, batch, "the text");
  TextCondition null_text;
  std::vector<TensorList> null_contexts;
  if (distilled) {
    if (!request.null_text.empty()) refuse("a distilled model takes no negative prompt");
  } else {
    null_text = prepared(
        request.null_text.empty() ? this->null_text() : request.null_text, 1, "the null text");
    null_contexts = contexts(null_text, true);
  }
  const std::vector<TensorList> text_contexts = contexts(text, false);

  // The rows of the modulation, of many steps at once: the null text's, then each prompt's. A
  // distilled model has no null text: there the first prompt's are there twice, since no graph is
  // made for one row.
  const int64_t conditions = 1 + batch;
  TensorList summaries;
  for (const std::string& encoder : encoders) {
    if (!pooled) continue;
    const Tensor& own = text.at(encoder).pooled;
    const Tensor first = distilled ? own.narrow(0, 0, 1) : null_text.at(encoder).pooled;
    summaries.push_back(at::cat({first, own}));
  }
  TensorList block_rows(depth);
  Tensor final_rows;
  const auto modulate = [&](int64_t start) {
    const int64_t length = std::min(plan.chunk, steps - start);
    TensorList inputs{timesteps.narrow(0, start, length).repeat_interleave(conditions)};
    for (const Tensor& summary : summaries) inputs.push_back(summary.repeat({length, 1}));
    if (distilled) inputs.push_back(plan.guidance.narrow(0, start, length).flatten(0, 1));
    const TensorList made = graph("condition")(std::move(inputs));
    final_rows = made[1].view({length, conditions, 2, width});
    for (int64_t block = 0; block < depth; ++block) {
      block_rows[block] =
          graph("modulation")({made[0]}, block)[0].view({length, conditions, 6, width});
    }
  };

  std::map<std::string, Tensor> samples;
  for (const auto& [set, conditions_of_set] : plan.conditions) {
    samples[set] = conditions_of_set.to(device);
  }

  Tensor latents = latents_of(request, 0), x0 = latents;
  TensorList finite;  // on the device: read once, behind the last step
  for (int64_t step = 0; step < steps; ++step) {
    if (step % plan.chunk == 0) modulate(step);
    const std::string& set = plan.branches[step];
    const int64_t nulls = count(set) - 1, place = step % plan.chunk;

    Tensor x = graph("embed")({latents})[0];
    x = x.repeat({nulls + 1, 1, 1, 1});
    Tensor y = at::zeros_like(x);
    Tensor gate = at::zeros({x.size(0), width}, x.options());
    for (int64_t block = 0; block < depth; ++block) {
      TensorList inputs{x, y, gate, block_rows[block][place].index_select(0, samples[set])};
      std::string name = "block-" + set;
      if (cross_attention) {
        if (nulls > 0) {
          const TensorList& context = null_contexts[block];
          inputs.insert(inputs.end(), context.begin(), context.end());
        }
        const TensorList& context = text_contexts[block];
        inputs.insert(inputs.end(), context.begin(), context.end());
        name += folds(text, block_encoder(block)) ? "-folded" : "-projected";
      }
      TensorList next = graph(name)(std::move(inputs), block);
      x = std::move(next[0]);
      y = std::move(next[1]);
      gate = std::move(next[2]);
    }
    TensorList inputs{
        x, y, gate, final_rows[place].index_select(0, samples[set]),
        latents, plan.step_weights[step], plan.step_rescale[step], plan.step_coefficients[step], x0};
    if (draws) inputs.push_back(latents_of(request, static_cast<uint32_t>(step) + 1));
    if (!plan.step_bounds.empty()) inputs.push_back(plan.step_bounds[step]);
    TensorList next = graph("step-" + set)(std::move(inputs));
    latents = std::move(next[0]);
    x0 = std::move(next[1]);
    finite.push_back(latents.isfinite().all());
    if (request.on_step) request.on_step(step);
  }
  const Tensor told = at::stack(finite).cpu();
  const bool* first = told.const_data_ptr<bool>();
  const int64_t good = std::find(first, first + steps, false) - first;
  if (good < steps) {
    refuse_not_finite(
        "the latents of step " + std::to_string(good + 1) + " of " + std::to_string(steps));
  }
  return latents;
}

Sampler::Sampler(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler::~Sampler() = default;

Sampler Sampler::load(
    const std::string& path, const std::string& pinned, const std::string& device,
    const std::string& operators) {
  if (!operators.empty() && dlopen(operators.c_str(), RTLD_NOW) == nullptr) {
    refuse("cannot load the operators: " + std::string(dlerror()));
  }
  auto parts = std::make_unique<Parts>();
  parts->load(path, pinned, device);
  return Sampler(std::move(parts));
}

const std::string& Sampler::header() const { return parts_->package.header(); }
const Metadata& Sampler::metadata() const { return *parts_; }
const Tensor& Sampler::section(const std::string& name) const {
  return parts_->package.section(name);
}

namespace {
// The samplers, by their mutex, that run a caller's function on this thread.
thread_local std::vector<const std::mutex*> calling;

// What every run needs: the device, and no autograd, whose kernels may be Python's.
struct Run {
  std::unique_lock<std::mutex> lock;
  c10::OptionalDeviceGuard guard;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Run(std::mutex& busy, const at::Device& device) {
    if (std::find(calling.begin(), calling.end(), &busy) != calling.end()) {
      refuse("a callback of a compiled sampler cannot call that sampler");
    }
    lock = std::unique_lock<std::mutex>(busy);
    if (device.is_cuda()) guard.reset_device(device);
  }
};

// While a caller's function runs other threads have the sampler, so that it may wait for them.
struct Callback {
  std::unique_lock<std::mutex>& lock;
  explicit Callback(std::unique_lock<std::mutex>& lock) : lock(lock) {
    calling.push_back(lock.mutex());
    lock.unlock();
  }
  ~Callback() {
    lock.lock();
    calling.pop_back();
  }
};
}  // namespace

TextCondition Sampler::encode(const Tokens& tokens) const {
  const Run run(parts_->busy, parts_->device);
  const std::vector<std::string>& encoders = parts_->encoders;
  for (const auto& [name, own] : tokens) {
    if (std::find(encoders.begin(), encoders.end(), name) == encoders.end()) {
      refuse("there are tokens of " + name + ", which is no encoder of this model");
    }
  }
  TensorList inputs;
  int64_t batch = -1;
  for (const std::string& encoder : encoders) {
    const auto found = tokens.find(encoder);
    if (found == tokens.end()) refuse("there are no " + encoder + " tokens");
    const auto& [ids, mask] = found->second;
    const int64_t most = metadata().max_tokens.at(encoder);
    const int64_t known = metadata().vocabulary.at(encoder);
    if (batch < 0) batch = ids.dim() == 2 ? ids.size(0) : 0;
    parts_->check_batch(batch);
    if (ids.dim() != 2 || ids.size(0) != batch || ids.size(1) < 1 || ids.size(1) > most ||
        mask.sizes() != ids.sizes() || (ids < 0).any().item<bool>() ||
        (ids >= known).any().item<bool>()) {
      refuse(
          encoder + " tokens must be (" + std::to_string(batch) + ", 1 to " +
          std::to_string(most) + ") of ids below " + std::to_string(known) + ", got " +
          text_of(ids.sizes()));
    }
    const int64_t extra = ids.size(1) == 1;  // no graph for one token only
    inputs.push_back(at::constant_pad_nd(ids.to(parts_->device, at::kLong), {0, extra}));
    inputs.push_back(at::constant_pad_nd(mask.to(parts_->device, at::kBool), {0, extra}));
  }
  const TensorList made = parts_->graph("encode")(std::move(inputs));
  TextCondition text;
  for (size_t i = 0; i < encoders.size(); ++i) {
    const Tensor& mask = tokens.at(encoders[i]).second;
    const int64_t extra = made[2 * i].size(1) - mask.size(1);
    if (!made[2 * i].isfinite().all().item<bool>()) {
      refuse_not_finite("the tokens of the " + encoders[i] + " encoder");
    }
    text[encoders[i]] = {
        made[2 * i], at::constant_pad_nd(mask.to(parts_->device, at::kBool), {0, extra}),
        made[2 * i + 1]};
  }
  return text;
}

SamplingPlan Sampler::plan(
    const Tensor& lambda_t, const Tensor& lambda_m, const Tensor& rescale, int64_t batch) const {
  return make_plan(*parts_, lambda_t, lambda_m, rescale, batch, parts_->device);
}

Tensor Sampler::sample(const Request& request) const {
  Run run(parts_->busy, parts_->device);
  Request own = request;
  if (request.on_step) {
    own.on_step = [&](int64_t step) {
      const Callback callback(run.lock);
      request.on_step(step);
    };
  }
  return parts_->sample(own);
}

Tensor Sampler::decode(const Tensor& latents) const {
  const Run run(parts_->busy, parts_->device);
  const std::vector<int64_t>& shape = parts_->latent_shape;
  if (latents.scalar_type() != at::kFloat || latents.dim() == 0 ||
      latents.sizes().slice(1) != at::IntArrayRef(shape)) {
    refuse(
        "latents must be Float [B, " + text_of(at::IntArrayRef(shape)).substr(1) + ", got " +
        c10::toString(latents.scalar_type()) + " " + text_of(latents.sizes()));
  }
  parts_->check_batch(latents.size(0));
  const Graph& decode = parts_->graph("decode");
  TensorList clips;
  for (const Tensor& clip : latents.to(parts_->device).split(1)) {
    const TensorList made = decode({clip});
    if (!made[1].item<bool>()) refuse_not_finite("the pixels of the VAE");
    clips.push_back(made[0].cpu());
  }
  return at::stack(clips);
}

}  // namespace gentron
