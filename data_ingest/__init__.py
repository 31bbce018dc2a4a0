"""From files to an atlas and from an atlas to batches of tokens: ingest, query, split, stream."""
