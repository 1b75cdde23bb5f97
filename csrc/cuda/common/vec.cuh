// Vectors of elements as they lie in memory, and their conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace omni_moe::cuda {

// kSize elements that one instruction loads or stores (at most 16 bytes).
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  static_assert(sizeof(T) * kSize <= 16, "wider than one load");
  static constexpr int size = kSize;
  T data[kSize];
};

// Elements of T in the widest load.
template <class T>
inline constexpr int kVecWidth = static_cast<int>(16 / sizeof(T));

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest even, as PyTorch casts.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Pairs convert in one instruction where the hardware has one.
template <int kSize>
__device__ __forceinline__ void unpack(const Vec<float, kSize>& in, float (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = in.data[i];
}
template <int kSize>
__device__ __forceinline__ void unpack(const Vec<__half, kSize>& in, float (&out)[kSize]) {
  if constexpr (kSize == 1) {
    out[0] = __half2float(in.data[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      const float2 pair = __half22float2(__halves2half2(in.data[i], in.data[i + 1]));
      out[i] = pair.x;
      out[i + 1] = pair.y;
    }
  }
}
template <int kSize>
__device__ __forceinline__ void unpack(const Vec<__nv_bfloat16, kSize>& in, float (&out)[kSize]) {
  if constexpr (kSize == 1) {
    out[0] = __bfloat162float(in.data[0]);
  } else {
    // A bf16 is the upper half of its fp32, so that a pair takes one shift and one mask.
    static_assert(kSize % 2 == 0);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(in.data);
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      out[i] = __uint_as_float(words[i / 2] << 16);
      out[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  }
}

template <int kSize>
__device__ __forceinline__ void pack(const float (&in)[kSize], Vec<float, kSize>& out) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) out.data[i] = in[i];
}
template <int kSize>
__device__ __forceinline__ void pack(const float (&in)[kSize], Vec<__half, kSize>& out) {
  if constexpr (kSize == 1) {
    out.data[0] = __float2half_rn(in[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      const __half2 pair = __floats2half2_rn(in[i], in[i + 1]);
      out.data[i] = __low2half(pair);
      out.data[i + 1] = __high2half(pair);
    }
  }
}
template <int kSize>
__device__ __forceinline__ void pack(const float (&in)[kSize], Vec<__nv_bfloat16, kSize>& out) {
  if constexpr (kSize == 1) {
    out.data[0] = __float2bfloat16_rn(in[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(in[i], in[i + 1]);
      out.data[i] = __low2bfloat16(pair);
      out.data[i + 1] = __high2bfloat16(pair);
    }
  }
}

namespace detail {

// The integer type that moves kBytes in one instruction.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

}  // namespace detail

// `pointer` must be aligned to the vector. The load is coherent, as dependent_launch.cuh asks of
// kernels that start before what they read is written.
template <class V, class T>
__device__ __forceinline__ V load_vec(const T* pointer) {
  using Word = typename detail::Word<sizeof(V)>::type;
  union {
    Word word;
    V vec;
  } bits;
  bits.word = *reinterpret_cast<const Word*>(pointer);
  return bits.vec;
}

// The same by ld.global.nc, which the compiler may move past stores and barriers: only for kernels
// launched plainly and for data that nothing writes while they run.
template <class V, class T>
__device__ __forceinline__ V load_vec_readonly(const T* pointer) {
  using Word = typename detail::Word<sizeof(V)>::type;
  union {
    Word word;
    V vec;
  } bits;
  bits.word = __ldg(reinterpret_cast<const Word*>(pointer));
  return bits.vec;
}

// A coherent load for data read once, which L1 does not keep. cuda::ptx has this load too, but not
// as volatile: the compiler then moves the loads of a batch apart, and expert_l2_tiled_dots goes
// from 528 to as many as 648 instructions.
template <class V, class T>
__device__ __forceinline__ V load_vec_streaming(const T* pointer) {
  static_assert(sizeof(V) == 16, "narrower loads are not needed yet");
  union {
    uint4 word;
    V vec;
  } bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.word.x), "=r"(bits.word.y), "=r"(bits.word.z), "=r"(bits.word.w)
               : "l"(pointer)
               : "memory");
  return bits.vec;
}

// The same for data read once whose memory this thread may write later. The load stays in order
// with the thread's other accesses, and the data is the first to leave the caches.
template <class V, class T>
__device__ __forceinline__ V load_vec_once(const T* pointer) {
  static_assert(sizeof(V) == 16, "narrower loads are not needed yet");
  union {
    uint4 word;
    V vec;
  } bits;
  bits.word = __ldcs(reinterpret_cast<const uint4*>(pointer));
  return bits.vec;
}

// Loads from shared memory in one instruction, even if the compiler sees narrower uses, in which
// case it splits a plain load.
template <class V>
__device__ __forceinline__ V load_shared_vec(const void* pointer) {
  static_assert(sizeof(V) == 16, "narrower loads are not needed yet");
  union {
    uint4 word;
    V vec;
  } bits;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.word.x), "=r"(bits.word.y), "=r"(bits.word.z), "=r"(bits.word.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(pointer)))
               : "memory");
  return bits.vec;
}

template <class T, class V>
__device__ __forceinline__ void store_vec(T* pointer, const V& value) {
  *reinterpret_cast<V*>(pointer) = value;
}

// The same for data that this chain of kernels does not read again, which then leaves L2 first. It
// also serves results of which a block writes short pieces of many rows: BatchNorm of 4096 tokens
// and 512 columns, 64 bytes of a row at a time, takes 9.0 µs this way and 13.9 with the usual
// policy on an H200.
template <class T, class V>
__device__ __forceinline__ void store_vec_streaming(T* pointer, const V& value) {
  using Word = typename detail::Word<sizeof(V)>::type;
  union {
    Word word;
    V vec;
  } bits;
  bits.vec = value;
  __stcs(reinterpret_cast<Word*>(pointer), bits.word);
}

}  // namespace omni_moe::cuda
