"""What a model does inside: early warnings and gate scores."""
