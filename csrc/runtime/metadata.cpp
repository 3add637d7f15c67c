#include "metadata.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "refusal.h"

namespace gentron {
namespace {

constexpr int64_t kMost = int64_t{1} << 20;  // of a count or a side that nothing else bounds
constexpr int64_t kMostElements = int64_t{1} << 28;  // of one clip's latents

// The fields of an object; a refusal names the field.
class Fields {
 public:
  Fields(const Json& object, std::string name) : object_(object), name_(std::move(name)) {
    if (!object.is_object()) fail("must be an object");
  }

  [[noreturn]] void fail(const std::string& words) const {
    refuse("the compiled sampler's " + name_ + " " + words);
  }
  [[noreturn]] void fail(const std::string& key, const std::string& words) const {
    Fields(object_, name_ + " " + key).fail(words);
  }

  const Json::Object& object() const { return object_.object(); }
  const Json& value(const std::string& key) const {
    if (!object_.contains(key)) fail("lacks " + key);
    return object_[key];
  }
  Fields fields(const std::string& key) const { return {value(key), name_ + " " + key}; }
  const Json::Array& array(const std::string& key, size_t most = kMost) const {
    const Json& own = value(key);
    if (!own.is_array() || own.array().size() > most) fail(key, "must be an array");
    return own.array();
  }
  bool has(const std::string& key) const { return object_.contains(key); }
  bool boolean(const std::string& key) const {
    if (!value(key).is_boolean()) fail(key, "must be true or false");
    return value(key).boolean();
  }
  const std::string& string(const std::string& key) const {
    if (!value(key).is_string()) fail(key, "must be a string");
    return value(key).string();
  }
  std::vector<std::string> strings(const std::string& key) const {
    std::vector<std::string> values;
    for (const Json& own : array(key)) {
      if (!own.is_string()) fail(key, "must be an array of strings");
      values.push_back(own.string());
    }
    return values;
  }
  double number(const std::string& key) const {
    if (!value(key).is_number()) fail(key, "must be a number");
    return value(key).number();
  }
  int64_t integer(const std::string& key, int64_t least, int64_t most) const {
    return whole(value(key), key, least, most);
  }
  std::vector<int64_t> integers(
      const std::string& key, size_t count, int64_t least, int64_t most) const {
    std::vector<int64_t> values;
    for (const Json& own : array(key)) values.push_back(whole(own, key, least, most));
    if (values.size() != count) {
      fail(key, "must be " + std::to_string(count) + " numbers, it has " +
                    std::to_string(values.size()));
    }
    return values;
  }
  // (height, width) fp64.
  at::Tensor table(const std::string& key, int64_t height, int64_t width) const {
    const auto wrong = [&] {
      fail(key, "must be " + std::to_string(height) + " rows of " + std::to_string(width) +
                    " numbers");
    };
    at::Tensor made = at::empty({height, width}, at::kDouble);
    double* next = made.mutable_data_ptr<double>();
    const Json::Array& rows = array(key);
    if (static_cast<int64_t>(rows.size()) != height) wrong();
    for (const Json& row : rows) {
      if (!row.is_array() || static_cast<int64_t>(row.array().size()) != width) wrong();
      for (const Json& own : row.array()) {
        if (!own.is_number()) wrong();
        *next++ = own.number();
      }
    }
    return made;
  }

 private:
  int64_t whole(const Json& own, const std::string& key, int64_t least, int64_t most) const {
    if (!own.is_integer() || own.integer() < least || own.integer() > most) {
      fail(key, "must be whole numbers from " + std::to_string(least) + " to " +
                    std::to_string(most));
    }
    return own.integer();
  }

  const Json& object_;
  std::string name_;
};

at::ScalarType dtype_of(const Fields& fields, const std::string& key) {
  static const std::map<std::string, at::ScalarType> kTypes{
      {"float32", at::kFloat},   {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},
      {"float64", at::kDouble},  {"int64", at::kLong},        {"int32", at::kInt},
      {"uint8", at::kByte},      {"bool", at::kBool}};
  const auto found = kTypes.find(fields.string(key));
  if (found == kTypes.end()) fields.fail(key, "must be a dtype, it is " + fields.string(key));
  return found->second;
}

// {"dtype", "shape"}, in which a dynamic side is [least, most].
TensorKind tensor_kind(const Fields& fields) {
  TensorKind kind{dtype_of(fields, "dtype"), {}};
  for (const Json& side : fields.array("shape", 8)) {
    const bool is_range = side.is_array() && side.array().size() == 2;
    const Json& least = is_range ? side.array()[0] : side;
    const Json& most = is_range ? side.array()[1] : side;
    if (!least.is_integer() || least.integer() < 1 || !most.is_integer()) {
      fields.fail("shape", "must be sides of 1 or more, or their bounds");
    }
    kind.sides.emplace_back(least.integer(), most.integer());
  }
  return kind;
}

GraphKind graph_kind(const Fields& fields) {
  GraphKind kind;
  kind.is_per_block = fields.boolean("per_block");
  for (const Json& input : fields.array("inputs", 64)) {
    kind.inputs.push_back(tensor_kind({input, "graph's input"}));
  }
  for (const Json& weight : fields.array("weights", 4096)) {
    const Fields own(weight, "graph's weight");
    kind.weights.emplace_back(own.string("name"), tensor_kind(own));
    if (!kind.is_per_block && own.string("name").find('*') != std::string::npos) {
      own.fail("name", "is one of a block, the graph is none");
    }
  }
  return kind;
}

// The branches' sets: each runs the prompt's branch, and one of them all that have a weight.
void check_branches(const Fields& fields, const Metadata& made) {
  const auto is_set = [](const std::string& set) {
    return set.size() == 3 && set.find_first_not_of("01") == std::string::npos && set[2] == '1';
  };
  const std::vector<std::string>& sets = made.branches;
  if (!std::all_of(sets.begin(), sets.end(), is_set) ||
      std::set(sets.begin(), sets.end()).size() != sets.size()) {
    fields.fail("branches", "must be sets such as 011 that differ and end in 1");
  }
  if (made.distilled && sets != std::vector<std::string>{"001"}) {
    fields.fail("branches", "must be 001 alone of a distilled model");
  }
  const at::Tensor weighs = (made.coefficients != 0).any(1).contiguous();
  const bool* needed = weighs.const_data_ptr<bool>();
  const auto runs_all = [&](const std::string& set) {
    return (!needed[0] || set[0] == '1') && (!needed[1] || set[1] == '1');
  };
  if (std::none_of(sets.begin(), sets.end(), runs_all)) {
    fields.fail("branches", "must hold a set of all that have a weight");
  }
}

// The graphs that a run calls by these names, and that they take what a run gives them.
void check_graphs(const Fields& fields, const Metadata& made) {
  const Fields graphs = fields.fields("graphs");
  const auto check = [&](const std::string& name, const std::vector<TensorKind>& inputs) {
    const auto found = made.graphs.find(name);
    if (found == made.graphs.end()) graphs.fail("lacks " + name);
    const std::vector<TensorKind>& own = found->second.inputs;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (i >= own.size() || !own[i].takes(inputs[i])) {
        graphs.fail(name, "must take " + inputs[i].text());
      }
    }
  };
  const auto clips = [&](int64_t most) {
    TensorKind kind{at::kFloat, {{1, most}}};
    for (const int64_t side : made.latent_shape) kind.sides.emplace_back(side, side);
    return kind;
  };
  const int64_t rows = (1 + made.max_batch) * made.steps;
  std::vector<TensorKind> inputs{{at::kLong, {{2, rows}}}};
  for (const std::string& encoder : made.encoders) {
    const int64_t wide = made.text_widths.at(encoder);
    if (made.pooled) inputs.push_back({made.dtype, {{2, rows}, {wide, wide}}});
  }
  if (made.distilled) inputs.push_back({at::kFloat, {{2, rows}, {2, 2}}});
  check("condition", inputs);
  check("modulation", {{made.dtype, {{2, rows}, {made.width, made.width}}}});
  check("embed", {clips(made.max_batch)});
  for (const std::string& set : made.branches) check("step-" + set, {});
  if (made.whole) {
    std::vector<TensorKind> ids;
    for (const std::string& encoder : made.encoders) {
      for (const at::ScalarType dtype : {at::kLong, at::kBool}) {
        ids.push_back({dtype, {{1, made.max_batch}, {2, made.max_tokens.at(encoder)}}});
      }
    }
    check("encode", ids);
    check("decode", {clips(1)});
  }
}

}  // namespace

void Metadata::check_batch(int64_t batch) const {
  if (batch < 1 || batch > max_batch) {
    refuse(
        "the compiled sampler makes 1 to " + std::to_string(max_batch) + " clips at once, not " +
        std::to_string(batch));
  }
}

std::vector<std::vector<at::Tensor>> Metadata::weights_of(
    const std::string& graph, const Tensors& tensors) const {
  const GraphKind& kind = graphs.at(graph);
  std::vector<std::vector<at::Tensor>> weights(kind.is_per_block ? depth : 1);
  for (size_t block = 0; block < weights.size(); ++block) {
    for (const auto& [pattern, wanted] : kind.weights) {
      std::string name = pattern;
      const size_t star = name.find('*');
      if (star != std::string::npos) name.replace(star, 1, std::to_string(block));
      const auto found = tensors.find(name);
      if (found == tensors.end()) refuse("the compiled sampler lacks the tensor " + name);
      const at::Tensor& tensor = found->second;
      if (!wanted.fits(tensor)) {
        std::ostringstream got;
        got << c10::toString(tensor.scalar_type()) << " " << tensor.sizes();
        refuse(
            "graph " + graph + " takes " + wanted.text() + " of " + name + ", not " + got.str());
      }
      weights[block].push_back(tensor);
    }
  }
  return weights;
}

bool TensorKind::fits(const at::Tensor& tensor) const {
  if (tensor.scalar_type() != dtype || tensor.dim() != static_cast<int64_t>(sides.size())) {
    return false;
  }
  for (size_t i = 0; i < sides.size(); ++i) {
    if (tensor.size(i) < sides[i].first || tensor.size(i) > sides[i].second) return false;
  }
  return true;
}

bool TensorKind::takes(const TensorKind& other) const {
  return dtype == other.dtype &&
      std::equal(
             sides.begin(), sides.end(), other.sides.begin(), other.sides.end(),
             [](const auto& own, const auto& given) {
               return own.first <= given.first && given.second <= own.second;
             });
}

std::string TensorKind::text() const {
  std::ostringstream stream;
  stream << c10::toString(dtype) << " [";
  for (size_t i = 0; i < sides.size(); ++i) {
    stream << (i > 0 ? ", " : "") << sides[i].first;
    if (sides[i].second != sides[i].first) stream << "-" << sides[i].second;
  }
  stream << "]";
  return stream.str();
}

Metadata Metadata::read(const Json& values) {
  const Fields fields(values, "metadata");
  Metadata made;
  made.torch = fields.string("torch");
  made.made_for = fields.string("device");
  made.machine = fields.string("machine");
  made.capability = fields.string("capability");
  made.cpu_flags = fields.strings("cpu_flags");
  if (made.made_for != "cpu" && made.made_for != "cuda") {
    fields.fail("device", "must be cpu or cuda, it is " + made.made_for);
  }

  const Fields model = fields.fields("model");
  made.depth = model.integer("depth", 1, 4096);
  made.width = model.integer("width", 1, 1 << 16);
  made.head_size = made.width / model.integer("heads", 1, made.width);
  made.cross_attention = model.boolean("cross_attention");
  made.pooled = model.boolean("pooled_text");
  // Of files that were made before there were distilled models the key is absent.
  made.distilled = model.has("guidance_embedding") && model.boolean("guidance_embedding");
  made.encoders = model.strings("encoders");
  const std::set<std::string> known(made.encoders.begin(), made.encoders.end());
  const bool are_known = std::all_of(
      known.begin(), known.end(), [](const auto& name) { return name == "clip" || name == "t5"; });
  if (!are_known || known.size() != made.encoders.size() ||
      (made.cross_attention && known.empty())) {
    model.fail("encoders", "must be clip, t5 or both");
  }
  made.dtype = dtype_of(fields, "dtype");
  if (!at::isFloatingType(made.dtype)) fields.fail("dtype", "must be one of floating point");
  made.whole = fields.boolean("whole");
  for (const std::string& encoder : made.encoders) {
    made.text_widths[encoder] = model.integer(encoder + "_width", 1, kMost);
    made.max_tokens[encoder] = fields.fields("max_tokens").integer(encoder, 2, kMost);
    if (made.whole) {
      made.vocabulary[encoder] = fields.fields("vocabulary").integer(encoder, 1, INT64_MAX);
    }
  }

  made.latent_shape = fields.integers("latent_shape", 4, 1, kMost);
  int64_t elements = 1;
  for (const int64_t side : made.latent_shape) {
    if (elements > kMostElements / side) fields.fail("latent_shape", "is too large");
    elements *= side;
  }
  made.frames = fields.integers("frames", 1, made.latent_shape[1], made.latent_shape[1]);
  made.size = fields.integers("size", 2, 1, kMost);
  made.max_batch = fields.integer("max_batch", 1, 1024);

  made.steps = static_cast<int64_t>(fields.array("timesteps").size());
  if (made.steps < 1) fields.fail("timesteps", "must be one or more");
  made.timesteps = at::tensor(fields.integers("timesteps", made.steps, 0, kMost), at::kLong);
  made.rows = fields.table("rows", made.steps, 6);
  made.draws = (made.rows.select(1, 5) != 0).any().item<bool>();
  if (!fields.value("log_variance").is_null()) {
    made.bounds = fields.table("log_variance", made.steps, 2).to(at::kFloat);
  }
  made.coefficients = fields.table("guidance_coefficients", 3, 3);
  made.branches = fields.strings("branches");
  made.modulation_chunks = fields.integers("modulation_chunks", made.max_batch, 1, 1 << 24);
  made.lambda_t = fields.number("lambda_t");
  made.lambda_m = fields.number("lambda_m");
  for (const std::string name : {"lambda_t", "lambda_m"}) {
    if (!fields.has("learnt_" + name)) continue;
    const at::Tensor range = fields.table("learnt_" + name, 1, 2);
    made.learnt[name] = {range[0][0].item<double>(), range[0][1].item<double>()};
  }
  made.rescale = fields.number("rescale");
  if (made.rescale < 0 || made.rescale > 1) fields.fail("rescale", "must be 0 to 1");
  if (made.distilled && made.rescale != 0) fields.fail("rescale", "must be 0 of a distilled model");
  check_branches(fields, made);

  for (const auto& [name, entry] : fields.fields("graphs").object()) {
    if (name.find('/') != std::string::npos) refuse("no name for a graph: " + name);
    made.graphs[name] = graph_kind({entry, "graph " + name});
  }
  check_graphs(fields, made);

  // What Python alone reads.
  fields.string("solver");
  fields.number("eta");
  for (const auto& [part, digest] : fields.fields("parts").object()) {
    if (!digest.is_string() || part.find('/') != std::string::npos) {
      fields.fail("parts", "must be digests by name");
    }
  }
  if (made.whole) fields.strings("tokenizers");
  return made;
}

}  // namespace gentron
