// The little of JSON that a manifest and the ONNX metadata need, read strictly.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cnnedge {

struct Json {
  enum class Kind { null, boolean, number, text, list, object };

  Kind kind = Kind::null;
  bool truth = false;
  double number = 0.0;
  std::string text;
  std::vector<Json> items;         // of a list, or an object's values
  std::vector<std::string> names;  // an object's, in the order of the items

  const Json* find(const std::string& name) const {
    for (std::size_t i = names.size(); i-- > 0;) {  // of two the last, as Python's json
      if (names[i] == name) return &items[i];
    }
    return nullptr;
  }
  const Json& operator[](const std::string& name) const {
    const Json* found = find(name);
    if (!found) throw std::runtime_error("the field \"" + name + "\" is missing");
    return *found;
  }
  const Json& as(Kind wanted, const char* what) const {
    if (kind != wanted) throw std::runtime_error(std::string("found something else than ") + what);
    return *this;
  }
  int whole() const {
    as(Kind::number, "a number");
    if (number < -1e9 || number > 1e9 || number != static_cast<double>(static_cast<int>(number))) {
      throw std::runtime_error("found something else than a whole number");
    }
    return static_cast<int>(number);
  }
};

class JsonReader {
 public:
  static Json read(const std::string& text) {
    JsonReader reader(text);
    Json value = reader.value(0);
    reader.blanks();
    if (reader.at_ != text.size()) reader.fail();
    return value;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}

  [[noreturn]] void fail() const {
    throw std::runtime_error("no JSON at byte " + std::to_string(at_));
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char wanted) {
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }
  void expect(const std::string& word) {
    if (text_.compare(at_, word.size(), word) != 0) fail();
    at_ += word.size();
  }
  void blanks() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }

  Json value(int depth) {
    if (depth > 64) fail();
    blanks();
    Json found;
    switch (peek()) {
      case '{':
        found.kind = Json::Kind::object;
        ++at_;
        for (blanks(); !take('}'); blanks()) {
          if (!found.items.empty() && !take(',')) fail();
          blanks();
          found.names.push_back(string());
          blanks();
          expect(":");
          found.items.push_back(value(depth + 1));
        }
        return found;
      case '[':
        found.kind = Json::Kind::list;
        ++at_;
        for (blanks(); !take(']'); blanks()) {
          if (!found.items.empty() && !take(',')) fail();
          found.items.push_back(value(depth + 1));
        }
        return found;
      case '"':
        found.kind = Json::Kind::text;
        found.text = string();
        return found;
      case 't':
      case 'f':
        found.kind = Json::Kind::boolean;
        found.truth = peek() == 't';
        expect(found.truth ? "true" : "false");
        return found;
      case 'n':
        expect("null");
        return found;
      case 'N':  // Python's json writes it
        expect("NaN");
        return found;
      default:
        return read_number();
    }
  }

  Json read_number() {
    const std::size_t end = text_.find_first_not_of("+-.0123456789eEInfity", at_);
    const std::string word = text_.substr(at_, end == std::string::npos ? end : end - at_);
    char* stop = nullptr;
    Json found;
    found.kind = Json::Kind::number;
    found.number = std::strtod(word.c_str(), &stop);
    if (word.empty() || stop != word.c_str() + word.size()) fail();
    at_ += word.size();
    return found;
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const bool digit = c >= '0' && c <= '9', letter = (c | 32) >= 'a' && (c | 32) <= 'f';
      if (!digit && !letter) fail();
      code = code * 16 + static_cast<unsigned>(digit ? c - '0' : (c | 32) - 'a' + 10);
    }
    return code;
  }

  std::string string() {
    if (!take('"')) fail();
    std::string out;
    while (!take('"')) {
      if (at_ >= text_.size() || static_cast<unsigned char>(text_[at_]) < 32) fail();
      if (!take('\\')) {
        out += text_[at_++];
        continue;
      }
      const char escape = peek();
      ++at_;
      switch (escape) {
        case '"': case '\\': case '/': out += escape; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'n': out += '\n'; break;
        case 'r': out += '\r'; break;
        case 't': out += '\t'; break;
        case 'u': add_utf8(out); break;
        default: fail();
      }
    }
    return out;
  }

  void add_utf8(std::string& out) {
    unsigned code = hex4();
    if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
      expect("\\u");
      const unsigned low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail();
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) {
      fail();
    }
    const auto add = [&](unsigned byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      add(code);
    } else if (code < 0x800) {
      add(0xC0 | code >> 6);
      add(0x80 | (code & 63));
    } else if (code < 0x10000) {
      add(0xE0 | code >> 12);
      add(0x80 | (code >> 6 & 63));
      add(0x80 | (code & 63));
    } else {
      add(0xF0 | code >> 18);
      add(0x80 | (code >> 12 & 63));
      add(0x80 | (code >> 6 & 63));
      add(0x80 | (code & 63));
    }
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

}  // namespace cnnedge
