// How the runtime refuses what it is given.
#pragma once

#include <stdexcept>
#include <string>

namespace gentron {

// std::invalid_argument of one line: what a file holds may stand in the message, so control
// characters in it become question marks, and a long one is cut.
[[noreturn]] inline void refuse(std::string message) {
  constexpr size_t kLongest = 1000;
  if (message.size() > kLongest) message = message.substr(0, kLongest) + "…";
  for (char& c : message) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  throw std::invalid_argument(message);
}

}  // namespace gentron
