"""From the atlas to batches of tokens: ingest, query, split and stream."""
