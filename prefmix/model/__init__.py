"""From an adapter to a model that others can use."""
