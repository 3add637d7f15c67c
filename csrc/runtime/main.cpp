// gentron-sample: clips from a compiled sampler, without Python.

#include <ATen/ATen.h>
#include <dlfcn.h>

#include <cctype>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <optional>

#include "refusal.h"
#include "sampler.h"
#include "threads.h"

namespace {

using gentron::Sampler;
using gentron::refuse;

constexpr const char* kHelp = R"(usage: gentron-sample FILE --tokens NAME=IDS... --out FILE.npy [options]
       gentron-sample FILE --embeddings SAFETENSORS --out FILE.npy [options]

FILE                     compiled sampler of python -m gentron_fast.export
--tokens NAME=ID,ID...   token ids of each encoder: clip=... t5=... (--whole)
--null-tokens NAME=...   those of the negative prompt (the empty prompt)
--embeddings SAFETENSORS encoded text: clip.tokens (B, S, W), clip.mask (B, S)
                         bool, clip.pooled (B, W), t5.* likewise; those of the
                         negative prompt as null.clip.tokens and so on
--seed N[,N...]          one a clip (0)
--lambda-t X             text guidance (the file's own)
--lambda-m X             motion guidance (the file's own)
--rescale X              guidance rescale, 0 to 1 (the file's own)
--frames N --size H W    refused unless the file was made for them
--device D               cpu, cuda or cuda:N, of the kind the file was made for
--sha256 DIGEST          refuse any other file
--operators FILE         libgentron.so (found beside this program)
--out FILE.npy           frames (B, T, H, W, 3) uint8 with --whole, else
                         latents (B, C, T, h, w) fp32; --latents: those
)";

// Ctrl-C and SIGTERM end the run between two steps, so that temporary folders are left to nobody;
// a second one ends it at once. One that is ignored, as in a script's background, stays ignored.
struct Interrupted {};
volatile std::sig_atomic_t interrupted = 0;
void check_interrupted() {
  if (interrupted) throw Interrupted();
}
void interrupt(int number) {
  interrupted = 1;
  std::signal(number, SIG_DFL);
}

struct Arguments {
  std::string file, embeddings, device, sha256, operators, out;
  std::map<std::string, std::vector<int64_t>> tokens, null_tokens;
  std::vector<uint64_t> seeds{0};
  std::optional<double> lambda_t, lambda_m, rescale;
  std::vector<int64_t> frames, size;
  bool latents = false;
};

template <class T, class Parse>
T number(const std::string& option, const std::string& text, const Parse& parse) {
  char* end = nullptr;
  errno = 0;
  const T value = parse(text.c_str(), &end);
  if (text.empty() || *end != '\0' || errno != 0) refuse(option + ": no number: " + text);
  return value;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts{""};
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back().push_back(c);
    }
  }
  return parts;
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  size_t next = 0;
  const auto is_option = [&](size_t i) { return words[i].rfind("--", 0) == 0; };
  while (next < words.size()) {
    const std::string option = words[next++];
    if (option.rfind("--", 0) != 0) {
      if (!arguments.file.empty()) refuse("one FILE is wanted, " + option + " is another");
      arguments.file = option;
      continue;
    }
    if (option == "--latents") {
      arguments.latents = true;
      continue;
    }
    std::vector<std::string> values;
    const size_t most = option == "--size" ? 2 : option.ends_with("tokens") ? 2 : 1;
    while (next < words.size() && values.size() < most && !is_option(next)) {
      values.push_back(words[next++]);
    }
    if (values.empty()) refuse(option + " needs a value");
    const std::string& value = values[0];
    const auto whole = [&](const std::string& text) {
      return number<int64_t>(option, text, [](auto* t, auto** e) { return strtoll(t, e, 10); });
    };
    const auto real = [&] {
      return number<double>(option, value, [](auto* t, auto** e) { return strtod(t, e); });
    };
    if (option == "--tokens" || option == "--null-tokens") {
      auto& tokens = option == "--tokens" ? arguments.tokens : arguments.null_tokens;
      for (const std::string& text : values) {
        const size_t equals = text.find('=');
        if (equals == std::string::npos) refuse(option + ": wanted NAME=ID,ID..., got " + text);
        const std::string name = text.substr(0, equals);
        if (tokens.count(name) > 0) refuse(option + " names " + name + " twice");
        auto& ids = tokens[name];
        for (const std::string& id : split(text.substr(equals + 1))) ids.push_back(whole(id));
      }
    } else if (option == "--seed") {
      arguments.seeds.clear();
      for (const std::string& seed : split(value)) {
        if (seed.find('-') != std::string::npos) refuse("--seed: no number: " + seed);
        arguments.seeds.push_back(number<uint64_t>(
            option, seed, [](auto* t, auto** e) { return strtoull(t, e, 10); }));
      }
    } else if (option == "--frames") {
      arguments.frames = {whole(value)};
    } else if (option == "--size") {
      arguments.size = {whole(value), whole(values.back())};
    } else if (option == "--lambda-t") {
      arguments.lambda_t = real();
    } else if (option == "--lambda-m") {
      arguments.lambda_m = real();
    } else if (option == "--rescale") {
      arguments.rescale = real();
    } else if (option == "--embeddings") {
      arguments.embeddings = value;
    } else if (option == "--device") {
      arguments.device = value;
    } else if (option == "--sha256") {
      arguments.sha256 = value;
      for (char& digit : arguments.sha256) {
        const auto byte = static_cast<unsigned char>(digit);
        if (!std::isxdigit(byte)) refuse("--sha256 takes 64 hexadecimal digits, got " + value);
        digit = static_cast<char>(std::tolower(byte));
      }
      if (value.size() != 64) refuse("--sha256 takes 64 hexadecimal digits, got " + value);
    } else if (option == "--operators") {
      arguments.operators = value;
    } else if (option == "--out") {
      arguments.out = value;
    } else {
      refuse("unknown option " + option + "; --help names all");
    }
  }
  if (arguments.file.empty()) refuse("a FILE is needed; --help tells more");
  if (!arguments.out.ends_with(".npy")) refuse("--out FILE.npy is needed");
  if (arguments.tokens.empty() == arguments.embeddings.empty()) {
    refuse("one of --tokens and --embeddings is needed");
  }
  return arguments;
}

// libgentron.so, in the source tree or where packages are installed.
std::string find_operators() {
  if (const char* path = std::getenv("GENTRON_LIBRARY")) return path;
  const auto here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  for (const char* folder : {"kernels", "gentron_kernels"}) {
    const auto path = here.parent_path() / folder / "libgentron.so";
    if (std::filesystem::exists(path)) return path.string();
  }
  refuse("no libgentron.so beside this program; --operators names it");
}

gentron::TextCondition encode(
    const Sampler& sampler, const std::map<std::string, std::vector<int64_t>>& ids, int64_t clips) {
  gentron::Tokens tokens;
  for (const auto& [encoder, row] : ids) {
    const at::Tensor one = at::tensor(row, at::kLong).expand({clips, -1});
    tokens[encoder] = {one, at::ones(one.sizes(), at::kBool)};
  }
  return sampler.encode(tokens);
}

// Tensors whose names begin with `prefix`; one prompt serves every clip.
gentron::TextCondition embeddings(
    const gentron::Tensors& tensors, const std::string& prefix, int64_t clips) {
  gentron::TextCondition text;
  for (const char* encoder : {"clip", "t5"}) {
    const auto part = [&](const char* name) {
      const auto found = tensors.find(prefix + encoder + "." + name);
      if (found == tensors.end()) return at::Tensor();
      const at::Tensor& tensor = found->second;
      if (clips == 1 || tensor.dim() == 0 || tensor.size(0) != 1) return tensor;
      return tensor.repeat_interleave(clips, 0);
    };
    if (part("tokens").defined()) text[encoder] = {part("tokens"), part("mask"), part("pooled")};
  }
  return text;
}

at::Tensor scale(const std::optional<double>& value) {
  return value ? at::scalar_tensor(*value, at::kDouble) : at::Tensor();
}

// As gentron_fast.arguments.not_learnt tells it.
void tell_not_learnt(
    const gentron::Metadata& metadata, const std::string& name, double asked) {
  const auto found = metadata.learnt.find(name);
  if (found == metadata.learnt.end()) return;
  const auto [low, high] = found->second;
  if (asked >= low && asked <= high) return;
  std::cerr << "gentron-sample: the model was distilled with " << name << " from " << low << " to "
            << high << ", and may not know " << asked << "\n";
}

void run(const Arguments& arguments) {
  gentron::settle_threads();
  gentron::check_writable(arguments.out);
  gentron::Tensors tensors;
  if (!arguments.embeddings.empty()) tensors = gentron::read_safetensors(arguments.embeddings);
  const std::string operators =
      arguments.operators.empty() ? find_operators() : arguments.operators;
  const Sampler sampler =
      Sampler::load(arguments.file, arguments.sha256, arguments.device, operators);
  check_interrupted();
  const auto check = [](const char* name, const std::vector<int64_t>& asked,
                        const std::vector<int64_t>& made) {
    if (!asked.empty() && asked != made) {
      refuse(
          std::string("the compiled sampler was made for ") + name + " " + at::str(made) +
          ", not " + at::str(asked));
    }
  };
  const gentron::Metadata& metadata = sampler.metadata();
  check("frames", arguments.frames, metadata.frames);
  check("size", arguments.size, metadata.size);
  const bool whole = metadata.whole;
  if (!whole && !arguments.tokens.empty()) {
    refuse("this compiled sampler takes --embeddings; --tokens need an export with --whole");
  }

  tell_not_learnt(metadata, "lambda_t", arguments.lambda_t.value_or(metadata.lambda_t));
  if (metadata.frames != std::vector<int64_t>{1}) {  // where something moves
    tell_not_learnt(metadata, "lambda_m", arguments.lambda_m.value_or(metadata.lambda_m));
  }

  gentron::Request request;
  request.seeds = arguments.seeds;
  request.lambda_t = scale(arguments.lambda_t);
  request.lambda_m = scale(arguments.lambda_m);
  request.rescale = scale(arguments.rescale);
  request.on_step = [](int64_t) { check_interrupted(); };
  const auto clips = static_cast<int64_t>(request.seeds.size());
  if (!arguments.tokens.empty()) {
    request.text = encode(sampler, arguments.tokens, clips);
    if (!arguments.null_tokens.empty()) {
      request.null_text = encode(sampler, arguments.null_tokens, 1);
    }
  } else {
    request.text = embeddings(tensors, "", clips);
    request.null_text = embeddings(tensors, "null.", 1);
  }
  const at::Tensor latents = sampler.sample(request);
  check_interrupted();
  const at::Tensor made =
      whole && !arguments.latents ? sampler.decode(latents) : latents.cpu().contiguous();
  check_interrupted();
  gentron::write_npy(arguments.out, made);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.empty() || words[0] == "--help" || words[0] == "-h") {
    std::cout << kHelp;
    return words.empty() ? 2 : 0;
  }
  for (const int number : {SIGINT, SIGTERM}) {
    struct sigaction before {};
    sigaction(number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) std::signal(number, interrupt);
  }
  try {
    run(parse(words));
    return 0;
  } catch (const Interrupted&) {
    std::cerr << "gentron-sample: interrupted; nothing was written\n";
    return 130;
  } catch (const std::exception& error) {
    std::string line = error.what();
    line = line.substr(0, line.find('\n'));
    std::cerr << "gentron-sample: error: " << line << "\n";
    return 2;
  }
}
