"""What a run writes and how it is read back: schema, shards, manifest, reader."""
