"""From text files to shards: corpora, downloads, documents, and the shards that are written."""
