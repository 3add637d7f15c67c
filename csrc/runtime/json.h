// A reader of JSON, for headers of a few thousand values: at most 64 levels and 262,144 values,
// which take no more than 64 MB.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gentron {

// One JSON value. Reading it as another kind, or a key that is not there, is a
// std::invalid_argument.
class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  // std::invalid_argument where the text is not one JSON value, or names a key twice.
  static Json parse(std::string_view text);

  bool is_null() const { return kind_ == Kind::kNull; }
  bool is_boolean() const { return kind_ == Kind::kBoolean; }
  bool is_number() const { return kind_ == Kind::kNumber; }
  bool is_integer() const;  // a number that fits int64_t and is written as a whole one
  bool is_string() const { return kind_ == Kind::kString; }
  bool is_array() const { return kind_ == Kind::kArray; }
  bool is_object() const { return kind_ == Kind::kObject; }
  bool boolean() const;
  double number() const;
  int64_t integer() const;
  const std::string& string() const;
  const Array& array() const;
  const Object& object() const;
  bool contains(const std::string& key) const { return object().count(key) > 0; }
  const Json& operator[](const std::string& key) const;
  std::vector<int64_t> integers() const;

 private:
  friend class JsonParser;
  enum class Kind { kNull, kBoolean, kNumber, kString, kArray, kObject };

  Kind kind_ = Kind::kNull;
  bool boolean_ = false;
  std::string text_;  // of a string, or a number as it is written
  std::shared_ptr<const Array> array_;
  std::shared_ptr<const Object> object_;
};

}  // namespace gentron
