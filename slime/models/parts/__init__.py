"""What decoders are assembled from: each part reads its fields of config.json and lays out its parameters."""
