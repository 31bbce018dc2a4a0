"""Label cells with a model: shards, copies of .h5ad files, AnnData."""
