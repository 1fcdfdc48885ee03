"""One file per implementation of a 4-bit linear. Each holds VARIANTS, a tuple of ..variant.Variant, and what only they need."""
