// What the bytes of e4m3 stand for, and which of them a number becomes.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace emulator {

inline float decode(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return std::nanf("");
  const float size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -size : size;
}

inline float e4m3_value(uint8_t code) {
  static const std::vector<float> values = [] {
    std::vector<float> all;
    for (int i = 0; i < 256; ++i) all.push_back(decode(static_cast<uint8_t>(i)));
    return all;
  }();
  return values[code];
}

inline uint8_t e4m3_code(float value) {
  if (std::isnan(value)) return 0x7F;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(value), 448.0f);
  int exponent;
  std::frexp(size, &exponent);  // size < 2^exponent
  const int scale = size > 0.0f ? std::max(exponent - 1, -6) - 3 : -9;  // the last mantissa bit counts 2^scale
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -scale)));  // to even
  return sign | static_cast<uint8_t>(steps + (scale + 9) * 8);  // a carry out of the mantissa is the next exponent
}

}  // namespace emulator
