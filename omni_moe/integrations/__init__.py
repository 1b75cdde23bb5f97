"""OmniMoE inside other libraries. Each subpackage needs the library it is named after."""
