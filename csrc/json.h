// JSON for the answers to Python: objects and lists of names and numbers, of keys and texts that are ours, and
// so without a character that JSON would escape but quotes and backslashes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>

namespace nf::json {

inline std::string of(const char* text) {
  if (text == nullptr) return "null";
  std::string quoted = "\"";
  for (; *text != 0; ++text) {
    if (*text == '"' || *text == '\\') quoted += '\\';
    quoted += *text;
  }
  return quoted + '"';
}
inline std::string of(bool value) { return value ? "true" : "false"; }
inline std::string of(int64_t value) { return std::to_string(value); }
// Finite, to the bit.
inline std::string of(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}

class List {
 public:
  void add(const std::string& item) { text_ += (text_.empty() ? "" : ", ") + item; }
  std::string text() const { return '[' + text_ + ']'; }

 private:
  std::string text_;
};

class Object {
 public:
  void put(const char* key, const std::string& value) {
    text_ += (text_.empty() ? "" : ", ") + of(key) + ": " + value;
  }
  template <class T>
  void set(const char* key, const T& value) {
    put(key, of(value));
  }
  std::string text() const { return '{' + text_ + '}'; }

 private:
  std::string text_;
};

inline std::string list(std::initializer_list<std::string> items) {
  List all;
  for (const std::string& item : items) all.add(item);
  return all.text();
}

template <size_t count>
std::string names(const char* const (&items)[count]) {
  List all;
  for (const char* item : items) all.add(of(item));
  return all.text();
}

}  // namespace nf::json
