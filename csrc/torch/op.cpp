#include "op.h"

namespace omni_moe::torch_api {

c10::OperatorHandle find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("omni_moe::") + name).c_str(),
                                                        "");
}

}  // namespace omni_moe::torch_api
