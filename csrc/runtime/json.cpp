#include "json.h"

#include <charconv>
#include <utility>

#include "refusal.h"

namespace gentron {

namespace {

constexpr int kDepth = 64;
constexpr int kMostValues = 1 << 18;

// Whether all of the text is one number that fits, in any locale.
template <class T>
bool read_number(std::string_view text, T& value) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end;
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse_value(0);
    if (peek() != '\0' || position_ != text_.size()) fail();
    return value;
  }

 private:
  Json parse_value(int depth) {
    if (depth > kDepth) refuse("the JSON is nested too deeply");
    if (++values_ > kMostValues) refuse("the JSON holds too many values");
    Json value;
    switch (peek()) {
      case '{': {
        Json::Object object;
        parse_list('}', [&] {
          if (peek() != '"') fail();
          std::string key = parse_string();
          expect(':');
          if (object.count(key) > 0) refuse("the JSON names " + key + " twice");
          object.emplace(std::move(key), parse_value(depth + 1));
        });
        value.kind_ = Json::Kind::kObject;
        value.object_ = std::make_shared<const Json::Object>(std::move(object));
        return value;
      }
      case '[': {
        Json::Array array;
        parse_list(']', [&] { array.push_back(parse_value(depth + 1)); });
        value.kind_ = Json::Kind::kArray;
        value.array_ = std::make_shared<const Json::Array>(std::move(array));
        return value;
      }
      case '"':
        value.kind_ = Json::Kind::kString;
        value.text_ = parse_string();
        return value;
      case 't':
      case 'f':
        value.kind_ = Json::Kind::kBoolean;
        value.boolean_ = peek() == 't';
        parse_word(value.boolean_ ? "true" : "false");
        return value;
      case 'n':
        parse_word("null");
        return value;
      default:
        value.kind_ = Json::Kind::kNumber;
        value.text_ = parse_number();
        return value;
    }
  }

  template <class Item>
  void parse_list(char close, const Item& item) {
    ++position_;
    if (peek() == close) {
      ++position_;
      return;
    }
    while (true) {
      item();
      if (peek() == close) break;
      expect(',');
    }
    ++position_;
  }

  std::string parse_string() {
    ++position_;
    std::string result;
    while (true) {
      const char c = next();
      if (c == '"') return result;
      if (static_cast<unsigned char>(c) < 0x20) fail();
      if (c != '\\') {
        result.push_back(c);
        continue;
      }
      const char escaped = next();
      switch (escaped) {
        case '"': case '\\': case '/': result.push_back(escaped); break;
        case 'b': result.push_back('\b'); break;
        case 'f': result.push_back('\f'); break;
        case 'n': result.push_back('\n'); break;
        case 'r': result.push_back('\r'); break;
        case 't': result.push_back('\t'); break;
        case 'u': append_utf8(result, parse_code_point()); break;
        default: fail();
      }
    }
  }

  uint32_t parse_code_unit() {
    const char digits[] = {next(), next(), next(), next()};
    uint32_t unit = 0;
    const auto [stop, error] = std::from_chars(digits, digits + 4, unit, 16);
    if (error != std::errc() || stop != digits + 4) fail();
    return unit;
  }

  // Beyond 0xFFFF two code units, a surrogate pair; one alone is no text.
  uint32_t parse_code_point() {
    const uint32_t unit = parse_code_unit();
    if (unit < 0xD800 || unit > 0xDFFF) return unit;
    if (unit > 0xDBFF || next() != '\\' || next() != 'u') fail();
    const uint32_t low = parse_code_unit();
    if (low < 0xDC00 || low > 0xDFFF) fail();
    return 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
  }

  static void append_utf8(std::string& text, uint32_t point) {
    const auto tail = [&](int shift) {
      text.push_back(static_cast<char>(0x80 | (point >> shift & 0x3F)));
    };
    if (point < 0x80) {
      text.push_back(static_cast<char>(point));
    } else if (point < 0x800) {
      text.push_back(static_cast<char>(0xC0 | point >> 6));
      tail(0);
    } else if (point < 0x10000) {
      text.push_back(static_cast<char>(0xE0 | point >> 12));
      tail(6), tail(0);
    } else {
      text.push_back(static_cast<char>(0xF0 | point >> 18));
      tail(12), tail(6), tail(0);
    }
  }

  // As JSON writes numbers, one that fp64 holds.
  std::string parse_number() {
    const size_t start = position_;
    const auto take = [&](std::string_view any) {
      const bool found = position_ < text_.size() && any.find(text_[position_]) != any.npos;
      position_ += found;
      return found;
    };
    const auto take_digits = [&] {
      if (!take("0123456789")) fail();
      while (take("0123456789")) {}
    };
    take("-");
    if (!take("0")) take_digits();
    if (take(".")) take_digits();
    if (take("eE")) {
      take("+-");
      take_digits();
    }
    const std::string_view text = text_.substr(start, position_ - start);
    double value = 0;
    if (!read_number(text, value)) fail();
    return std::string(text);
  }

  void parse_word(std::string_view word) {
    if (text_.substr(position_, word.size()) != word) fail();
    position_ += word.size();
  }

  void expect(char c) {
    if (peek() != c) fail();
    ++position_;
  }

  char next() {
    if (position_ >= text_.size()) fail();
    return text_[position_++];
  }

  // The next character that is no white space, '\0' at the end.
  char peek() {
    while (position_ < text_.size() &&
           std::string_view(" \t\r\n").find(text_[position_]) != std::string_view::npos) {
      ++position_;
    }
    return position_ < text_.size() ? text_[position_] : '\0';
  }

  [[noreturn]] void fail() const {
    refuse("no JSON at byte " + std::to_string(position_));
  }

  std::string_view text_;
  size_t position_ = 0;
  int values_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

namespace {
[[noreturn]] void wrong_kind(const char* wanted) {
  refuse(std::string("a header holds no ") + wanted + " where one belongs");
}
}  // namespace

bool Json::boolean() const {
  if (kind_ != Kind::kBoolean) wrong_kind("true or false");
  return boolean_;
}

double Json::number() const {
  if (kind_ != Kind::kNumber) wrong_kind("number");
  double value = 0;
  read_number(text_, value);
  return value;
}

bool Json::is_integer() const {
  int64_t value = 0;
  return kind_ == Kind::kNumber && read_number(text_, value);
}

int64_t Json::integer() const {
  int64_t value = 0;
  if (kind_ != Kind::kNumber || !read_number(text_, value)) wrong_kind("whole number");
  return value;
}

const std::string& Json::string() const {
  if (kind_ != Kind::kString) wrong_kind("string");
  return text_;
}

const Json::Array& Json::array() const {
  if (kind_ != Kind::kArray) wrong_kind("array");
  return *array_;
}

const Json::Object& Json::object() const {
  if (kind_ != Kind::kObject) wrong_kind("object");
  return *object_;
}

const Json& Json::operator[](const std::string& key) const {
  const auto found = object().find(key);
  if (found == object().end()) refuse("a header lacks " + key);
  return found->second;
}

std::vector<int64_t> Json::integers() const {
  std::vector<int64_t> values;
  for (const Json& value : array()) values.push_back(value.integer());
  return values;
}

}  // namespace gentron
