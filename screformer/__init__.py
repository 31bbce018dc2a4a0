"""scReformer-BERT: tokens, model, training, metrics and prediction, free of Ray, MLflow and SOMA."""
