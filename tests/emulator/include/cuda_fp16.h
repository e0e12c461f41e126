// Replaces CUDA's header of the same name: the part that csrc/ uses.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  std::uint16_t bits;
};

inline float __half2float(__half x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  std::uint32_t bits = body << 13;
  float y;
  if (body >= 0x7c00) {  // infinite or NaN
    bits |= 0x7f800000 | sign;
    std::memcpy(&y, &bits, 4);
    return y;
  }
  std::memcpy(&y, &bits, 4);
  y *= 0x1p112f;  // moves the exponent, and makes subnormal numbers normal
  return sign ? -y : y;
}

// To nearest, ties to even; every NaN becomes one NaN.
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  const float size = std::fabs(x);
  std::uint32_t y;
  if (size >= 65520) {
    y = 0x7c00;
  } else if (size < 0x1p-14f) {
    y = static_cast<std::uint32_t>(std::nearbyint(size * 0x1p24f));
  } else {
    y = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | y)};
}
