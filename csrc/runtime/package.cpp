#include "package.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <utility>

#include "refusal.h"
#include "sha256.h"

namespace gentron {
namespace {

static_assert(std::endian::native == std::endian::little, "packages are little endian");

constexpr std::string_view kMagic("GENTRON");
constexpr int kFormat = 3;
constexpr int64_t kPrefix = 8 + 8 + 32;
constexpr int64_t kLargestHeader = int64_t{1} << 24;
constexpr int64_t kAlignment = 64;
constexpr size_t kLongName = 100;  // bytes, which leaves room for what a partial name adds

uint64_t little_endian(const char* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

std::string hex(const std::string& bytes) {
  std::string digits;
  for (const unsigned char byte : bytes) {
    digits += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
  }
  return digits;
}

std::string sha256(const void* data, size_t size) {
  Sha256 hash;
  hash.update(data, size);
  return hash.hex();
}

class File {
 public:
  explicit File(const std::string& path) : path_(path), stream_(path, std::ios::binary) {
    std::error_code error;
    size_ = static_cast<int64_t>(std::filesystem::file_size(path, error));
    if (error || !stream_) refuse("no file " + path);
  }

  int64_t size() const { return size_; }

  void read(int64_t offset, int64_t size, char* out) {
    if (offset < 0 || size < 0 || offset > size_ || size > size_ - offset) refuse(path_ + " is truncated");
    stream_.seekg(offset);
    if (!stream_.read(out, size)) refuse("cannot read " + path_);
  }

  std::string read(int64_t offset, int64_t size) {
    if (size < 0 || size > size_) refuse(path_ + " is truncated");
    std::string bytes(static_cast<size_t>(size), '\0');
    read(offset, size, bytes.data());
    return bytes;
  }

  // A part as (size,) uint8. The place behind a safetensors header is aligned: there, the first 8
  // bytes tell the header's length.
  at::Tensor tensor(int64_t offset, int64_t size) {
    int64_t shift = 0;
    if (size >= 8) {
      const uint64_t header = little_endian(read(offset, 8).data());
      shift = kAlignment - static_cast<int64_t>((header + 8) % kAlignment);
    }
    at::Tensor bytes = at::empty({shift + size}, at::kByte).narrow(0, shift, size);
    read(offset, size, reinterpret_cast<char*>(bytes.mutable_data_ptr<uint8_t>()));
    return bytes;
  }

 private:
  std::string path_;
  std::ifstream stream_;
  int64_t size_ = 0;
};

at::ScalarType scalar_type(const std::string& name) {
  static const std::map<std::string, at::ScalarType> kTypes{
      {"F64", at::kDouble},  {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"I64", at::kLong},    {"I32", at::kInt},   {"U8", at::kByte},  {"BOOL", at::kBool}};
  const auto found = kTypes.find(name);
  if (found == kTypes.end()) refuse("unknown dtype " + name + " in a safetensors header");
  return found->second;
}

// `bytes` are a whole safetensors file; the tensors keep them alive.
Tensors parse_safetensors(const at::Tensor& bytes) {
  const char* data = reinterpret_cast<const char*>(bytes.const_data_ptr<uint8_t>());
  const int64_t size = bytes.numel();
  const int64_t header = size < 8 ? -1 : static_cast<int64_t>(little_endian(data));
  if (header < 2 || header > size - 8) refuse("no safetensors header");
  if (header > kLargestHeader) refuse("its header is too large");
  Tensors tensors;
  const Json entries = Json::parse({data + 8, static_cast<size_t>(header)});
  for (const auto& [name, entry] : entries.object()) {
    if (name == "__metadata__") continue;
    const at::ScalarType type = scalar_type(entry["dtype"].string());
    const std::vector<int64_t> shape = entry["shape"].integers();
    const std::vector<int64_t> place = entry["data_offsets"].integers();
    int64_t wanted = static_cast<int64_t>(c10::elementSize(type));
    for (const int64_t side : shape) {
      if (side < 1) refuse("tensor " + name + " has a side of " + std::to_string(side));
      if (wanted > size / side) refuse("tensor " + name + " is too large");
      wanted *= side;
    }
    // In order: no difference is taken of numbers that may be anything.
    if (place.size() != 2 || place[0] < 0 || place[1] < place[0] || place[1] > size - 8 - header ||
        place[1] - place[0] != wanted) {
      refuse("tensor " + name + " does not lie in its file");
    }
    if (place[0] % static_cast<int64_t>(c10::elementSize(type)) != 0) {
      refuse("tensor " + name + " is not aligned");
    }
    char* start = const_cast<char*>(data) + 8 + header + place[0];
    const auto is_bool = [](char byte) { return byte == 0 || byte == 1; };
    if (type == at::kBool && !std::all_of(start, start + wanted, is_bool)) {
      refuse("tensor " + name + " holds bytes that are no bool");
    }
    tensors.emplace(name, at::from_blob(start, shape, [bytes](void*) {}, type));
  }
  return tensors;
}

}  // namespace

Package Package::read(const std::string& path, const std::string& pinned) {
  File file(path);
  if (file.size() < kPrefix) refuse(path + " is no compiled sampler: it is too short");
  const std::string prefix = file.read(0, kPrefix);
  if (!prefix.starts_with(kMagic)) refuse(path + " is no compiled sampler");
  const int format = static_cast<unsigned char>(prefix[kMagic.size()]);
  if (format != kFormat) {
    refuse(
        path + " has format " + std::to_string(format) + ", this version reads " +
        std::to_string(kFormat) + ": export it again, python -m gentron_fast.export PIPELINE "
        "--out FILE");
  }
  const int64_t size = static_cast<int64_t>(little_endian(prefix.data() + 8));
  if (size < 2 || size > kLargestHeader || kPrefix + size > file.size()) {
    refuse(path + " is truncated or altered: its header does not fit");
  }
  const std::string header = file.read(kPrefix, size);
  if (sha256(header.data(), header.size()) != hex(prefix.substr(16))) {
    refuse(path + " is altered: its header has another checksum");
  }

  const auto is_ascii = [](char byte) { return static_cast<unsigned char>(byte) < 0x80; };
  if (!std::all_of(header.begin(), header.end(), is_ascii)) refuse(path + "'s header is no ASCII");
  Package package;
  package.text_ = header;
  std::vector<std::tuple<int64_t, int64_t, std::string>> in_order;
  try {
    package.header_ = Json::parse(header);
    for (const auto& [name, entry] : package.header_["sections"].object()) {
      in_order.emplace_back(entry["offset"].integer(), entry["size"].integer(), name);
      entry["sha256"].string();
    }
    package.header_["metadata"].object();
  } catch (const std::invalid_argument& error) {
    refuse(path + " has a header that cannot be read: " + error.what());
  }
  const Json::Object& entries = package.header_["sections"].object();
  std::sort(in_order.begin(), in_order.end());
  int64_t end = kPrefix + size;
  for (const auto& [offset, length, name] : in_order) {
    if (offset != end - kPrefix - size) refuse(path + " is altered: section " + name + " is moved");
    if (length < 0 || length > file.size() - end) {
      refuse(path + " is truncated: section " + name + " does not fit");
    }
    end += length;
  }
  if (end < file.size()) refuse(path + " is altered: it is longer than its header says");

  Sha256 whole;
  whole.update(prefix.data(), prefix.size());
  whole.update(header.data(), header.size());
  for (const auto& [offset, length, name] : in_order) {
    const at::Tensor bytes = file.tensor(kPrefix + size + offset, length);
    const uint8_t* data = bytes.const_data_ptr<uint8_t>();
    if (sha256(data, bytes.numel()) != entries.at(name)["sha256"].string()) {
      refuse(path + " is altered: section " + name + " has another checksum");
    }
    if (!pinned.empty()) whole.update(data, bytes.numel());
    package.sections_.emplace(name, bytes);
  }
  if (!pinned.empty()) {
    const std::string digest = whole.hex();
    if (digest != pinned) refuse(path + " has SHA-256 " + digest + ", wanted " + pinned);
  }
  return package;
}

const at::Tensor& Package::section(const std::string& name) const {
  const auto found = sections_.find(name);
  if (found == sections_.end()) refuse("the compiled sampler has no section " + name);
  return found->second;
}

const std::string& Package::digest(const std::string& name) const {
  return header_["sections"][name]["sha256"].string();
}

Tensors Package::tensors(const std::string& name) const { return parse_safetensors(section(name)); }

void Package::drop(const std::string& name) { sections_.erase(name); }

Tensors read_safetensors(const std::string& path) {
  File file(path);
  try {
    return parse_safetensors(file.tensor(0, file.size()));
  } catch (const std::invalid_argument& error) {
    refuse(path + " is no safetensors file: " + error.what());
  }
}

namespace {

// A file beside `path` that takes its place, or is gone when this is. Its name is its own, so that
// nothing that is there is written to; those of dead processes are removed. Names are those of
// gentron_fast/files.py, which removes them too.
class PartialFile {
 public:
  explicit PartialFile(const std::string& path) : path_(path) {
    const std::filesystem::path whole = path;
    const std::filesystem::path folder = whole.has_parent_path() ? whole.parent_path() : ".";
    std::string stem = whole.stem().string();
    if (stem.size() > kLongName) stem = sha256(stem.data(), stem.size());
    stem = "." + stem + "." + host() + ".";
    remove_dead(folder, stem);
    std::random_device random;
    const std::string unique = std::to_string(random()) + std::to_string(random());
    const std::string name =
        stem + std::to_string(getpid()) + "." + unique + ".part" + whole.extension().string();
    aside_ = (folder / name).string();
    file_ = open(aside_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (file_ < 0) fail();
  }
  ~PartialFile() {
    if (file_ >= 0) close(file_);
    if (!published_) unlink(aside_.c_str());
  }
  PartialFile(const PartialFile&) = delete;

  void write(const void* data, size_t size) {
    const char* next = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = ::write(file_, next, size);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail();
      next += written;
      size -= static_cast<size_t>(written);
    }
  }

  void publish() {
    const int file = std::exchange(file_, -1);
    if (close(file) != 0 || rename(aside_.c_str(), path_.c_str()) != 0) fail();
    published_ = true;
  }

 private:
  [[noreturn]] void fail() const {
    refuse("cannot write " + path_ + ": " + std::strerror(errno));
  }

  static std::string host() {
    char name[256] = "";
    gethostname(name, sizeof(name) - 1);
    for (char& c : name) {
      if (c != '\0' && c != '_' && !std::isalnum(static_cast<unsigned char>(c))) c = '-';
    }
    return name;
  }

  static void remove_dead(const std::filesystem::path& folder, const std::string& stem) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
      const std::string name = entry.path().filename().string();
      if (!name.starts_with(stem) || name.find(".part") == std::string::npos) continue;
      const pid_t owner = std::atoi(name.c_str() + stem.size());
      if (owner > 0 && kill(owner, 0) != 0 && errno == ESRCH) unlink(entry.path().c_str());
    }
  }

  std::string path_, aside_;
  int file_ = -1;
  bool published_ = false;
};

}  // namespace

void check_writable(const std::string& path) {
  if (std::filesystem::is_directory(path)) refuse("cannot write " + path + ": it is a folder");
  PartialFile{path};
}

void write_npy(const std::string& path, const at::Tensor& tensor) {
  const char* type = tensor.scalar_type() == at::kByte ? "|u1" : "<f4";
  std::string shape;
  for (const int64_t side : tensor.sizes()) shape += std::to_string(side) + ", ";
  std::string header = std::string("{'descr': '") + type +
      "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(kAlignment - (10 + header.size() + 1) % kAlignment, ' ');
  header.push_back('\n');

  PartialFile out(path);
  const auto length = static_cast<uint16_t>(header.size());
  out.write("\x93NUMPY\x01\x00", 8);
  out.write(&length, sizeof(length));
  out.write(header.data(), header.size());
  out.write(tensor.const_data_ptr(), tensor.nbytes());
  out.publish();
}

}  // namespace gentron
