"""Parts that networks are built of: backbones, predictors, norms, padding."""
