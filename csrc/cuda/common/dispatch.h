// From the runtime enums of types.h to template arguments, by generic lambda:
//   return dispatch_dtype(params.dtype, [&](auto tag) {
//     using T = typename decltype(tag)::type;
//     return launch<T>(params, stream);
//   });
// A value without a CUDA kernel (kFloat64, or garbage) yields cudaErrorInvalidValue.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "omni_moe/types.h"

namespace omni_moe::cuda {

template <class T>
struct TypeTag {
  using type = T;
};

template <auto kValue>
struct ValueTag {
  static constexpr auto value = kValue;
};

template <class F>
cudaError_t dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kFloat16:
      return f(TypeTag<__half>{});
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

template <class F>
cudaError_t dispatch_index_type(IndexType index_type, F&& f) {
  switch (index_type) {
    case IndexType::kInt32:
      return f(TypeTag<int32_t>{});
    case IndexType::kInt64:
      return f(TypeTag<int64_t>{});
    default:
      return cudaErrorInvalidValue;
  }
}

template <class F>
cudaError_t dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kSilu:
      return f(ValueTag<Activation::kSilu>{});
    case Activation::kGelu:
      return f(ValueTag<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(ValueTag<Activation::kGeluTanh>{});
    case Activation::kRelu:
      return f(ValueTag<Activation::kRelu>{});
    case Activation::kIdentity:
      return f(ValueTag<Activation::kIdentity>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace omni_moe::cuda
