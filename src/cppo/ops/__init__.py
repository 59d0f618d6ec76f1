"""Pure functions of tensors: layout, divergence, account, gates, ratios, reduction."""
