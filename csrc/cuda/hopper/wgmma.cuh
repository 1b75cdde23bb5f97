// Warpgroup matrix products (wgmma, which cuda::ptx does not have) of 16-bit operands in shared
// memory with fp32 accumulators in registers: D[64, N] (+)= A[64, 16] B[16, N], N = 256, 160,
// 128 or 64, issued by the four warps of a warpgroup. sm_90a.
//
// Operands are tiles as tma.cuh loads them: rows of 64 elements, 128-byte swizzle. Rows of A run
// along K. Those of B run along K too, N of them (PTX's K-major, for a matrix Bᵀ in memory), or
// along the columns of D (N-major, for B itself in memory): then a tile has a row for each element
// of K and 64 of the columns, and N / 64 tiles lie one behind the other. In the same way A may be
// one tile whose rows run along the rows of D (M-major, for a matrix Aᵀ in memory).
//
// Thread t of the warpgroup holds of D, for j = 0 … N / 8 - 1 and i = 0, 1,
// at d[4 j + 2 i + {0, 1}]:
//   row 16 (t / 32) + (t % 32) / 4 + 8 i,  columns 8 j + 2 (t % 4) + {0, 1}.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/hopper/mbarrier.cuh"

namespace omni_moe::cuda {

// False in kernels compiled for other architectures. Those trap, because a call must not look as if
// it had worked; the host launches them only where DeviceInfo::has_hopper_kernels says so.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasHopperInstructions = true;
#else
inline constexpr bool kHasHopperInstructions = false;
#endif

inline constexpr int kWgmmaRows = 64;
inline constexpr int kWgmmaCols = 256;
inline constexpr int kWgmmaDepth = 16;
inline constexpr int kWgmmaRegisters = kWgmmaRows * kWgmmaCols / 128;

// Which way the rows of an operand's tiles run.
enum class WgmmaMajor { kDepth, kCols };

// Tells wgmma about an operand, in units of 16 bytes: where it starts (bits 0 to 13), two
// distances, leading (bits 16 to 29) and stride (bits 32 to 45), 128-byte swizzle (bits 62 and 63:
// 1). `tile` must be aligned to 1024 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile, int leading_bytes,
                                                     int stride_bytes) {
  return uint64_t{(shared_address(tile) & 0x3ffff) >> 4} |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}

// kTileRows: of one tile, where several lie one behind the other along the columns.
template <WgmmaMajor kMajor, int kTileRows>
struct WgmmaOperand;

// The stride leads from eight rows to the next eight; the leading distance has no meaning. The next
// 16 elements of K begin 32 bytes further, since the hardware swizzles the bits of addresses.
template <int kTileRows>
struct WgmmaOperand<WgmmaMajor::kDepth, kTileRows> {
  static constexpr int kLeadingBytes = 16;
  static constexpr int kStrideBytes = 8 * 128;
  static constexpr int kDepthStepBytes = kWgmmaDepth * 2;
};

// The leading distance leads from one tile of 64 columns to the next, the stride from eight
// elements of K to the next eight (Swizzle<3,4,3> o ((8,n),(8,k)):((1,leading),(8,stride)) in the
// terms of CUTLASS). The next 16 elements of K begin two strides further.
template <int kTileRows>
struct WgmmaOperand<WgmmaMajor::kCols, kTileRows> {
  static constexpr int kLeadingBytes = kTileRows * 128;
  static constexpr int kStrideBytes = 8 * 128;
  static constexpr int kDepthStepBytes = kWgmmaDepth / 8 * kStrideBytes;
};

// Of the first 16 elements of K; one more kWgmmaDepthStep is added for each of the next ones.
template <WgmmaMajor kMajor, int kTileRows>
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  using Operand = WgmmaOperand<kMajor, kTileRows>;
  return wgmma_descriptor(tile, Operand::kLeadingBytes, Operand::kStrideBytes);
}
template <WgmmaMajor kMajor, int kTileRows>
inline constexpr uint64_t kWgmmaDepthStep = WgmmaOperand<kMajor, kTileRows>::kDepthStepBytes >> 4;

// Before the first wgmma over accumulators that other instructions have touched.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the last kPending committed groups of this warp are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading accumulators before the wait in front of this call.
template <int kRegisters>
__device__ __forceinline__ void wgmma_use(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The element types' names in the instruction.
template <class T>
struct WgmmaType;
template <>
struct WgmmaType<__nv_bfloat16> {
  static constexpr const char kName[] = "bf16";
};
template <>
struct WgmmaType<__half> {
  static constexpr const char kName[] = "f16";
};

// accumulate = 0 overwrites D. a, b: wgmma_descriptor, as kMajorA and kMajorB say.
// clang-format off
template <class T, WgmmaMajor kMajorB = WgmmaMajor::kDepth, WgmmaMajor kMajorA = WgmmaMajor::kDepth>
__device__ __forceinline__ void wgmma(float (&d)[kWgmmaRegisters], uint64_t a, uint64_t b,
                                      int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.%131.%131 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, accumulate, 1, 1, %133, %132;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
        "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(accumulate), "C"(WgmmaType<T>::kName),
        "n"(kMajorB == WgmmaMajor::kCols ? 1 : 0),
        "n"(kMajorA == WgmmaMajor::kCols ? 1 : 0));
}
template <class T, WgmmaMajor kMajorB = WgmmaMajor::kDepth, WgmmaMajor kMajorA = WgmmaMajor::kDepth>
__device__ __forceinline__ void wgmma(float (&d)[kWgmmaRegisters / 4], uint64_t a, uint64_t b,
                                      int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.%35.%35 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, accumulate, 1, 1, %37, %36;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate), "C"(WgmmaType<T>::kName),
        "n"(kMajorB == WgmmaMajor::kCols ? 1 : 0),
        "n"(kMajorA == WgmmaMajor::kCols ? 1 : 0));
}
template <class T, WgmmaMajor kMajorB = WgmmaMajor::kDepth, WgmmaMajor kMajorA = WgmmaMajor::kDepth>
__device__ __forceinline__ void wgmma(float (&d)[80], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %82, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n160k16.f32.%83.%83 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
      "%80, %81, accumulate, 1, 1, %85, %84;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
      : "l"(a), "l"(b), "r"(accumulate), "C"(WgmmaType<T>::kName),
        "n"(kMajorB == WgmmaMajor::kCols ? 1 : 0),
        "n"(kMajorA == WgmmaMajor::kCols ? 1 : 0));
}
template <class T, WgmmaMajor kMajorB = WgmmaMajor::kDepth, WgmmaMajor kMajorA = WgmmaMajor::kDepth>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.%67.%67 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, accumulate, 1, 1, %69, %68;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "r"(accumulate), "C"(WgmmaType<T>::kName),
        "n"(kMajorB == WgmmaMajor::kCols ? 1 : 0),
        "n"(kMajorA == WgmmaMajor::kCols ? 1 : 0));
}
// clang-format on

// These move registers between the warpgroups of a block; every warp of the warpgroup calls them.
// cuda::ptx has no setmaxnreg.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace omni_moe::cuda
