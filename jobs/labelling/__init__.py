"""Label cells with a model: Parquet shards, .h5ad copies and atlas columns."""
