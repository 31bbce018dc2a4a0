"""Studies over folds: cross-validation, search, ablation and their baselines."""
