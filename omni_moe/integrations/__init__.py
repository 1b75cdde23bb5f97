"""OmniMoE inside other libraries. `transformers` needs the library of that name."""
